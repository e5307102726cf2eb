"""What Triton source is put together from: indented lines, table reads, the device functions that a kernel uses."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from sfcompile.runtime.program.sites import LINE_BYTES
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, PLACE

IMPORTS = """import triton
import triton.language as tl
"""
CALLS = "from sfcompile.codegen.toolchain.nvshmem_calls import {}\n"
CLOCK = "from triton.language.extra.cuda import globaltimer\n"
GLUON = """from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
"""
_DEVICE = ("device", "device_tma")
"""Files of this folder that hold device functions."""


class Lines:
    """Source lines with a current indent."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._depth = 0

    def __call__(self, *lines: str) -> None:
        """Add lines."""
        self._lines += [f"{'    ' * self._depth}{line}" if line else "" for line in lines]

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """``head`` and what is added inside, one step deeper."""
        self(head)
        self._depth += 1
        yield
        self._depth -= 1

    @property
    def text(self) -> str:
        """The source so far, each line ended."""
        return "\n".join(self._lines) + "\n"


def columns(row: str, names: tuple[str, ...], wanted: dict[str, str], small: bool = False) -> list[str]:
    """Lines that read some columns of a table's row: variable -> column. ``small``: as int32, half the registers."""
    cast = ".to(tl.int32)" if small else ""
    return [f"{variable} = tl.load({row} + {names.index(column)}){cast}" for variable, column in wanted.items()]


TAG_BITS = 24
"""Bits of a signal below the epoch (runtime/wires/transport.py)."""
HEAP = ("address", "pe", "name")
"""A row of the table at ``heaps_ptr``, by rank of the mesh: where its segment lies in this process (0: out of reach);
its number for NVSHMEM and the address that names its segment there (the caller's own: memory is symmetric)."""


def heap_of(rank: str) -> str:
    """Address of a rank's segment in this process; 0 if it is far."""
    return f"tl.load(heaps_ptr + {len(HEAP)} * {rank})"


def line_of(index: str) -> str:
    """Bytes from the first signal (or credit) to the one of a slot (or rank)."""
    return f"{index} * {LINE_BYTES}"


def prologue() -> list[str]:
    """Lines at the head of every kernel: this rank's segment, and the bank and the signals of the epoch."""
    at = {name: f"tl.load(place_ptr + {i})" for i, name in enumerate(PLACE)}
    return [
        f"epoch = {at['epoch']}",
        f"signal = {at['signal']}",
        f"heap = {heap_of('rank')}",
        f"bank_at = {at['banks_at']} + epoch % {NUM_BANKS} * {at['bank_bytes']}",
        f"signals_at = {at['signals_at']} + epoch % {NUM_BANKS} * {at['signals_bytes']}",
        "bank = heap + bank_at",
        "signals = heap + signals_at  # a word per slot, each on a cache line of its own",
    ]


def entry_name(name: str, reach: str) -> str:
    """Name of a kernel: those that need NVSHMEM's state in their module can be told by it when they are loaded."""
    return name if reach == "peer" else f"{name}_nvshmem"


def wrapped(before: str, items: Sequence[str], after: str) -> str:
    """A list of arguments over as many lines as it needs."""
    inside = textwrap.fill(", ".join(items), 112, break_long_words=False, break_on_hyphens=False)
    return f"{before}\n{textwrap.indent(inside, '    ')}\n{after}"


@cache
def _device() -> tuple[dict[str, str], dict[str, set[str]]]:
    """Text of every device function and constant, and the names that each uses."""
    # Read, not imported: the functions become Triton's only where the generated source is run.
    from importlib.util import find_spec

    texts: dict[str, str] = {}
    uses: dict[str, set[str]] = {}
    for file_name in _DEVICE:
        spec = find_spec(f"sfcompile.codegen.kernels.{file_name}")
        assert spec is not None and spec.origin is not None
        with open(spec.origin, encoding="utf-8") as file:
            _read(file.read(), texts, uses)
    return texts, uses


def _read(source: str, texts: dict[str, str], uses: dict[str, set[str]]) -> None:
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            start = min(entry.lineno for entry in node.decorator_list)
            texts[node.name] = "\n".join(source.splitlines()[start - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            texts[node.targets[0].id] = ast.get_source_segment(source, node) or ""
        else:
            continue
        name = node.name if isinstance(node, ast.FunctionDef) else node.targets[0].id  # type: ignore[attr-defined]
        uses[name] = {entry.id for entry in ast.walk(node) if isinstance(entry, ast.Name)} - {name}


def device_functions(body: str) -> str:
    """The device functions and constants that a kernel's body needs, with what they need, in the file's order."""
    texts, uses = _device()
    needed: set[str] = set()
    todo = {entry.id for entry in ast.walk(ast.parse(body)) if isinstance(entry, ast.Name)}
    while todo:
        name = todo.pop()
        if name in texts and name not in needed:
            needed.add(name)
            todo |= uses[name]
    constants = [text for name, text in texts.items() if name in needed and not text.startswith("@")]
    functions = [text for name, text in texts.items() if name in needed and text.startswith("@")]
    return "\n".join(constants) + ("\n" if constants else "") + "".join(f"\n\n{text}\n" for text in functions)


def module(title: str, body: str, more: Iterable[str] = ()) -> str:
    """A whole generated module.

    Args:
        title: what it is, for its docstring.
        body: the kernels.
        more: other lines of the docstring.
    """
    head = inspect.cleandoc(title) + "".join(f"\n{line}" for line in more)
    device = device_functions(body)
    calls = CLOCK if "globaltimer" in device else ""
    calls += "".join(CALLS.format(name) for name in sorted(set(re.findall(r"putmem_signal_nbi_\w+", body))))
    calls += GLUON if "@gluon." in body else ""
    return f'"""{head}\n"""\n\n{IMPORTS}{chr(10) if calls else ""}{calls}\n{device}\n\n{body}'
