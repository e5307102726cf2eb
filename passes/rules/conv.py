"""Rules for convolutions: along a spatial dim that holds tokens, or whole rows of them, a rank needs a halo of rows.

With stride ``s``, padding ``p``, dilation ``d`` and ``k`` taps, output rows ``[a, b)`` read input rows

    a s - p  ...  (b - 1) s - p + (k - 1) d

so that is the window of the input that a rank asks for: its own rows where the taps do not overlap (a patch embedding),
else also some of its neighbours'. Rows beyond the edge of the grid are zeros: the local call pads those itself. A
transposed convolution reads the other way round: its output row ``o`` is a sum over the input rows ``i`` with
``o = i s - p + t d`` for some tap ``t``; the local call makes whole strides of rows, of which the wanted are cut out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sfcompile.passes.graph.halo import with_zeros
from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Layout, Need, OpLayouts, Window
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules.linked import Linked, Names
from sfcompile.passes.rules.rule import Rule, Side, Spread, register_rule
from sfcompile.passes.rules.windows import Stretch, Windowed, arguments


@dataclass(frozen=True)
class _Axis:
    """One spatial dim of a convolution; sizes and steps in rows."""

    taps: int
    stride: int
    before: int
    after: int
    dilation: int
    size: int

    @property
    def patches(self) -> bool:
        """Whether every input row is read by exactly one output row."""
        apart = self.reach + 1 == self.taps  # no row between taps
        return apart and self.taps == self.stride and self.before == self.after == 0 and self.size % self.stride == 0

    @property
    def reach(self) -> int:
        """Rows between the first tap and the last."""
        return (self.taps - 1) * self.dilation


class _OverSpace(Windowed):
    """What convolutions share: x [B, C, *space] with weights that every rank needs whole."""

    def __init__(self, op: OpView, axes: list[_Axis]) -> None:
        names: Names = [0, *[None] * (op.operands[0].ndim - 1)]
        batch = Linked([names, *([None] * operand.ndim for operand in op.operands[1:])], [names])
        super().__init__(frozenset(range(2, op.operands[0].ndim)), batch)
        self._axes = axes

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """A window of the input, unless a rank would make rows of padding alone: torch has no call for that."""
        needs = super().needs(op, chosen)
        if needs is not None and isinstance(needs[0], Window) and chosen.outs[0] is not None:
            owned = [chosen.owners.count(chosen.outs[0].runs, rank) for rank in range(chosen.owners.num_ranks)]
            if any(own and not wanted for own, wanted in zip(owned, needs[0].wanted, strict=True)):
                return None
        return needs


class Convolution(_OverSpace):
    """A forward convolution x [B, C, *space] with weight [D, C / groups, *taps]."""

    def _across(self, op: OpView, layout: Layout, inward: bool) -> Layout | None:
        """The layout on the other side of the call, where rows correspond."""
        axis, x, out = self._axes[layout.dim - 2], op.operands[0].shape, op.out_shapes[0]
        if axis.patches:
            if inward:
                return replace(layout, inner=layout.inner * axis.stride)
            return replace(layout, inner=layout.inner // axis.stride) if layout.inner % axis.stride == 0 else None
        return layout if axis.stride == 1 and x[layout.dim] == out[layout.dim] else None

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """Rows of the output are those of the input, or patches of them; else new ones."""
        if side in (("in", 0), ("out", 0)) and layout.dim in self.rows:
            across = self._across(op, layout, side[0] == "out")
            if across is not None:
                return [(("out", 0) if side[0] == "in" else ("in", 0), across)]
        return super().spread(op, space, side, layout)

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """The same rows of the input, or a window of it; the weights whole."""
        out = chosen.outs[0]
        if out is not None and out.dim in self.rows:
            axis, others = self._axes[out.dim - 2], [None] * (len(op.operands) - 1)
            if axis.patches:
                return [self._across(op, out, True), *others]
            if axis.taps == 1 and axis.stride == 1 and axis.before == axis.after == 0:
                return [out, *others]
        return super().needs(op, chosen)

    def reads(self, op: OpView, dim: int, start: int, stop: int) -> tuple[int, int]:
        """See the head of the file."""
        axis = self._axes[dim - 2]
        first = start * axis.stride - axis.before
        return first, (stop - 1) * axis.stride - axis.before + axis.reach + 1

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """The same call where rows correspond; else stretch by stretch."""
        out = chosen.outs[0]
        assert out is not None
        if out.dim in self.rows and chosen.ins[0] is not None and chosen.owners.count(out.runs, local.rank):
            args, kwargs = op.rebuild(operands)
            return local.call(op.node.target, args, kwargs)
        return super().emit(op, chosen, operands, local)

    def local(self, op: OpView, stretch: Stretch, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """Pad what lies beyond the edges, then convolve.

        A call can only pad both ends alike. At an edge of the grid, where one end has other ranks' rows, that makes
        some more rows than wanted, which are cut off: a few rows more to compute, but no copy of the input. An input
        that is put together here anyway has its rows of zeros put in with the rest, and nothing is computed in vain.
        """
        named: dict[str, Any] = arguments(op, operands)
        axis, length = self._axes[stretch.dim - 2], stretch.stop - stretch.start
        edges = [(axis.before, axis.after) for axis in self._axes]
        edges[stretch.dim - 2] = stretch.before, stretch.after
        cut = 0
        uneven = stretch.before != stretch.after
        zeros = with_zeros(local, named["input"], stretch.before, stretch.after) if uneven else None
        if zeros is not None:
            named["input"], edges[stretch.dim - 2] = zeros, (0, 0)
        elif (stretch.after - stretch.before) % axis.stride == 0 or stretch.before > stretch.after:
            both = max(stretch.before, stretch.after)
            edges[stretch.dim - 2], cut = (both, both), (both - stretch.before) // axis.stride
        pad = [n for before, after in reversed(edges) for n in ((before, after) if before != after else (0, 0))]
        if any(pad):
            named["input"] = local.call(torch.ops.aten.constant_pad_nd.default, [named["input"], pad], {})
        named["padding"] = [before if before == after else 0 for before, after in edges]
        # padding="same" is an overload of its own
        rows = local.call(op.node.target.overloadpacket.default, [], named)  # type: ignore[union-attr]
        return local.narrow(rows, stretch.dim, cut, length)


class TransposedConvolution(_OverSpace):
    """A transposed convolution x [B, C, *space] with weight [C, D / groups, *taps]."""

    def reads(self, op: OpView, dim: int, start: int, stop: int) -> tuple[int, int]:
        """The input rows that reach some of these output rows; beyond the edges there is nothing to read."""
        axis = self._axes[dim - 2]
        # The call makes rows from the first one's on: it must not begin behind the first wanted row.
        reached = -(-(start + axis.before - axis.reach) // axis.stride)
        first = min(max(0, min(reached, (start + axis.before) // axis.stride)), axis.size - 1)
        return first, max(first + 1, min((stop - 1 + axis.before) // axis.stride + 1, axis.size))

    def local(self, op: OpView, stretch: Stretch, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """Without padding along that dim the call makes rows from ``low * stride`` on; cut out the wanted ones."""
        axis, named = self._axes[stretch.dim - 2], arguments(op, operands)
        at = stretch.start + axis.before - stretch.low * axis.stride
        length = stretch.stop - stretch.start
        rows = (stretch.high - stretch.low - 1) * axis.stride + axis.reach + 1
        extra = _listed(op.args["output_padding"], len(self._axes))
        extra[stretch.dim - 2] = max(0, at + length - rows)  # rows that no tap reaches: the bias alone
        named["padding"] = [0 if d == stretch.dim - 2 else self._axes[d].before for d in range(len(self._axes))]
        named["output_padding"] = extra
        return local.narrow(local.call(op.node.target, [], named), stretch.dim, at, length)


def _listed(value: Any, length: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list) else [int(value)]
    return values * length if len(values) == 1 else values


@register_rule("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(op: OpView) -> Rule | None:
    x, weight = op.operands[:2]
    space = x.ndim - 2
    if space < 1 or weight.ndim != x.ndim:
        return None
    transposed = "transpose" in op.name or bool(op.args.get("transposed"))
    stride, dilation = _listed(op.args["stride"], space), _listed(op.args["dilation"], space)
    padding = op.args["padding"]
    axes = []
    for d in range(space):
        taps, reach = weight.shape[2 + d], dilation[d] * (weight.shape[2 + d] - 1)
        if padding == "same":
            before, after = reach // 2, reach - reach // 2
        else:
            before = after = 0 if padding == "valid" else _listed(padding, space)[d]
        axes.append(_Axis(taps, stride[d], before, after, dilation[d], x.shape[2 + d]))
    return TransposedConvolution(op, axes) if transposed else Convolution(op, axes)
