"""How large the parts of a package may be. Whatever a file claims is compared with these before it is built.

The claims that cost memory (tensors, heaps) are held against this machine's memory, all others against numbers far
above what an export writes.
"""

from __future__ import annotations

import json
import keyword
import math
import os
import re
from functools import cache
from typing import Any

import torch

from sfcompile.errors import PackageError

JSON_BYTES = 256 << 20
"""Of one member of JSON or text, inflated. The graph of a model with ten thousand calls has 3 MiB."""
INFLATED_BYTES = 1 << 30
"""Of all members that are read deflated, together."""
MEMBERS = 100_000
HEADER_BYTES = 100 << 20
"""Of a safetensors file: what its own library allows."""
DEPTH = 64
"""How deep JSON may be nested: a call's arguments, a result of dicts in lists."""
DIMS = 64
"""Of a tensor: what torch can count in its kernels."""
LIST = 1 << 20
"""Entries of one list of arguments."""
NAME = 4096
"""Characters of a name."""
SCHEDULES = 1 << 16
PARTS = 1 << 10
"""Into how many parts a rank's tokens may be cut."""
CHUNKS = 1 << 22
"""Pairs of chunks, over all ranks, that one schedule may hold: what is built and proved is of that size."""
INT = 2**63 - 1

DTYPE_OF = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not re.match(r"torch\.(q|bits|float4|u?int[1-7]$)", str(dtype))
}
"""By name: all but quantised ones, whose kernels trust what they hold."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@cache
def memory_bytes() -> int:
    """Bytes of this machine's memory, whoever uses them; asked for once."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def refused(what: str) -> PackageError:
    """The error of a package that says something impossible."""
    return PackageError(
        f"the package is damaged: {what}",
        "it was changed by hand, or another version wrote it",
        "export the model again",
    )


def fits_memory(nbytes: int, what: str) -> None:
    """Refuse a claim of so many bytes before they are allocated.

    Raises:
        PackageError: ``what`` is larger than this machine's memory.
    """
    if nbytes > memory_bytes():
        raise PackageError(
            f"{what} would have {nbytes:,} bytes, and this machine has {memory_bytes():,}",
            "the package is damaged, or made for a larger machine",
            "export the model again, or run it where there is room",
        )


def parse_json(data: bytes, what: str) -> Any:
    """JSON of bounded size, nesting and numbers.

    Raises:
        PackageError: it is none, or too large.
    """
    if len(data) > JSON_BYTES:
        raise refused(f"{what} has {len(data):,} bytes of at most {JSON_BYTES:,}")
    try:
        value = json.loads(data, parse_constant=_no_constant, parse_int=_bounded)
    except (ValueError, RecursionError) as error:
        raise refused(f"{what} is no JSON ({type(error).__name__}: {str(error)[:200]})") from error
    level, depth = [value], 0
    while level:
        if depth > DEPTH:
            raise refused(f"{what} is nested deeper than {DEPTH}")
        level = [
            inner
            for entry in level
            if isinstance(entry, (list, dict))
            for inner in (entry.values() if isinstance(entry, dict) else entry)
            if isinstance(inner, (list, dict))
        ]
        depth += 1
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _bounded(text: str) -> int:
    number = int(text) if len(text) < 21 else INT + 1
    if abs(number) > INT:
        raise ValueError(f"the number {text[:30]} has more than 63 bits")
    return number


def integer(value: Any, what: str, least: int = 0, most: int = INT) -> int:
    """
    Raises:
        PackageError: it is no integer of ``least`` to ``most``.
    """
    if type(value) is not int or not least <= value <= most:
        raise refused(f"{what} is {shown(value)}, and not an integer from {least} to {most}")
    return value


def entries(value: Any, what: str, most: int = LIST) -> list[Any]:
    """
    Raises:
        PackageError: it is no list of at most ``most`` entries.
    """
    if not isinstance(value, list) or len(value) > most:
        raise refused(f"{what} is {shown(value)}, and not a list of at most {most} entries")
    return value


def table(value: Any, what: str) -> dict[str, Any]:
    """
    Raises:
        PackageError: it is no object.
    """
    if not isinstance(value, dict):
        raise refused(f"{what} is {shown(value)}, and not an object")
    return value


def text(value: Any, what: str, most: int = NAME) -> str:
    """
    Raises:
        PackageError: it is no text of at most ``most`` characters.
    """
    if not isinstance(value, str) or len(value) > most:
        raise refused(f"{what} is {shown(value)}, and not a text of at most {most} characters")
    return value


def is_identifier(value: Any) -> bool:
    """Whether a text may stand for a value: letters, digits and ``_``, no word of Python's, no name that is its own."""
    return (
        isinstance(value, str)
        and len(value) <= NAME
        and _IDENTIFIER.fullmatch(value) is not None
        and not keyword.iskeyword(value)
        and not keyword.issoftkeyword(value)
        and not value.startswith("__")
    )


def is_key(value: Any) -> bool:
    """Whether a text may be the key of a program: letters, digits and ``_.-``."""
    return isinstance(value, str) and _KEY.fullmatch(value) is not None


def dtype_of(name: Any) -> torch.dtype:
    """The dtype of a name such as "float32".

    Raises:
        PackageError: there is none.
    """
    if not isinstance(name, str) or name not in DTYPE_OF:
        raise refused(f"torch has no dtype {shown(name)} for it")
    return DTYPE_OF[name]


def sizes(value: Any, what: str) -> list[int]:
    """The sizes of a tensor's dims.

    Raises:
        PackageError: they are none.
    """
    return [integer(size, f"a size of {what}") for size in entries(value, f"the shape of {what}", DIMS)]


def check_facts(facts: Any, what: str) -> None:
    """
    Raises:
        PackageError: they are no shape, strides and dtype (graph.py's tensor_facts) of a tensor that has room here.
    """
    facts = table(facts, what)
    shape, strides = sizes(facts.get("shape"), what), sizes(facts.get("stride"), what)
    dtype = dtype_of(facts.get("dtype"))
    if len(shape) != len(strides):
        raise refused(f"{what} has {len(shape)} dims and {len(strides)} strides")
    if 0 not in shape:
        reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        fits_memory(reach * dtype.itemsize, what)
    elif math.prod(size for size in shape if size) > INT:
        raise refused(f"{what} has the shape {shape}")


def shown(value: Any) -> str:
    """A value for an error, in at most 80 characters."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    said = repr(value)
    return said if len(said) < 80 else said[:77] + "..."
