"""``sfcompile.load_sharded``: a model's weights from safetensors files, where no rank ever holds all of them.

The model is made on the meta device, so it holds nothing. The ranks of a machine then take turns in reading: each reads
its part of the large weights into memory that all of them map (runtime/rank/shared_weights.py). Where ranks on several
machines hold weights in shares, and ranks on GPUs, each reads its own rows. Small ones are read by every rank.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from sfcompile.device import refuse_transport, start
from sfcompile.errors import PackageError, RankMismatchError, WeightsError
from sfcompile.graph_call import refuse_sharded
from sfcompile.groups import in_group, session_for, world_size
from sfcompile.options import Options, named_options
from sfcompile.package.disk import open_regular
from sfcompile.package.tensors import Entry, find_tensors, map_open
from sfcompile.runtime.program.weight_rows import LARGE_BYTES, WeightRows, can_be_cut, count_of
from sfcompile.runtime.rank.calls import fingerprint
from sfcompile.runtime.rank.session import Session, use_session
from sfcompile.runtime.rank.sharded_weight import History
from sfcompile.runtime.rank.shared_weights import MachineCopy, lying_in, on_all, placed, share_copies
from sfcompile.runtime.wires.shared_files import failures, in_words
from sfcompile.sharded_weights import bring, cut_of, cuts_weights, gather_of, home_of, put_weight
from sfcompile.torch_logs import speak

log = logging.getLogger("sfcompile")
ModelT = TypeVar("ModelT", bound=nn.Module)
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
_SAMPLES, _SAMPLED_BYTES = 5, 64
"""Of a tensor in a file so many stretches of so many bytes are compared: every rank reads a part of the files."""
_FIX = "give the files of this model, by the names of its state_dict()"


def load_sharded(
    model: ModelT,
    files: Paths,
    *,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> ModelT:
    """Fill a model from safetensors files, where no rank ever holds all of the large weights. Collective.

    The ranks of a machine hold one copy of them; on GPUs, or where the options say so, every rank keeps a share.

    Args:
        model: on the meta device, in whole or in part. Its parameters and buffers are replaced; each has the dtype that
            it has there.
        files: a file, several, or a folder of ``*.safetensors``, which together hold every entry of the model's
            ``state_dict()`` by its name, and nothing else. Of tied weights one name is enough; several hold the same.
        options: as the model will be compiled with: ``mesh``, ``transport``, ``timeout_s`` and ``weights`` count.
        device: where this rank computes: all of the model goes there.

    Returns:
        The model. One rank alone holds all of its weights.

    Raises:
        WeightsError: the files do not fit the model, cannot be read, or there is no room; on every rank.
        RankMismatchError: ranks load other models or files.
        OptionError: weights cannot be sharded on these ranks.
    """
    home = home_of(device)
    weights = "sharded-by-machine" if home.type == "cpu" else "sharded"
    asked = in_group(Options.from_dict({"weights": weights, **named_options(options)}))
    if world_size(asked) == 1:
        with _opened(files) as sources:
            for slot in _matched(model, sources):
                slot.put(_read(slot, home))
        if home.type != "cpu":
            bring(model, home)
        return model
    session = session_for(asked)
    with session.turn(), session.guard(), use_session(session):
        session.agree("load weights", {"what follows": "the load of weights"})  # gets over an earlier failure
        refuse_transport(home, asked.transport)
        session.reconfigure(asked.transport, asked.timeout_s)
        start(home, session, asked)
        refuse_sharded(asked, home, session.topology)
        speak(session.global_rank)
        _load(model, files, session, asked, home)
        if home.type != "cpu":
            bring(model, home)
    return model


class _Source(NamedTuple):
    """A tensor of a file."""

    path: Path
    memory: mmap.mmap
    entry: Entry


class _Slot(NamedTuple):
    """A parameter or buffer of the model, all the places where it stands, and where its values are."""

    name: str
    old: torch.Tensor
    places: list[tuple[nn.Module, str]]
    source: _Source

    @property
    def nbytes(self) -> int:
        """As the model holds it."""
        return self.old.numel() * self.old.element_size()

    def put(self, value: torch.Tensor) -> torch.Tensor:
        """Stand a value in the places; what stands there now."""
        if isinstance(self.old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=self.old.requires_grad)
        for module, attribute in self.places:
            setattr(module, attribute, value)  # not past its class: an LSTM keeps a list of its weights
        return value


def _load(model: nn.Module, files: Paths, session: Session, asked: Options, home: torch.device) -> None:
    """Collective: look at the files, agree that all ranks load the same, then share.

    Args:
        home: where the weights go.
    """
    began, shares = time.perf_counter(), cuts_weights(asked, session)
    with ExitStack() as held:
        slots, problem = list[_Slot](), ""
        try:
            slots = _matched(model, held.enter_context(_opened(files)))
        except WeightsError as error:
            problem = f"{error.what}. {error.why}"
        # What one rank reads of its file stands beside what others read of theirs: it has to be one file's.
        facts = [
            (slot.name, str(slot.old.dtype), tuple(slot.old.shape), slot.source.entry, _sample(slot)) for slot in slots
        ]
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()
        everyone = session.exchange((problem, digest), "load weights")
        failed = failures([text for text, _ in everyone])
        if failed:
            raise on_all(WeightsError(failed, "no rank loads what another cannot", _FIX, rank=session.rank))
        odd = [rank for rank, (_, its) in enumerate(everyone) if its != everyone[0][1]]
        if odd:
            raise on_all(
                RankMismatchError(
                    f"rank {odd[0]} loads other weights than rank 0: other names, shapes, dtypes or files",
                    "the ranks compute one model together",
                    "give every rank the same model and the same files",
                    rank=session.rank,
                    peer=odd[0],
                )
            )
        large = [slot for slot in slots if slot.nbytes >= LARGE_BYTES]
        cut = [slot for slot in large if shares and _can_be_cut(slot, count_of(cut_of(asked, session)))]
        _read_shares(session, cut, asked, home)
        names = {slot.name for slot in cut}
        alike = [] if session.side.on_gpu else [slot for slot in large if slot.name not in names]
        share_copies(session, [_copy_of(session, slot) for slot in alike])
        names.update(slot.name for slot in alike)
        for slot in slots:
            if slot.name not in names:
                slot.put(_read(slot, home))
    sizes = [in_words(sum(slot.nbytes for slot in some)) for some in (large, cut)]
    log.info("%s of weights loaded, %s of them in shares, in %.1f s", *sizes, time.perf_counter() - began)


def _can_be_cut(slot: _Slot, ranks: int) -> bool:
    dense = torch.empty(slot.old.shape, device="meta").stride()
    return isinstance(slot.old, nn.Parameter) and can_be_cut(slot.old.shape, dense, slot.old.element_size(), ranks)


def _read_shares(session: Session, slots: Sequence[_Slot], asked: Options, home: torch.device) -> None:
    """Collective: of these weights every rank reads its own rows."""
    places, gather, held = cut_of(asked, session), gather_of(session, asked), list[torch.Tensor]()
    for slot in slots:
        cut = WeightRows(tuple(slot.old.shape), places)
        held.append(torch.empty(cut.local_shape(session.rank), dtype=slot.old.dtype, device=home))
        held[-1].copy_(_view(slot, cut.rows(session.rank)))
        slot.source.memory.madvise(mmap.MADV_DONTNEED)
    everyone = session.exchange([fingerprint([shard]) for shard in held], "load their shares of weights")
    for slot, shard, marks in zip(slots, held, zip(*everyone, strict=True), strict=True):
        history = History(gather, zlib.crc32(repr(marks).encode()))
        cut = WeightRows(tuple(slot.old.shape), places)
        put_weight(slot.places, shard, cut, session.rank, history, slot.old.requires_grad)


def _copy_of(session: Session, slot: _Slot) -> MachineCopy:
    def fill(memory: torch.Tensor) -> None:
        memory.view(slot.old.dtype).view(slot.old.shape).copy_(_view(slot))
        slot.source.memory.madvise(mmap.MADV_DONTNEED)  # what was read of the file is not this rank's any more

    def take(memory: torch.Tensor) -> None:
        placed(session, slot.put(lying_in(memory, slot.old.dtype, slot.old.shape)))

    return MachineCopy(slot.name, slot.nbytes, fill, None, take)


def _view(slot: _Slot, rows: tuple[int, int] | None = None) -> torch.Tensor:
    """A tensor as the file holds it, or some rows of it."""
    dtype, shape, start, nbytes = slot.source.entry
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    if rows is not None:
        row = nbytes // shape[0]
        start, nbytes, shape = start + rows[0] * row, (rows[1] - rows[0]) * row, [rows[1] - rows[0], *shape[1:]]
    raw = torch.frombuffer(slot.source.memory, dtype=torch.uint8, count=nbytes, offset=start)
    return (raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()).view(dtype).view(shape)


def _sample(slot: _Slot) -> int:
    """A mark of a tensor in a file: of a few stretches of a large one, as each costs a page of the file."""
    start, nbytes = slot.source.entry.start, slot.source.entry.nbytes
    if nbytes <= _SAMPLES * _SAMPLED_BYTES:
        return zlib.crc32(slot.source.memory[start : start + nbytes])
    mark = 0
    for i in range(_SAMPLES):
        at = start + i * (nbytes - _SAMPLED_BYTES) // (_SAMPLES - 1)
        mark = zlib.crc32(slot.source.memory[at : at + _SAMPLED_BYTES], mark)
    return mark


def _read(slot: _Slot, home: torch.device) -> torch.Tensor:
    """A tensor of this rank's own."""
    return torch.empty(slot.old.shape, dtype=slot.old.dtype, device=home).copy_(_view(slot))


# ---------------------------------------------------------------------- what is where


@contextmanager
def _opened(files: Paths) -> Iterator[dict[str, _Source]]:
    """Every tensor of some files, mapped until the body ends.

    Raises:
        WeightsError: one cannot be read, or two hold a tensor of one name.
    """
    sources = dict[str, _Source]()
    try:
        for path in _paths(files):
            with open_regular(path) as file:
                memory = map_open(file, path)
            for name, entry in find_tensors(memory, 0, len(memory), str(path)).items():
                if name in sources:
                    raise WeightsError(
                        f"{sources[name].path} and {path} both hold {name!r}",
                        "which of them counts is not known",
                        _FIX,
                    )
                sources[name] = _Source(path, memory, entry)
    except PackageError as error:
        raise WeightsError(error.what, error.why, error.fix) from error
    yield sources


def _paths(files: Paths) -> list[Path]:
    """Files in order; of a folder those in the format."""
    named = [Path(files)] if isinstance(files, str | os.PathLike) else [Path(file) for file in files]
    paths = []
    for path in named:
        paths += sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not paths:
        raise WeightsError(f"no safetensors files in {', '.join(map(str, named)) or 'an empty list'}", "", _FIX)
    return paths


def _matched(model: nn.Module, sources: Mapping[str, _Source]) -> list[_Slot]:
    """Every parameter and buffer of the state_dict with its values in the files.

    Raises:
        WeightsError: some are missing, unknown, of another shape or kind, or would stay without values.
    """
    slots, problems, known = list[_Slot](), list[str](), set[str]()
    for names, old, places in _standing(model):
        known.update(names)
        held = [name for name in names if name in sources]
        if not held:
            problems.append(f"{names[0]} is in none of the files")
            continue
        name, entry = held[0], sources[held[0]].entry
        problems += [
            f"{name} and {other} are one weight in the model and two in the files, which differ"
            for other in held[1:]
            if not _same(sources[name], sources[other])
        ]
        if type(old) not in (torch.Tensor, nn.Parameter):
            problems.append(f"{name} is a {type(old).__name__}")
        elif list(old.shape) != entry.shape:
            problems.append(f"{name} is {list(old.shape)} in the model and {entry.shape} in {sources[name].path.name}")
        elif _kind(old.dtype) != _kind(entry.dtype):
            problems.append(f"{name} is {old.dtype} in the model and {entry.dtype} in {sources[name].path.name}")
        else:
            slots.append(_Slot(name, old, places, sources[name]))
    problems += [f"{name} is in {sources[name].path.name} and not in the model" for name in sources.keys() - known]
    problems += [f"{name} is on the meta device and in no state_dict" for name in _never_filled(model)]
    if problems:
        shown = "; ".join(sorted(problems)[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise WeightsError(
            f"{len(problems)} of {len(known)} weights do not fit: {shown}",
            "a model with a part of its weights would compute something else",
            "give the files of this model, by the names of its state_dict(); make buffers that are in none outside of "
            "the meta device",
        )
    return slots


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    """What a cast keeps: whole numbers, broken ones or complex ones."""
    return dtype.is_floating_point, dtype.is_complex


def _same(one: _Source, other: _Source) -> bool:
    """Whether two tensors of files hold the same, byte by byte."""
    (first, at), (second, its) = ((source.memory, source.entry.start) for source in (one, other))
    if one.entry._replace(start=0) != other.entry._replace(start=0):
        return False
    size = one.entry.nbytes
    return bool(memoryview(first)[at : at + size] == memoryview(second)[its : its + size])


def _standing(model: nn.Module) -> list[tuple[list[str], torch.Tensor, list[tuple[nn.Module, str]]]]:
    """Every parameter and persistent buffer once, with its names and places."""
    standing = dict[int, tuple[list[str], torch.Tensor, list[tuple[nn.Module, str]]]]()
    for prefix, module in model.named_modules(remove_duplicate=False):
        tables = [*module._parameters.items(), *_buffers(module, persistent=True)]
        for attribute, tensor in tables:
            if tensor is not None:
                names, _, places = standing.setdefault(id(tensor), ([], tensor, []))
                names.append(f"{prefix}.{attribute}".lstrip("."))
                places.append((module, attribute))
    return list(standing.values())


def _buffers(module: nn.Module, persistent: bool) -> list[tuple[str, torch.Tensor | None]]:
    left_out = module._non_persistent_buffers_set
    return [(name, tensor) for name, tensor in module._buffers.items() if (name not in left_out) == persistent]


def _never_filled(model: nn.Module) -> list[str]:
    return [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name, tensor in _buffers(module, persistent=False)
        if tensor is not None and tensor.is_meta
    ]
