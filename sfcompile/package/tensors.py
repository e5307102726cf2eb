"""The safetensors format, read and written without a library: a header in JSON, then the bytes of every tensor.

Reading maps the file: nothing is copied until a kernel touches a page, and ranks of one machine share the pages. No
code runs and no pickle is opened.

The library of that name would do neither half here. It maps whole files only, and the tensors of a package lie inside a
larger one: it would copy them, on every rank. And it lays tensors on boundaries of 8 bytes, where a kernel may give
other bits than the model gave. tests/sfcompile/package/test_tensors.py holds this file against it both ways.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from sfcompile.errors import PackageError
from sfcompile.package.limits import HEADER_BYTES, integer, parse_json, sizes, table

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

ALIGN = 64
"""Kernels give the same bits wherever a tensor lies only if it lies on a boundary of so many bytes."""


def write_tensors(file: IO[bytes], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors in safetensors' format; those of a multiple of ``ALIGN`` bytes come first, so that they lie on one.

    Raises:
        PackageError: a dtype that the format does not have.
    """
    order = sorted(tensors, key=lambda name: (_nbytes(tensors[name]) % ALIGN != 0, name))
    header: dict[str, Any] = {}
    at = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise PackageError(
                f"tensor {name!r} has dtype {tensor.dtype}",
                f"safetensors holds {', '.join(str(dtype).removeprefix('torch.') for dtype in NAMES)}",
                "cast it before the model is exported",
            )
        stop = at + _nbytes(tensor)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGN)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            file.write(flat.view(torch.uint8).numpy().data)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def map_open(file: IO[bytes], path: Path) -> mmap.mmap:
    """The bytes of an open file as private memory: writes stay in this process. ``path`` is for the error.

    Raises:
        PackageError: the file is empty, or cannot be mapped.
    """
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise PackageError(f"{path} cannot be read: {error}", "", "check the path") from error


class Entry(NamedTuple):
    """A tensor of a file: ``nbytes`` bytes from ``start`` on."""

    dtype: torch.dtype
    shape: list[int]
    start: int
    nbytes: int


def read_tensors(memory: mmap.mmap, start: int, size: int, source: str) -> dict[str, torch.Tensor]:
    """The tensors of ``size`` bytes of safetensors that begin at ``start``; views of ``memory`` where aligned.

    Raises:
        PackageError: it is not safetensors; ``source`` says in the message what was read.
    """
    with _in_format(source):
        return {name: _tensor(memory, entry) for name, entry in find_tensors(memory, start, size, source).items()}


def find_tensors(memory: mmap.mmap, start: int, size: int, source: str) -> dict[str, Entry]:
    """Where the tensors lie of ``size`` bytes of safetensors that begin at ``start``.

    Raises:
        PackageError: it is not safetensors; ``source`` says in the message what was read.
    """
    with _in_format(source):
        length = int.from_bytes(memory[start : start + 8], "little")
        if size < 8 or length > min(size - 8, HEADER_BYTES):
            raise ValueError(f"a header of {length} bytes in {size}")
        header = table(parse_json(memory[start + 8 : start + 8 + length], "its header"), "its header")
        header.pop("__metadata__", None)
        data, room = start + 8 + length, size - 8 - length
        places = sorted(entry["data_offsets"] for entry in header.values())
        if any(last > first for (_, last), (first, _) in itertools.pairwise(places)):
            raise ValueError("two tensors share bytes")
        return {name: _entry(data, room, entry) for name, entry in header.items()}


@contextmanager
def _in_format(source: str) -> Iterator[None]:
    """What goes wrong in the body is the fault of what was read."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise PackageError(
            f"{source} is not in safetensors' format: {error}", "it is damaged or another kind of file", "write it anew"
        ) from error


def _entry(data: int, room: int, entry: Mapping[str, Any]) -> Entry:
    dtype, shape = DTYPES[entry["dtype"]], sizes(entry["shape"], "a tensor")
    first, last = (integer(place, "a place") for place in entry["data_offsets"])
    if not 0 <= first <= last <= room or last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{last - first} bytes at {first} for {shape} of {dtype}")
    return Entry(dtype, shape, data + first, last - first)


def _tensor(memory: mmap.mmap, entry: Entry) -> torch.Tensor:
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=entry.nbytes, offset=entry.start)
    aligned = raw if raw.data_ptr() % ALIGN == 0 else raw.clone()
    return aligned.view(entry.dtype).reshape(entry.shape)
