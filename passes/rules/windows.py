"""Rules for ops whose output rows are each made of a few neighbouring input rows: convolutions, resampling, padding.

Along such a dim, input and output have rows of their own: other sizes, other labels. A rank that owns some output rows
asks for the stretch of the input that they are made of (a ``Window``): where owners of the two go by the same
proportion (layout.Ownership), that is its own rows and a halo of its neighbours'. A family says

* ``reads``: which input rows some output rows are made of, perhaps beyond the edges of the input;
* ``local``: the local op that makes them.

Output rows that a rank owns in several stretches (an axis cut into segments) are made stretch by stretch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import fx

from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Layout, Need, OpLayouts, Window
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules.linked import Linked, Names
from sfcompile.passes.rules.rule import Side, Spread
from sfcompile.runtime.program.intervals import Runs, places

MAX_STRETCHES = 8
"""If some rank has rows in more stretches, the op is computed whole: a halo for each would be most of the value."""


@dataclass(frozen=True)
class Stretch:
    """Output rows ``[start, stop)`` of ``dim`` on one rank; their input is rows ``[low, high)``.

    ``before`` and ``after`` are the rows that they read beyond the first and the last of the input.
    """

    dim: int
    start: int
    stop: int
    low: int
    high: int
    before: int
    after: int


@dataclass
class Windowed(ABC):
    """An op from ``operands[0]`` to an output of as many dims.

    Attributes:
        rows: the dims along which rows are made of neighbouring rows.
        others: the dims that the op keeps as they are; every other operand is needed whole.
    """

    rows: frozenset[int]
    others: Linked
    _told: set[int] = field(default_factory=set)

    @abstractmethod
    def reads(self, op: OpView, dim: int, start: int, stop: int) -> tuple[int, int]:
        """The input rows ``[first, last)`` that output rows ``[start, stop)`` are made of, perhaps beyond the edges."""

    @abstractmethod
    def local(self, op: OpView, stretch: Stretch, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """Write the op that makes a stretch; ``operands[0]`` holds its input rows and no others."""

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """Rows on one side are rows on the other, their kin (``LabelSpace.kin``) with labels of their own."""
        if side not in (("in", 0), ("out", 0)):
            return []
        if layout.dim not in self.rows:
            return self.others.spread(op, space, side, layout)
        if layout.dim in self._told or layout.outer != 1:
            return []
        self._told.add(layout.dim)
        far = ("out", 0) if side[0] == "in" else ("in", 0)
        size = (op.operands[0].shape if far[0] == "in" else op.out_shapes[0])[layout.dim]
        fresh = Layout(layout.dim, space.fresh(size))
        if not fresh.runs:
            return []
        space.kin.append((layout.runs, fresh.runs))
        return [(far, fresh)]

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """A window of the input; everything else whole."""
        out = chosen.outs[0]
        if out is None or out.dim not in self.rows:
            return self.others.needs(op, chosen) if out is not None else None
        owned = [chosen.owners.dim_runs(out, rank) for rank in range(chosen.owners.num_ranks)]
        if any(len(runs) > MAX_STRETCHES for runs in owned):
            return None
        return [Window(out.dim, tuple(self._wanted(op, out.dim, runs) for runs in owned))] + [None] * (
            len(op.operands) - 1
        )

    def _wanted(self, op: OpView, dim: int, runs: Runs) -> Runs:
        """All input rows of some output rows, ascending."""
        reads = sorted(self._clipped(op, dim, first, first + n) for first, n in runs)
        merged: list[list[int]] = []
        for low, high in reads:
            if low >= high:
                continue
            if merged and low <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], high)
            else:
                merged.append([low, high])
        return tuple((low, high - low) for low, high in merged)

    def _clipped(self, op: OpView, dim: int, start: int, stop: int) -> tuple[int, int]:
        first, last = self.reads(op, dim, start, stop)
        size = op.operands[0].shape[dim]
        return min(max(first, 0), size), min(max(last, 0), size)

    def partial(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Never a sum over tokens."""
        return None

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """Every stretch from its part of the window, one after the other."""
        out = chosen.outs[0]
        assert out is not None
        dim, owned = out.dim, chosen.owners.dim_runs(out, local.rank)
        if not owned:
            return local.empty(op, chosen, operands[0])
        if dim not in self.rows:
            return self.others.emit(op, chosen, operands, local)
        wanted = self._wanted(op, dim, owned)
        outs = []
        for start, n in owned:
            first, last = self.reads(op, dim, start, start + n)
            low, high = self._clipped(op, dim, start, start + n)
            before, after = max(0, min(last, 0) - first), max(0, last - max(first, op.operands[0].shape[dim]))
            stretch = Stretch(dim, start, start + n, low, high, before, after)
            at = places(((low, high - low),), wanted)[0][0] if high > low else 0
            outs.append(self.local(op, stretch, [local.narrow(operands[0], dim, at, high - low), *operands[1:]], local))
        return outs[0] if len(outs) == 1 else local.call(torch.ops.aten.cat.default, [outs, dim], {})


def kept(op: OpView, rows: frozenset[int], mixed: frozenset[int]) -> Linked:
    """The dims of an op that are neither rows nor mixed, under their own numbers."""
    names: Names = [None if d in rows or d in mixed else d for d in range(op.operands[0].ndim)]
    return Linked([names, *([None] * operand.ndim for operand in op.operands[1:])], [names for _ in op.out_shapes])


def arguments(op: OpView, operands: list[fx.Node]) -> dict[str, object]:
    """All arguments of the call by their names, with new operands; those left out of the call are left out."""
    args, kwargs = op.rebuild(operands)
    names = [argument.name for argument in op.node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, args, strict=False)), **kwargs}
