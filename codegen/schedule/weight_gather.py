"""Weights that ranks hold in shares come together: in one exchange of all ranks, in two where machines are alike, or
in one inside each machine where each holds all of them.

Of two, the first brings every machine the rows of the others, each row once: a rank talks to those that have its place
in their machines. In the second the ranks of a machine give each other what came, over memory that they share.

On CPUs it is one exchange in any case (:class:`Assembled`), of one weight or of several that are read one after the
other. There a rank that waits for rows of other machines gives them on to the ranks of its own, which ``Forward`` says,
and all rows come to lie in the bank in the order of the weight, the rank's own among them: what reads a weight reads
the bank, and nobody copies it out. A weight is a *part* of its exchange: it is waited for by itself, while those behind
it are still on their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from sfcompile.codegen.schedule.exchange import ExchangeSchedule, build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule, lay_out
from sfcompile.runtime.program.instructions import Arrival, Chunk, Forward, Instruction, Put, RankProgram, Wait
from sfcompile.runtime.program.phases import EXCHANGE_FINISH, EXCHANGE_START
from sfcompile.runtime.program.sites import ExchangeSite, nbytes
from sfcompile.runtime.program.weight_rows import WeightRows


@dataclass(frozen=True)
class Assembled(ExchangeSchedule):
    """A gather whose parts lie in every rank's bank as in the weights: one after the other, in the order of their rows,
    without gaps. Where a slot lies thus differs from rank to rank; ``slots`` says how large they are.

    The site's value is the elements of all weights in a row, of which a rank owns a stretch of each.
    """

    weights: tuple[WeightRows, ...] = ()

    @property
    def assembled(self) -> bool:
        """It is."""
        return True

    @property
    def parts(self) -> int:
        """One for every weight."""
        return len(self.weights)

    @property
    def heap_bytes(self) -> int:
        """Bytes of all weights."""
        return nbytes(self.site.shape, self.site.dtype)

    def share(self, rank: int, part: int) -> tuple[int, ...]:
        """Shape of what a rank holds of a weight."""
        return self.weights[part].local_shape(rank)

    def whole(self, part: int) -> tuple[int, tuple[int, ...]]:
        """Where a weight lies in the bank, in bytes, and its shape."""
        return min(first for (first, _) in self._stretches(part)) * self.site.dtype.itemsize, self.weights[part].shape

    def own_place(self, rank: int, part: int) -> int:
        """Where a rank's own rows of a weight lie: bytes from the start of the bank."""
        return self.site.owned[rank][part][0] * self.site.dtype.itemsize

    def place(self, rank: int, slot: int) -> int:
        """Where the rows lie that come to a rank in a slot."""
        chunk = self._come[slot]
        return self.own_place(self.mesh.rank_after(rank, chunk.src), chunk.part)

    def shape(self, rank: int, arrival: Arrival) -> tuple[int, ...]:
        """Rows of a weight, as they follow one another."""
        return (self.site.owned[arrival.chunk.src][arrival.chunk.part][1],)

    def arrival_bytes(self, arrival: Arrival) -> NDArray[np.int64]:
        """Bytes of an arrival of the origin's, at every receiving rank."""
        sizes = np.array([length for _, length in self._stretches(arrival.chunk.part)], dtype=np.int64)
        return sizes[self.mesh.ranks_after(arrival.chunk.src)] * self.site.dtype.itemsize

    def _stretches(self, part: int) -> list[tuple[int, int]]:
        """By rank which of the elements of all weights are its own of one."""
        return [runs[part] for runs in self.site.owned]

    @cached_property
    def _come(self) -> dict[int, Chunk]:
        """By slot what comes to the origin."""
        return {arrival.slot: arrival.chunk for arrival in self.origin.arrivals}


def build_weight_gather(
    name: str, weight: WeightRows, dtype: torch.dtype, machine_of: Sequence[int]
) -> tuple[Schedule, ...]:
    """The schedules by which every rank gets a whole weight, to be run one after the other."""
    machines, ranks, rows = _machines(machine_of), len(machine_of), weight.shape[0]
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


def _machines(machine_of: Sequence[int]) -> list[list[int]]:
    members: dict[int, list[int]] = {}
    for rank, machine in enumerate(machine_of):
        members.setdefault(machine, []).append(rank)
    return list(members.values())


def _gather(name: str, shape: tuple[int, ...], dtype: torch.dtype, count: int) -> Schedule:
    """Equal shares of so many ranks."""
    share = shape[0] // count
    owned = tuple(((i * share, share),) for i in range(count))
    return build_exchange(ExchangeSite.gather(name, shape, dtype, 0, owned), Mesh(1, count, tuple(range(count))))


def build_assembled(
    name: str, weights: Sequence[WeightRows], dtype: torch.dtype, machine_of: Sequence[int]
) -> Assembled:
    """The schedule of CPU ranks, of which each holds rows of its own, for some weights.

    Every row goes once to every machine, where machines are alike: a rank sends its own along the ring, to those of its
    place in other machines, and to the other ranks of its machine; those it also gives what comes along the ring. What
    goes to other machines is put first, so that the network has it while this rank copies for its neighbours. Where
    machines are not alike, all ranks are one ring.
    """
    machines, ranks = _machines(machine_of), range(len(machine_of))
    if len({len(each) for each in machines}) == 1:
        order = tuple(rank for local in zip(*machines, strict=True) for rank in local)
        mesh = Mesh(len(machines[0]), len(machines), order)
    else:
        mesh = Mesh(1, len(ranks), tuple(ranks))
    owned: list[list[tuple[int, int]]] = [[] for _ in ranks]
    total = 0
    for weight in weights:
        width = nbytes(weight.shape[1:], torch.uint8)
        for rank in ranks:
            first, stop = weight.rows(rank)
            owned[rank].append((total + first * width, (stop - first) * width))
        total += weight.shape[0] * width
    site = ExchangeSite.gather(name, (total,), dtype, 0, tuple(map(tuple, owned)))
    slots, origin = _program(mesh, len(weights))
    empty = Assembled("assembled", site, mesh, (), origin, weights=tuple(weights))
    sizes = [(f"x{part}({source})", int(empty.arrival_bytes(slots[source, part]).max())) for source, part in slots]
    return replace(empty, slots=lay_out(sizes))


def _program(mesh: Mesh, parts: int) -> tuple[dict[tuple[int, int], Arrival], RankProgram]:
    """What comes to the origin, by where it is from and its part, and what the origin does."""
    ring = [mesh.offset(0, h) for h in range(1, mesh.ring)]
    near = [mesh.offset(a, 0) for a in range(1, mesh.ulysses)]
    passed_on = {mesh.add(a, h): (a, h) for h in ring for a in near}  # who gives it on, and where that one has it from
    come: dict[tuple[int, int], Arrival] = {}
    for part in range(parts):
        for source in (*ring, *near, *passed_on):
            src = passed_on[source][0] if source in passed_on else source
            come[source, part] = Arrival(len(come), src, "x", Chunk(source, part))
    start: list[Instruction] = []
    finish: list[Instruction] = []
    for part in range(parts):
        start += [Put("x", part, mesh.back(d), come[d, part].slot) for d in (*ring, *near)]
        for h in ring:
            finish.append(Wait(come[h, part].slot, h))
            finish += [Forward(come[h, part].slot, mesh.back(a), come[mesh.add(a, h), part].slot) for a in near]
        finish += [Wait(come[source, part].slot, come[source, part].src) for source in (*near, *passed_on)]
    phases = {EXCHANGE_START: tuple(start), EXCHANGE_FINISH: tuple(finish)}
    return come, RankProgram(0, phases, tuple(come.values()))
