"""``sfcompile.shard_weights``: of every large weight of a model each rank keeps a share of the rows.

For ranks on several machines, with ``options={"weights": "sharded"}``. The ranks of one machine share memory and need
no shares: there the first call makes one copy for all (graph_call.py).
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.errors import OptionError, RankMismatchError, UnsupportedError
from sfcompile.graph_call import refuse_sharded
from sfcompile.groups import in_group, session_for, world_size
from sfcompile.options import Options
from sfcompile.runtime.program.phases import EXCHANGE_START
from sfcompile.runtime.program.sites import ExchangeSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.weight_rows import WeightRows, places_of
from sfcompile.runtime.rank.calls import fingerprint
from sfcompile.runtime.rank.session import Session, use_session
from sfcompile.runtime.rank.sharded_weight import Gather, History, ShardedWeight, why_whole
from sfcompile.runtime.rank.shared_weights import on_all
from sfcompile.runtime.wires.shared_files import in_words
from sfcompile.torch_logs import speak

log = logging.getLogger("sfcompile")
ModelT = TypeVar("ModelT", bound=nn.Module)
_PIECE = 1 << 20
"""Bytes of a rank's rows that travel at a time where a weight is gathered outside of a graph."""
_PROGRAM = "whole weights"


def shard_weights(model: ModelT, *, options: Mapping[str, Any] | None = None) -> ModelT:
    """Let every rank keep a share of each large weight of a model that all have loaded whole. Collective.

    Call it before the model is called. Weights become tensors that look whole; what is done with them, docs/weights.md
    says. What cannot be cut stays whole, and the report of a compile says why. On one machine it does nothing.

    Args:
        options: as the model will be compiled with: ``mesh``, ``transport``, ``timeout_s`` and ``weights`` count.

    Raises:
        RankMismatchError: the ranks hold different weights; on every rank.
        OptionError: weights cannot be sharded on these ranks.
    """
    asked = in_group(Options.from_dict({"weights": "sharded", **(options or {})}))
    if world_size(asked) == 1:
        return model
    session = session_for(asked)
    with session.turn(), session.guard(), use_session(session):
        session.agree("shard weights", {"what follows": "weights are sharded"})
        session.reconfigure(asked.transport, asked.timeout_s)
        standing = standing_weights(model)
        refuse_sharded(asked, next((old.device for old, _ in standing), torch.device("cpu")), session.topology)
        speak(session.global_rank)
        if not cuts_weights(asked, session.topology):
            return model
        chosen = [(old, places) for old, places in standing if not why_whole(old, session.topology.num_ranks)]
        _agree(session, [old for old, _ in chosen])
        gather, places_by_rank = gather_of(session), places_of(session.topology.machine_of)
        total = sum(old.numel() * old.element_size() for old, _ in chosen)
        del standing
        while chosen:  # what was cut is free before the next one is
            old, places = chosen.pop()
            cut = WeightRows(tuple(old.shape), places_by_rank)
            start, stop = cut.rows(session.rank)
            history = History(gather, fingerprint([old]))
            with torch.no_grad():
                shard = old.detach()[start:stop].clone()
            put_weight(places, shard, cut, session.rank, history, old.requires_grad)
            del old, places
        log.info("%s of weights lie in %d shares", in_words(total), session.topology.num_ranks)
    return model


def cuts_weights(asked: Options, topology: Topology) -> bool:
    """Whether ranks keep shares of weights: with one machine they keep one copy together."""
    return asked.weights == "sharded" and topology.num_machines > 1


def standing_weights(model: nn.Module) -> list[tuple[nn.Parameter, list[tuple[nn.Module, str]]]]:
    """Every parameter once, with all the places where it stands."""
    standing: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                standing.setdefault(id(weight), (weight, []))[1].append((module, name))
    return list(standing.values())


def put_weight(
    places: Sequence[tuple[nn.Module, str]],
    shard: torch.Tensor,
    cut: WeightRows,
    rank: int,
    history: History,
    requires_grad: bool,
) -> None:
    """Stand a sharded weight in its places: one parameter, as it was."""
    weight = nn.Parameter(ShardedWeight(shard, cut, rank, history), requires_grad=requires_grad)
    for module, name in places:
        module._parameters[name] = weight


def refuse_shares(model: nn.Module) -> None:
    """Refuse to export a model whose weights lie in shares.

    Raises:
        UnsupportedError: some do.
    """
    names = [name for name, weight in model.named_parameters() if isinstance(weight, ShardedWeight)]
    if names:
        raise UnsupportedError(
            f"{len(names)} weights of the model lie in shares on the ranks of a job, {names[0]} is the first",
            "a package holds whole weights, and an export runs in one process",
            "export the model before its weights are sharded; ranks of a machine share the pages of a package's file",
        )


def _agree(session: Session, weights: Sequence[torch.Tensor]) -> None:
    """Collective: all ranks hold the same bytes, as far as a checksum of all of them says.

    Raises:
        RankMismatchError: they do not; on every rank.
    """
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(f"{weight.dtype}{tuple(weight.shape)}".encode())
        flat = weight.detach().view(-1).view(torch.uint8).numpy()
        digest.update(zlib.crc32(flat.data).to_bytes(4, "little"))
    everyone = session.exchange(digest.hexdigest(), "compare their weights")
    odd = [rank for rank, its in enumerate(everyone) if its != everyone[0]]
    if odd:
        raise on_all(
            RankMismatchError(
                f"weights differ between rank 0 and rank {odd[0]}",
                "each rank would keep a share of them, so all must have the same values to the last bit",
                "load or seed the same weights on every rank",
                rank=session.rank,
                peer=odd[0],
            )
        )


def gather_of(session: Session) -> Gather:
    """How ranks gather a weight beside a compiled graph: in a call of its own, a piece at a time."""

    def gather(weight: ShardedWeight) -> torch.Tensor:
        ranks = session.topology.num_ranks
        everything = ((0, ranks * _PIECE),)
        owned = tuple(((rank * _PIECE, _PIECE),) for rank in range(ranks))
        site = ExchangeSite(_PROGRAM, (ranks * _PIECE,), torch.uint8, 0, 1, 1, owned, 0, (everything,) * ranks)
        if _PROGRAM not in session.programs:
            schedule = build_exchange(site, Mesh(1, ranks, tuple(range(ranks))))
            check(schedule)
            with session.turn(), session.guard(), use_session(session):
                session.load(_PROGRAM, [schedule])
        name = f"{_PROGRAM} {list(weight.shape)} {weight.history.mark}"
        with session.call(name, []), torch.inference_mode(False), torch.no_grad():
            return _gathered(session, weight, site)

    return gather


def _gathered(session: Session, weight: ShardedWeight, site: ExchangeSite) -> torch.Tensor:
    cut, whole = weight.cut, torch.empty(weight.cut.shape, dtype=weight.dtype)
    mine, flat = weight.shard.view(-1).view(torch.uint8), whole.view(-1).view(torch.uint8)
    row = flat.numel() // cut.shape[0]
    stretches = [[end * row for end in cut.rows(rank)] for rank in range(len(cut.places))]
    out = torch.empty(site.shape, dtype=torch.uint8)
    for at in range(0, max(stop - start for start, stop in stretches), _PIECE):
        piece = torch.zeros(_PIECE, dtype=torch.uint8)
        part = mine[at : at + _PIECE]
        piece[: part.numel()] = part
        session.put(_PROGRAM, 0, EXCHANGE_START, piece)
        session.receive(_PROGRAM, 0, out)
        for rank, (start, stop) in enumerate(stretches):
            size = min(_PIECE, stop - start - at)
            if size > 0:
                flat[start + at : start + at + size] = out[rank * _PIECE : rank * _PIECE + size]
    return whole


def shares_of(inputs: Sequence[Any], written: Sequence[int], topology: Topology, asked: Options) -> tuple[int, ...]:
    """Which inputs of a graph are weights in shares.

    Args:
        written: inputs that the graph writes to.

    Raises:
        UnsupportedError: they were cut for other ranks, or the graph writes to one.
        OptionError: weights shall be in shares, and some that could be cut are whole.
    """
    places = tuple(i for i, value in enumerate(inputs) if isinstance(value, ShardedWeight))
    for i in places:
        if inputs[i].cut.places != places_of(topology.machine_of):
            raise UnsupportedError(
                f"a weight is in {len(inputs[i].cut.places)} shares, and {topology.num_ranks} ranks on "
                f"{topology.num_machines} machines compute the model",
                "every rank that computes has a share",
                "shard the weights with the options that the model is compiled with",
            )
        if i in written:
            raise UnsupportedError(
                f"the model writes to a sharded weight {list(inputs[i].shape)} while it runs",
                "each rank holds some of its rows",
                "write to it between the calls, or use options={'weights': 'whole'}",
            )
    if cuts_weights(asked, topology):
        whole = [
            value
            for i, value in enumerate(inputs)
            if isinstance(value, nn.Parameter) and i not in places and not why_whole(value, topology.num_ranks)
        ]
        if whole:
            raise OptionError(
                f"weights='sharded' with ranks on {topology.num_machines} machines, and {len(whole)} large weights "
                f"({in_words(sum(value.numel() * value.element_size() for value in whole))}) are whole on every rank",
                "the model was loaded whole, and nobody but its owner can take its weights out of it",
                "call sfcompile.shard_weights(model) before the model is called, or fill it with "
                "sfcompile.load_sharded(model, files, options={'weights': 'sharded'})",
            )
    return places
