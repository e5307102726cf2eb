"""Parameters that torch has cut, by ``fully_shard`` or ``distribute_tensor``: each rank's rows become its share.

Nothing is gathered: where torch cut as we do, a rank keeps the memory that it has. Where not (rows that the ranks do
not divide, several machines), rows change hands in one exchange. Small parameters are made whole, all of a dtype in one
exchange.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.errors import UnsupportedError
from sfcompile.runtime.program.intervals import Runs, count
from sfcompile.runtime.program.phases import EXCHANGE_START
from sfcompile.runtime.program.sites import ExchangeSite
from sfcompile.runtime.program.weight_rows import LARGE_BYTES, WeightRows, can_be_cut, count_of
from sfcompile.runtime.rank.session import Session, use_session
from sfcompile.runtime.rank.shared_weights import on_all
from sfcompile.torch_fsdp import fully_shard_asks, leave_fully_shard


class Taken(NamedTuple):
    """A parameter that torch held in shards.

    Attributes:
        value: this rank's rows, as ``cut`` says; all of it, where that is None.
    """

    value: torch.Tensor
    cut: WeightRows | None


def is_dtensor(weight: object) -> bool:
    """Whether a tensor is one of torch's in shards."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(weight, module.DTensor)


def leave_torch(model: nn.Module, session: Session) -> None:
    """Collective: take ``fully_shard`` off a model whose parameters all lie as we can take them.

    Raises:
        UnsupportedError: they do not, or more than shards was asked for; the model is as it was. On every rank.
    """
    asks = fully_shard_asks(model)
    if asks:
        raise on_all(
            UnsupportedError(
                f"the model is under fully_shard with {asks}",
                "its hooks are taken off, and with them what they do beside gathering weights",
                "cast the model itself (model.to(torch.bfloat16)) and call fully_shard without it",
            )
        )
    members = session.exchange(session.global_rank, "name their ranks")
    for name, weight in model.named_parameters():
        why = _other_cut(weight, members) if is_dtensor(weight) else ""
        if why:
            raise on_all(
                UnsupportedError(
                    f"{name} {list(weight.shape)} is a DTensor {why}",
                    "a rank's share is some rows of a weight, and all ranks that compute the model have one",
                    "cut it by Shard(0) on a mesh of these ranks in one dim, or make it whole: full_tensor()",
                )
            )
    leave_fully_shard(model)


def _other_cut(weight: Any, members: Sequence[int]) -> str:
    """How a parameter lies that does not lie in rows over all ranks, in their order; "": it does."""
    placements, mesh = tuple(weight.placements), weight.device_mesh.mesh
    if len(placements) != 1 or not placements[0].is_shard(0):
        return f"placed {placements}"
    ranks = mesh.flatten().tolist()
    return "" if ranks == list(members) else f"on ranks {ranks}, and ranks {list(members)} compute the model"


def take(session: Session, weights: Sequence[Any], places: tuple[int, ...], home: torch.device) -> list[Taken]:
    """Collective: parameters in torch's shards as we hold them.

    Args:
        places: by rank which stretch of rows it is to hold.
        home: where they go.
    """
    ranks, taken = session.topology.num_ranks, dict[int, Taken]()
    small: dict[torch.dtype, list[int]] = {}
    with torch.no_grad():
        for at, weight in enumerate(weights):
            shape = tuple(weight.shape)
            dense = torch.empty(shape, device="meta").stride()
            if not can_be_cut(shape, dense, weight.element_size(), count_of(places)):
                if weight.numel() * weight.element_size() < LARGE_BYTES:
                    small.setdefault(weight.dtype, []).append(at)
                else:
                    taken[at] = Taken(weight.detach().full_tensor().to(home), None)
                continue
            cut, theirs = WeightRows(shape, places), _rows_by_torch(shape[0], ranks)
            rows = weight.detach().to_local()
            if theirs != cut.owned:
                rows = _relaid(session, rows, shape, theirs, cut)
            taken[at] = Taken(rows.to(home), cut)
        for alike in small.values():
            shards = [weights[at].detach().to_local() for at in alike]
            wholes = _made_whole(session, shards, [tuple(weights[at].shape) for at in alike])
            taken |= {at: Taken(whole.to(home), None) for at, whole in zip(alike, wholes, strict=True)}
    return [taken[at] for at in range(len(weights))]


def _rows_by_torch(rows: int, ranks: int) -> tuple[Runs, ...]:
    """By rank what Shard(0) gives it: as many rows as the first one, as long as there are any."""
    most = -(-rows // ranks)
    ends = [min(rank * most, rows) for rank in range(ranks + 1)]
    return tuple(((first, stop - first),) if stop > first else () for first, stop in zip(ends, ends[1:], strict=False))


def _relaid(
    session: Session, rows: torch.Tensor, shape: tuple[int, ...], theirs: tuple[Runs, ...], cut: WeightRows
) -> torch.Tensor:
    """Collective: this rank's rows as ``cut`` says, of a weight whose rows lie as ``theirs`` says."""
    return _traded(session, rows, ExchangeSite("rows of a weight", shape, rows.dtype, 0, 1, 1, theirs, 0, cut.owned))


def _made_whole(
    session: Session, shards: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]]
) -> list[torch.Tensor]:
    """Collective: tensors of one dtype, of each of which this rank has the rows that torch gives it; in one exchange.

    They travel as a line of elements, rank by rank, and of each rank tensor by tensor.
    """
    ranks = session.topology.num_ranks
    owned = [_rows_by_torch(shape[0], ranks) for shape in shapes]
    sizes = [
        [count(runs[rank]) * math.prod(shape[1:]) for runs, shape in zip(owned, shapes, strict=True)]
        for rank in range(ranks)
    ]
    ends = list(accumulate(map(sum, sizes), initial=0))
    stretches = tuple(((at, stop - at),) if stop > at else () for at, stop in zip(ends, ends[1:], strict=False))
    line = torch.cat([shard.reshape(-1) for shard in shards])
    site = ExchangeSite.gather("small weights", (ends[-1],), line.dtype, 0, stretches)
    came = _traded(session, line, site).split([size for of_rank in sizes for size in of_rank])
    return [torch.cat(came[i :: len(shapes)]).view(shape) for i, shape in enumerate(shapes)]


def _traded(session: Session, shard: torch.Tensor, site: ExchangeSite) -> torch.Tensor:
    """Collective: what this rank wants of a site that is run once."""
    program = f"rows-{hashlib.sha256(repr(site.geometry()).encode()).hexdigest()[:16]}"
    ranks, device = session.topology.num_ranks, session.side.device
    with session.turn(), session.guard(), use_session(session):
        if program not in session.programs:
            schedule = build_exchange(site, Mesh(1, ranks, tuple(range(ranks))))
            check(schedule)
            session.load(program, [schedule])
    with session.call(program, []), torch.inference_mode(False):
        out = torch.empty(site.wanted_shape(session.rank), dtype=shard.dtype, device=device)
        session.put(program, 0, EXCHANGE_START, shard.contiguous().to(device))
        session.receive(program, 0, out)
    return out
