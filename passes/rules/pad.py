"""Rule for padding: by a constant, by copies of the edge, or by a mirror image of what lies before it.

Padding has labels of its own. Where it is a few rows at the edge of a grid they are glued to the edge
(``LabelSpace.glued``): the rank that has the edge pads, and nobody else has anything to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Layout, Need, OpLayouts
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules.index import Indexed, identity, stretch_of
from sfcompile.passes.rules.rule import Rule, Side, Spread, register_rule
from sfcompile.passes.rules.windows import Stretch, Windowed, arguments, kept

aten = torch.ops.aten


@dataclass
class _Glued(Indexed):
    """The labels along one padded dim: ``before`` of its ``length`` are padding, then ``rows`` of the input."""

    before: int = 0
    rows: int = 0

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """As of any stretch of a longer vector; what is new is glued to the edges."""
        known = layout.grain in self._fresh
        spread = super().spread(op, space, side, layout)
        if not known and layout.grain in self._fresh and self.rows:
            grain, first = layout.grain, self._fresh[layout.grain][0][0]
            edge = first + self.before * grain
            end = edge + self.rows * grain
            space.glued.append((first, edge - first, edge, grain))
            space.glued.append((end, first + self.length * grain - end, end - 1, grain))
        return spread


class Padding(Windowed):
    """``amounts``: by padded dim how many positions come before and after; fewer than none are cut off."""

    def __init__(self, op: OpView, amounts: dict[int, tuple[int, int]], mode: str, windowed: bool) -> None:
        rows = frozenset(amounts) if windowed else frozenset()
        super().__init__(rows, kept(op, rows, frozenset(amounts)))
        self._amounts = amounts
        self._mode = mode
        self._tokens = {dim: self._labels(op, dim) for dim in rows if min(amounts[dim]) >= 0}

    def _labels(self, op: OpView, dim: int) -> _Glued:
        before, rows, length = self._amounts[dim][0], op.operands[0].shape[dim], op.out_shapes[0][dim]

        def write(op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
            out = chosen.outs[0]
            assert out is not None
            owned = chosen.owners.rows(out, local.rank)
            mine = int((owned < before).sum()), int((owned >= before + rows).sum())
            return self._pad(op, operands[0], {**self._amounts, dim: mine}, local)

        cuts = {("in", 0): stretch_of(before, before + rows), ("out", 0): identity}
        return _Glued(dim, length, ("out", 0), cuts, write, None, before=before, rows=rows)

    def _pad(self, op: OpView, x: fx.Node, amounts: dict[int, tuple[int, int]], local: LocalGraph) -> fx.Node:
        """The call with other amounts; by nothing it is no call."""
        if not any(before or after for before, after in amounts.values()):
            return x
        named: dict[str, Any] = arguments(op, [x])
        name = "padding" if "padding" in named else "pad"
        pairs = [amounts.get(x.meta["val"].dim() - 1 - i, (0, 0)) for i in range(len(named[name]) // 2)]
        named[name] = [n for pair in pairs for n in pair]
        return local.call(op.node.target, [], named)

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """Tokens stay tokens, between padding; rows of more than one position are other rows."""
        if layout.dim in self._tokens and layout.outer == layout.inner == 1:
            return self._tokens[layout.dim].spread(op, space, side, layout)
        return super().spread(op, space, side, layout)

    def _as_tokens(self, chosen: OpLayouts) -> bool:
        """Whether the output's rows can be padded where they are, whoever owns them: by a constant."""
        out = chosen.outs[0]
        return self._mode == "constant" and out is not None and out.dim in self._tokens and out.outer == out.inner == 1

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """The input's own rows under the output's labels; for copies of other rows a window."""
        out = chosen.outs[0]
        if out is not None and self._as_tokens(chosen):
            return self._tokens[out.dim].needs(op, chosen)
        return super().needs(op, chosen)

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """As decided in ``needs``."""
        out = chosen.outs[0]
        if out is not None and self._as_tokens(chosen):
            return self._tokens[out.dim].emit(op, chosen, operands, local)
        return super().emit(op, chosen, operands, local)

    def _sources(self, op: OpView, dim: int) -> NDArray[np.int64]:
        """The input row of every output row; beyond the edges only of a constant."""
        before, size = self._amounts[dim][0], op.operands[0].shape[dim]
        at = np.arange(op.out_shapes[0][dim]) - before
        if self._mode == "replicate":
            return np.clip(at, 0, size - 1)
        if self._mode == "reflect":
            at = np.abs(at)
            return np.where(at >= size, 2 * (size - 1) - at, at)
        return at

    def reads(self, op: OpView, dim: int, start: int, stop: int) -> tuple[int, int]:
        """From the first source to the last."""
        sources = self._sources(op, dim)[start:stop]
        return int(sources.min()), int(sources.max()) + 1

    def local(self, op: OpView, stretch: Stretch, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """A constant around this rank's edges, or rows by index; the other dims as the call pads them."""
        dim, x = stretch.dim, operands[0]
        edges = (0, 0)
        if self._mode == "constant":
            edges = (stretch.before, stretch.after)
        else:
            sources = self._sources(op, dim)[stretch.start : stretch.stop] - stretch.low
            if not np.array_equal(sources, np.arange(stretch.high - stretch.low)):
                x = local.call(aten.index_select.default, [x, dim, local.constant(torch.from_numpy(sources))], {})
        return self._pad(op, x, {**self._amounts, dim: edges}, local)


@register_rule("constant_pad_nd", "pad", "replication_pad1d", "replication_pad2d", "replication_pad3d",
               "reflection_pad1d", "reflection_pad2d", "reflection_pad3d")  # fmt: skip
def _padding(op: OpView) -> Rule:
    x = op.operands[0]
    edges = [int(a) for a in op.args["pad" if "pad" in op.args else "padding"]]
    pairs = {x.ndim - 1 - i: (edges[2 * i], edges[2 * i + 1]) for i in range(len(edges) // 2)}
    amounts = {dim: pair for dim, pair in pairs.items() if pair != (0, 0)}
    kinds = {"pad": str(op.args.get("mode")), "constant_pad_nd": "constant"}
    mode = kinds.get(op.name) or ("replicate" if op.name.startswith("replication") else "reflect")
    return Padding(op, amounts, mode, mode in ("constant", "replicate", "reflect"))
