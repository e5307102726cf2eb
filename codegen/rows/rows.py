"""Row programs: a stretch of a graph as the text that computes rows of its result inside a kernel.

A put kernel copies rows (batch, head, token) of W columns. A row program says how to compute such a row from tensors
further up: the norm, the RoPE, the casts and the views between a projection and the put. It is made by asking for the
result at an index and following it up through the nodes: views change the index, pointwise ops ask their operands at
the same index, a norm asks for all columns of its row. What is left are loads of the *sources*, through their strides.

Numbers are fp32 in registers, and every node's result is rounded to its dtype, as eager does.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sfcompile.codegen.rows.elements import DTYPES, TRITON_TYPES, block_of
from sfcompile.codegen.rows.indices import Atom, Index, Quotient, is_column, is_mixed, parity_of

FUSED_OPTIONS: dict[str, Any] = {"maxnreg": 168}
"""Triton's options for kernels that compute rows: left alone, ptxas spills a value to get below a step of registers."""
MAX_SOURCES = 16
MAX_LINES = 160
"""Longer programs would spill registers, and are not made."""


class CannotFollowError(Exception):
    """A node that a row program has no text for, or not at the index that is asked for."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(f"{node}: {why}")
        self.node = node


@dataclass(frozen=True)
class RowProgram:
    """How to compute rows of W columns from sources; see the module.

    The text uses ``b``, ``h`` and ``row`` (int64 [LINES]: batch, head, token), ``live`` (bool [LINES]) and ``w``
    (int32 [W_BLOCK]), and the arguments.

    Attributes:
        dtype, width: of the result: "fp32", "fp16" or "bf16"; W.
        dims: by source, the dims whose strides are arguments; the last dim must have stride 1.
        kinds: by source, its dtype.
        head: lines before the loop over rows.
        lines: lines inside; ``value`` is then [LINES, W_BLOCK], fp32.
        shapes: of the sources and of the result.
        compute: the same in eager mode, from the sources.
    """

    dtype: str
    width: int
    dims: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...]
    head: tuple[str, ...]
    lines: tuple[str, ...]
    value: str
    shapes: tuple[tuple[int, ...], ...]
    compute: Callable[..., torch.Tensor] = field(compare=False, repr=False)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the kernel's arguments for the sources, in order."""
        names: list[str] = []
        for i, dims in enumerate(self.dims):
            names += [f"s{i}_ptr", *(f"s{i}_{dim}_sr" for dim in dims)]
        return tuple(names)

    @property
    def key(self) -> str:
        """The same for programs that are alike."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def bind(self, sources: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Arguments for some tensors, in the order of ``shapes``; those whose last dim has gaps are copied."""
        assert [tuple(x.shape) for x in sources] == list(self.shapes[:-1]), "a kernel would read other memory"
        arguments: dict[str, Any] = {}
        for i, (x, dims) in enumerate(zip(sources, self.dims, strict=True)):
            if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
                x = x.contiguous()
            arguments[f"s{i}_ptr"] = x
            arguments |= {f"s{i}_{dim}_sr": x.stride(dim) for dim in dims}
        return arguments


@dataclass(frozen=True)
class Value:
    """A name in the program's text: broadcastable to [LINES, block of ``columns``].

    Attributes:
        rows: whether it changes from row to row; columns: the atom along its columns, None: one column.
    """

    name: str
    rows: bool = False
    columns: Atom | None = None


@dataclass(frozen=True)
class Condition:
    """``index < bound``, or ``>=``: which part of a cat a place is in."""

    index: Index
    bound: int
    below: bool

    @staticmethod
    def of(index: Index, bound: int, below: bool) -> Condition:
        """``i // n < m`` is ``i < m * n``."""
        if len(index.terms) == 1 and index.terms[0][1] == 1 and isinstance(index.terms[0][0], Quotient):
            factor = index.terms[0][0]
            return Condition.of(factor.index, (bound - index.start) * factor.by, below)
        return Condition(index, bound, below)

    @property
    def known(self) -> bool | None:
        """What it always is, if it is."""
        low, high = self.index.range
        if high < self.bound:
            return self.below
        if low >= self.bound:
            return not self.below
        return None

    def put(self, values: Mapping[Atom, Index]) -> Condition:
        """With atoms replaced."""
        return Condition.of(self.index.put(values), self.bound, self.below)


Place = tuple[Index, ...]
Conditions = tuple[Condition, ...]


class RowText:
    """Writes a program; the ops are in row_ops.py.

    Args:
        inline: nodes that are computed here; others are sources.
    """

    def __init__(self, root: fx.Node, inline: frozenset[fx.Node], ops: Mapping[str, Any]) -> None:
        self._inline, self._ops = inline, ops
        self.sources: list[fx.Node] = []
        self.dims: dict[fx.Node, set[int]] = {}
        self.head: list[str] = []
        self.lines: list[str] = []
        self._names: dict[str, str] = {}
        self._values: dict[Any, Value] = {}
        self.root = root

    def result(self) -> Value:
        """The root's rows as text."""
        batch, heads, tokens, width = self.root.meta["val"].shape
        rows = [Index.of(Atom(name, int(n))) for name, n in zip(("b", "h", "row"), (batch, heads, tokens), strict=True)]
        w = Atom("w", int(width), block_of(int(width)))
        value = self.at(self.root, (*rows, Index.of(w)), ())
        if not value.rows or value.columns is None:
            value = Value(self.emit(f"{value.name} + tl.zeros([LINES, W_BLOCK], tl.float32)"), True, w)
        return value

    # ------------------------------------------------------------------ values

    def at(self, node: fx.Node, place: Place, conditions: Conditions) -> Value:
        """A node's value at a place, where some conditions hold (elsewhere it may be anything)."""
        key = (node, place, conditions)
        if key not in self._values:
            op = self._ops.get(name_of(node)) if node in self._inline else None
            self._values[key] = self._load(node, place, conditions) if op is None else op(self, node, place, conditions)
        return self._values[key]

    def by_parity(self, node: fx.Node, place: Place, conditions: Conditions, atom: Atom) -> Value:
        """A node's value from its even and odd columns, each asked for by itself."""
        half = atom.half()
        parts = [self.at(node, *_put(place, conditions, atom, Index.of(half) * 2 + odd)) for odd in (0, 1)]
        return self.joined(parts[0], parts[1], atom)

    def joined(self, even: Value, odd: Value, atom: Atom) -> Value:
        """Two values of half the columns, in turns."""
        rows, half = even.rows or odd.rows, atom.half()
        whole = [self.full(value, rows, half) for value in (even, odd)]
        shape = f"[{'LINES' if rows else 1}, {atom.block}]"
        return Value(self.emit(f"tl.reshape(tl.join({whole[0]}, {whole[1]}), {shape})"), rows, atom)

    def full(self, value: Value, rows: bool, columns: Atom) -> str:
        """The name of a value as a block of [LINES or 1, columns]."""
        if value.rows == rows and value.columns is not None:
            return value.name
        return self.emit(f"{value.name} + tl.zeros([{'LINES' if rows else 1}, {columns.block}], tl.float32)")

    def emit(self, text: str) -> str:
        """A name for an expression."""
        if text not in self._names:
            if len(self.lines) >= MAX_LINES:
                raise CannotFollowError(self.root, "the program gets too long")
            self._names[text] = f"t{len(self._names)}"
            self.lines.append(f"{self._names[text]} = {text}")
        return self._names[text]

    def rounded(self, value: Value, dtype: torch.dtype, node: fx.Node) -> Value:
        """An fp32 value as a node's dtype holds it."""
        if dtype not in DTYPES:
            raise CannotFollowError(node, f"{dtype} is not computed in a kernel")
        if dtype == torch.float32:
            return value
        return Value(
            self.emit(f"{value.name}.to({TRITON_TYPES[DTYPES[dtype]]}).to(tl.float32)"), value.rows, value.columns
        )

    def combined(self, node: fx.Node, text: str, values: Sequence[Value]) -> Value:
        """The expression of some values; ``text`` has a {} for each."""
        columns = {value.columns for value in values if value.columns is not None}
        if len(columns) > 1:
            raise CannotFollowError(node, "operands of different widths")
        rows = any(value.rows for value in values)
        return Value(self.emit(text.format(*(value.name for value in values))), rows, next(iter(columns), None))

    def chosen(self, node: fx.Node, condition: Condition, then: Value, otherwise: Value) -> Value:
        """``then`` where a condition holds."""
        where = Value(*self.condition(node, condition))
        return self.combined(node, "tl.where({}, {}, {})", [where, then, otherwise])

    def columns_of(self, size: int) -> Atom:
        """All columns of a row of so many."""
        width = int(self.root.meta["val"].shape[-1])
        if size == width:
            return Atom("w", size, block_of(size))
        return Atom(f"w{size}", size, block_of(size))

    # ------------------------------------------------------------------ text of indices

    def condition(self, node: fx.Node, condition: Condition) -> tuple[str, bool, Atom | None]:
        """A condition as a block, and along what it changes."""
        rows, column = self._along(node, condition.index)
        if rows and column is not None:
            raise CannotFollowError(node, "a condition on rows and columns")
        text = f"({condition.index} {'<' if condition.below else '>='} {condition.bound})"
        return f"{text}{'[None, :]' if column is not None else '[:, None]'}", rows, column

    def _along(self, node: fx.Node, *indices: Index) -> tuple[bool, Atom | None]:
        atoms = frozenset().union(*(index.atoms for index in indices))
        columns = [atom for atom in atoms if atom.block]
        if len(columns) > 1 or any(is_mixed(factor) for index in indices for factor, _ in index.terms):
            raise CannotFollowError(node, "an index over rows and columns")
        for atom in columns:
            self._define(atom)
        return any(not atom.block for atom in atoms), columns[0] if columns else None

    def _define(self, atom: Atom) -> None:
        line = f"{atom.name} = tl.arange(0, {atom.block})"
        if atom.name != "w" and line not in self.head:
            self.head.append(line)

    # ------------------------------------------------------------------ loads

    def _load(self, node: fx.Node, place: Place, conditions: Conditions) -> Value:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype not in DTYPES:
            reader = next((user for user in node.users if user in self._inline), self.root)
            raise CannotFollowError(reader, f"{node} is no tensor that a kernel loads")
        _, column = self._along(node, *place)
        if column is not None and column.size % 2 == 0 and column.block > 1:
            pair = parity_of(place)
            if pair is not None:  # both of a pair of columns are the same element, or two that lie apart
                return self.by_parity(node, place, conditions, pair)
        every_other = self._every_other(node, place)
        by_column = any(is_column(factor) for entry in conditions for factor, _ in entry.index.terms)
        if every_other is not None and not by_column:
            half, every, odd = every_other
            return self._half_of(self._loaded(node, (*place[:-1], every), conditions), half, odd)
        return self._loaded(node, place, conditions)

    def _every_other(self, node: fx.Node, place: Place) -> tuple[Atom, Index, int] | None:
        """If the last index takes every other column: the columns' half, the index that takes all, and which."""
        doubled = [(factor, times) for factor, times in place[-1].terms if is_column(factor)] if place else []
        if len(doubled) != 1 or any(atom.block for entry in place[:-1] for atom in entry.atoms):
            return None
        (half, times), odd = doubled[0], place[-1].start % 2
        if not isinstance(half, Atom) or times != 2 or not half.name.endswith("_half"):
            return None
        rest = place[-1].where(lambda factor: not is_column(factor)) + (place[-1].start - odd)
        every = rest + Index.of(half.whole())
        return (half, every, odd) if every.range[1] < int(node.meta["val"].shape[-1]) else None

    def _half_of(self, value: Value, half: Atom, odd: int) -> Value:
        """Every other column: of one load of all, which stays wide."""
        shape = f"[{'LINES' if value.rows else 1}, {half.block}, 2]"
        pair = self.emit(f"tl.split(tl.reshape({value.name}, {shape}))")
        return Value(self.emit(f"{pair}[{odd}]"), value.rows, half)

    def _loaded(self, node: fx.Node, place: Place, conditions: Conditions) -> Value:
        shape = node.meta["val"].shape
        if node not in self.sources:
            if len(self.sources) >= MAX_SOURCES:
                raise CannotFollowError(self.root, "too many sources")
            self.sources.append(node)
            self.dims[node] = {dim for dim in range(len(shape) - 1) if int(shape[dim]) > 1}
        source = f"s{self.sources.index(node)}"
        rows, column = self._along(node, *place)
        parts: dict[bool, list[str]] = {True: [], False: []}
        fixed = []
        for dim, index in enumerate(place):
            stride = "" if dim == len(place) - 1 else f" * {source}_{dim}_sr"
            for columns in (True, False):
                terms = index.where(lambda factor, wanted=columns: is_column(factor) is wanted)  # type: ignore[misc]
                if terms.terms:
                    parts[columns].append(f"({terms}){stride}" if stride else str(terms))
            if index.start:
                fixed.append(f"{index.start}{stride}")
        pointer = " + ".join([f"{source}_ptr", *fixed])
        masks: list[tuple[str, bool]] = [("live", True)] if rows else []
        if column is not None and column.block != column.size:
            masks.append((f"({column.name} < {column.size})", False))
        touched = frozenset().union(*(index.atoms for index in place))
        for entry in conditions:
            text, by_row, _ = self.condition(node, entry)
            if touched & entry.index.atoms:  # elsewhere the load could be out of bounds
                masks.append((text.rsplit("[", 1)[0], by_row))
        name = self._address(pointer, parts, masks, rows, column)
        return Value(name, rows or column is not None, column)

    def _address(
        self, pointer: str, parts: dict[bool, list[str]], masks: list[tuple[str, bool]], rows: bool, column: Atom | None
    ) -> str:
        if rows and column is not None:
            along = {True: "[:, None]", False: "[None, :]"}
            pointer += f" + ({' + '.join(parts[False])})[:, None] + ({' + '.join(parts[True])})[None, :]"
            mask = " & ".join(f"{text}{along[by_row]}" for text, by_row in masks)
            return self.emit(f"tl.load({pointer}, mask={mask}, other=0.0).to(tl.float32)")
        if column is not None:  # for every row: so that each thread reads its own columns, 16 bytes at a time
            return self.emit(self._per_row(pointer, parts[True], masks))
        offsets = "".join(f" + {part}" for part in parts[False])
        guard = f", mask={' & '.join(text for text, _ in masks)}, other=0.0" if masks else ""
        return self.emit(f"tl.load({pointer}{offsets}{guard}).to(tl.float32){'[:, None]' if rows else ''}")

    @staticmethod
    def _per_row(pointer: str, parts: Sequence[str], masks: Sequence[tuple[str, bool]]) -> str:
        mask = " & ".join(["live[:, None]", *(f"{text}[None, :]" for text, _ in masks)])
        offsets = f"({' + '.join(parts)})[None, :] + tl.zeros([LINES, 1], tl.int32)"
        return f"tl.load({pointer} + {offsets}, mask={mask}, other=0.0).to(tl.float32)"


def name_of(node: fx.Node) -> str:
    """ "add.Tensor" of an ATen call, "getitem", or "" of what is no call."""
    if node.target is operator.getitem:
        return "getitem"
    name = str(node.target)
    return name.removeprefix("aten.") if node.op == "call_function" and name.startswith("aten.") else ""


def _put(place: Place, conditions: Conditions, atom: Atom, value: Index) -> tuple[Place, Conditions]:
    values = {atom: value}
    kept = [entry.put(values) for entry in conditions]
    return tuple(entry.put(values) for entry in place), tuple(entry for entry in kept if entry.known is None)
