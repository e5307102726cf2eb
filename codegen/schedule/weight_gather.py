"""A weight that ranks hold in shares comes together: in one exchange of all ranks, in two where machines are alike, or
in one inside each machine where each holds all of it.

Of two, the first brings every machine the rows of the others, each row once: a rank talks to those that have its place
in their machines. In the second the ranks of a machine give each other what came, over memory that they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.runtime.program.sites import ExchangeSite
from sfcompile.runtime.program.weight_rows import WeightRows


def build_weight_gather(
    name: str, weight: WeightRows, dtype: torch.dtype, machine_of: Sequence[int]
) -> tuple[Schedule, ...]:
    """The schedules by which every rank gets a whole weight, to be run one after the other."""
    members: dict[int, list[int]] = {}
    for rank, machine in enumerate(machine_of):
        members.setdefault(machine, []).append(rank)
    machines, ranks, rows = list(members.values()), len(machine_of), weight.shape[0]
    here = len(machines[0])
    if weight.count < ranks:
        owned = tuple(weight.owned[rank] for rank in machines[0])
        alone = build_exchange(
            ExchangeSite.gather(f"{name}, inside machines", weight.shape, dtype, 0, owned),
            Mesh(1, here, tuple(range(here))),
        )
        return (replace(alone, groups=tuple(map(tuple, machines))),)
    if here == 1 or len(machines) == 1 or len({len(each) for each in machines}) > 1 or rows % ranks:
        site = ExchangeSite.gather(name, weight.shape, dtype, 0, weight.owned)
        return (build_exchange(site, Mesh(1, ranks, tuple(range(ranks)))),)
    alike, share = tuple(zip(*machines, strict=True)), rows // here
    across = _gather(f"{name}, from other machines", (share, *weight.shape[1:]), dtype, len(machines))
    inside = _gather(f"{name}, inside machines", weight.shape, dtype, here)
    return replace(across, groups=alike), replace(inside, groups=tuple(map(tuple, machines)))


def _gather(name: str, shape: tuple[int, ...], dtype: torch.dtype, count: int) -> Schedule:
    """Equal shares of so many ranks."""
    share = shape[0] // count
    owned = tuple(((i * share, share),) for i in range(count))
    return build_exchange(ExchangeSite.gather(name, shape, dtype, 0, owned), Mesh(1, count, tuple(range(count))))
