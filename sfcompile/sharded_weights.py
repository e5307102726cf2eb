"""``sfcompile.shard_weights``: of every large weight of a model each rank keeps a share of the rows.

For GPU ranks, and CPU ranks on several machines, with ``options={"weights": "sharded"}``. CPU ranks of one machine
share memory and need no shares: there the first call makes one copy for all (graph_call.py).
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
from sfcompile.device import refuse_transport, start
from sfcompile.errors import OptionError, RankMismatchError, UnsupportedError
from sfcompile.graph_call import refuse_sharded
from sfcompile.groups import in_group, session_for, world_size
from sfcompile.one_style import check_model
from sfcompile.options import Options, named_options
from sfcompile.runtime.program.phases import EXCHANGE_START
from sfcompile.runtime.program.sites import ExchangeSite
from sfcompile.runtime.program.weight_rows import WeightRows, count_of, held_in_shares, places_of
from sfcompile.runtime.rank.calls import fingerprint
from sfcompile.runtime.rank.session import Session, use_session
from sfcompile.runtime.rank.sharded_weight import Gather, History, ShardedWeight, why_whole
from sfcompile.runtime.rank.shared_weights import on_all
from sfcompile.runtime.wires.shared_files import in_words
from sfcompile.torch_logs import speak
from sfcompile.torch_shards import is_dtensor, leave_torch, take

log = logging.getLogger("sfcompile")
ModelT = TypeVar("ModelT", bound=nn.Module)
Standing = tuple[nn.Parameter, list[tuple[nn.Module, str]]]
"""A parameter and all the places where it stands."""
_PIECE = 1 << 20
"""Bytes of a rank's rows that travel at a time where a weight is gathered outside of a graph."""
_PROGRAM = "whole weights"


def shard_weights(
    model: ModelT, *, options: Mapping[str, Any] | None = None, device: torch.device | str | None = None
) -> ModelT:
    """Let every rank keep a share of each large weight of a model that all have loaded whole. Collective.

    Call it before the model is called. Weights become tensors that look whole; what is done with them, docs/weights.md
    says. What cannot be cut stays whole, and the report of a compile says why. On CPU ranks of one machine it does
    nothing; but what torch has cut, by ``fully_shard`` or as DTensors by rows, becomes shares as it lies, everywhere.

    Args:
        options: as the model will be compiled with: ``mesh``, ``transport``, ``timeout_s`` and ``weights`` count.
        device: where this rank computes: weights that lie elsewhere go there in shares, and all else whole. Left out:
            where the weights are.

    Raises:
        RankMismatchError: the ranks hold different weights; on every rank.
        OptionError: weights cannot be sharded on these ranks.
        UnsupportedError: torch has cut them in other ways; on every rank.
    """
    check_model(model, modules=True)
    asked = in_group(Options.from_dict({"weights": "sharded", **named_options(options)}))
    if world_size(asked) == 1:
        return model
    session = session_for(asked)
    with session.turn(), session.guard(), use_session(session):
        session.agree("shard weights", {"what follows": "weights are sharded"})
        home = home_of(next((old.device for old in model.parameters()), "cpu") if device is None else device)
        refuse_transport(home, asked.transport)
        session.reconfigure(asked.transport, asked.timeout_s)
        start(home, session, asked)
        refuse_sharded(asked, home, session.topology)
        speak(session.global_rank)
        leave_torch(model, session)
    gather = gather_of(session, asked)
    places = cut_of(asked, session)
    cut = [entry for entry in standing_weights(model) if is_dtensor(entry[0])]
    total = _take_from_torch(session, cut, places, gather, home)
    with session.turn(), session.guard(), use_session(session):
        if cuts_weights(asked, session):
            del cut
            total += _cut(session, model, places, gather, home)
        if device is not None:
            bring(model, home)
        give_back(home)
    if total:
        log.info("%s of weights lie in %d shares", in_words(total), count_of(places))
    return model


def _cut(session: Session, model: nn.Module, places: tuple[int, ...], gather: Gather, home: torch.device) -> int:
    """Collective: keep this rank's rows of what is whole and can be cut; of how many bytes."""
    chosen = [entry for entry in standing_weights(model) if not why_whole(entry[0], count_of(places))]
    _agree(session, [old for old, _ in chosen])
    total = sum(old.numel() * old.element_size() for old, _ in chosen)
    while chosen:  # what was cut is free before the next one is
        old, stands = chosen.pop()
        cut = WeightRows(tuple(old.shape), places)
        first, stop = cut.rows(session.rank)
        history = History(gather, fingerprint([old]))
        with torch.no_grad():
            shard = old.detach()[first:stop].to(home, copy=True)
        put_weight(stands, shard, cut, session.rank, history, old.requires_grad)
        del old, stands
    return total


def _take_from_torch(
    session: Session, standing: Sequence[Standing], places: tuple[int, ...], gather: Gather, home: torch.device
) -> int:
    """Collective: what torch has cut becomes shares of ours, or whole; of how many bytes."""
    taken, total = take(session, [old for old, _ in standing], places, home), 0
    with session.guard():
        everyone = session.exchange([fingerprint([each.value]) for each in taken], "compare what torch has cut")
    for (old, stands), each, marks in zip(standing, taken, zip(*everyone, strict=True), strict=True):
        if each.cut is None:
            whole = nn.Parameter(each.value, requires_grad=old.requires_grad)
            for module, name in stands:
                setattr(module, name, whole)
            continue
        history = History(gather, zlib.crc32(repr(marks).encode()))
        put_weight(stands, each.value, each.cut, session.rank, history, old.requires_grad)
        total += old.numel() * old.element_size()
    return total


def cuts_weights(asked: Options, session: Session) -> bool:
    """Whether ranks keep shares of weights: CPU ranks of a machine keep one copy together."""
    return held_in_shares(asked.weights, session.side.on_gpu, session.topology.machine_of) is not None


def cut_of(asked: Options, session: Session) -> tuple[int, ...]:
    """By rank which stretch of rows it holds of a weight in shares."""
    return places_of(session.topology.machine_of, by_machine(asked, session))


def by_machine(asked: Options, session: Session) -> bool:
    """Whether each machine holds all weights in shares: CPU ranks hold them in memory that they share."""
    return asked.weights == "sharded-by-machine" and session.side.on_gpu


def home_of(device: torch.device | str) -> torch.device:
    """A device by its name, with its number."""
    home = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if home == torch.device("cuda") else home


def bring(model: nn.Module, home: torch.device) -> None:
    """Move what a model holds whole, parameters and buffers, to where it will compute."""
    with torch.no_grad():
        for weight, places in standing_weights(model):
            if weight.device == home or weight.is_meta:
                continue
            if type(weight) is not nn.Parameter and not isinstance(weight, ShardedWeight):
                weight.data = weight.data.to(home)  # a class of its own, which is kept
                continue
            moved = nn.Parameter(weight.detach().to(home), requires_grad=weight.requires_grad)
            for module, name in places:
                setattr(module, name, moved)
        buffers = dict[int, tuple[torch.Tensor, torch.Tensor]]()  # one that stands in two places stays one
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != home and not buffer.is_meta:
                    if id(buffer) not in buffers:
                        buffers[id(buffer)] = buffer, buffer.to(home)
                    module._buffers[name] = buffers[id(buffer)][1]


def give_back(home: torch.device) -> None:
    """Let others than torch's allocator have what was freed of a GPU's memory."""
    if home.type == "cuda":
        torch.cuda.empty_cache()


def standing_weights(model: nn.Module) -> list[Standing]:
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
        setattr(module, name, weight)  # not past its class: an LSTM keeps a list of its weights


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
        flat = weight.detach().view(-1).view(torch.uint8).cpu().numpy()
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


def gather_of(session: Session, asked: Options) -> Gather:
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
                if weight.device.type == "cuda":
                    start(weight.device, session, asked)
                session.load(_PROGRAM, [schedule])
        name = f"{_PROGRAM} {list(weight.shape)} {weight.history.mark}"
        with session.call(name, []), torch.inference_mode(False), torch.no_grad():
            return _gathered(session, weight, site)

    return gather


def _gathered(session: Session, weight: ShardedWeight, site: ExchangeSite) -> torch.Tensor:
    """All of a weight, on its device: pieces travel from where the session's sites run, which may be another one."""
    cut, whole = weight.cut, torch.empty(weight.cut.shape, dtype=weight.dtype, device=weight.device)
    where = session.side.device
    mine, flat = weight.shard.view(-1).view(torch.uint8), whole.view(-1).view(torch.uint8)
    row = flat.numel() // cut.shape[0]
    stretches = [[end * row for end in cut.rows(rank)] for rank in range(len(cut.places))]
    out = torch.empty(site.shape, dtype=torch.uint8, device=where)
    for at in range(0, max(stop - first for first, stop in stretches), _PIECE):
        piece = torch.zeros(_PIECE, dtype=torch.uint8, device=where)
        part = mine[at : at + _PIECE]
        piece[: part.numel()] = part
        session.put(_PROGRAM, 0, EXCHANGE_START, piece)
        session.receive(_PROGRAM, 0, out)
        for rank, (first, stop) in enumerate(stretches):
            size = min(_PIECE, stop - first - at)
            if size > 0:
                flat[first + at : first + at + size] = out[rank * _PIECE : rank * _PIECE + size]
    return whole


def shares_of(inputs: Sequence[Any], written: Sequence[int], cut: Sequence[int], cuts: bool) -> tuple[int, ...]:
    """Which inputs of a graph are weights in shares.

    Args:
        written: inputs that the graph writes to.
        cut: how these ranks hold such weights (:func:`cut_of`).
        cuts: whether all that can be cut has to be (:func:`cuts_weights`).

    Raises:
        UnsupportedError: they were cut for other ranks, or the graph writes to one.
        OptionError: weights shall be in shares, and some that could be cut are whole.
    """
    places = tuple(i for i, value in enumerate(inputs) if isinstance(value, ShardedWeight))
    for i in places:
        if inputs[i].cut.places != tuple(cut):
            raise UnsupportedError(
                f"a weight lies in {inputs[i].cut.count} shares on {len(inputs[i].cut.places)} ranks, and {len(cut)} "
                f"ranks compute the model with {count_of(cut)}",
                "every rank that computes has the share that the others expect there",
                "shard the weights with the options that the model is compiled with",
            )
        if i in written:
            raise UnsupportedError(
                f"the model writes to a sharded weight {list(inputs[i].shape)} while it runs",
                "each rank holds some of its rows",
                "write to it between the calls, or use options={'weights': 'whole'}",
            )
    if cuts:
        whole = [
            value
            for i, value in enumerate(inputs)
            if isinstance(value, nn.Parameter) and i not in places and not why_whole(value, count_of(cut))
        ]
        if whole:
            raise OptionError(
                f"{len(cut)} ranks shall hold weights in shares, and {len(whole)} large weights "
                f"({in_words(sum(value.numel() * value.element_size() for value in whole))}) are whole on every rank",
                "the model was loaded whole, and nobody but its owner can take its weights out of it",
                "call sfcompile.shard_weights(model) before the model is called, or fill it with "
                "sfcompile.load_sharded(model, files, options={'weights': 'sharded'})",
            )
    return places
