"""Rule for convolutions: along a spatial dim that holds tokens, or whole rows of them, a rank needs a halo of rows.

With stride ``s``, padding ``p``, dilation ``d`` and ``k`` taps, output rows ``[a, b)`` read input rows

    a s - p  ...  (b - 1) s - p + (k - 1) d

so that is the window of the input that a rank asks for: its own rows where the taps do not overlap (a patch embedding),
else also some of its neighbours'. Rows beyond the edge of the grid are zeros: the local call pads those itself.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Layout, Need, OpLayouts, Window
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules.linked import Linked, Names
from sfcompile.passes.rules.rule import Rule, Side, Spread, register_rule
from sfcompile.runtime.program.intervals import Runs


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
        return self.taps == self.stride and self.before == self.after == 0 and self.size % self.stride == 0

    def reads(self, start: int, stop: int) -> tuple[int, int]:
        """The input rows that output rows ``[start, stop)`` read, which may lie beyond the edges."""
        first = start * self.stride - self.before
        return first, (stop - 1) * self.stride - self.before + (self.taps - 1) * self.dilation + 1


class Convolution:
    """A forward convolution x [B, C, *space] with weight [D, C / groups, *taps]."""

    def __init__(self, op: OpView, axes: list[_Axis]) -> None:
        self._axes = axes
        names: Names = [0, *[None] * (op.operands[0].ndim - 1)]
        self._batch = Linked([names, *([None] * operand.ndim for operand in op.operands[1:])], [names])

    def _across(self, op: OpView, layout: Layout, inward: bool) -> Layout | None:
        """The layout on the other side of the call, where rows correspond."""
        axis, x, out = self._axes[layout.dim - 2], op.operands[0].shape, op.out_shapes[0]
        if axis.patches:
            if inward:
                return replace(layout, inner=layout.inner * axis.stride)
            return replace(layout, inner=layout.inner // axis.stride) if layout.inner % axis.stride == 0 else None
        return layout if axis.stride == 1 and x[layout.dim] == out[layout.dim] else None

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """Rows of the output are those of the input, or patches of them."""
        if side not in (("in", 0), ("out", 0)) or layout.dim == 1:
            return []
        if layout.dim == 0:
            return self._batch.spread(op, space, side, layout)
        across = self._across(op, layout, side[0] == "out")
        return [(("out", 0) if side[0] == "in" else ("in", 0), across)] if across else []

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """The same rows of the input, or a window of it; the weights whole."""
        out = chosen.outs[0]
        if out is None or out.dim == 1:
            return None
        if out.dim == 0:
            return self._batch.needs(op, chosen)
        axis, others = self._axes[out.dim - 2], [None] * (len(op.operands) - 1)
        if axis.patches:
            return [self._across(op, out, True), *others]
        if axis.taps == 1 and axis.stride == 1 and axis.before == axis.after == 0:
            return [out, *others]
        owned = [chosen.owners.dim_runs(out, rank) for rank in range(chosen.owners.num_ranks)]
        if any(len(runs) > 1 for runs in owned):
            return None  # rows in several places: their halos would be, too
        return [Window(out.dim, tuple(self._window(runs, axis) for runs in owned)), *others]

    def _window(self, runs: Runs, axis: _Axis) -> Runs:
        if not runs:
            return ()
        first, stop = axis.reads(runs[0][0], runs[0][0] + runs[0][1])
        first, stop = max(first, 0), min(stop, axis.size)
        return ((first, stop - first),) if stop > first else ()

    def partial(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Never a sum over tokens."""
        return None

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """Pad what lies beyond the edges, then convolve without padding along that dim."""
        out = chosen.outs[0]
        assert out is not None
        args, kwargs = op.rebuild(operands)
        axis = self._axes[out.dim - 2] if out.dim >= 2 else None
        owned = chosen.owners.dim_runs(out, local.rank)
        if not owned:
            shape = list(local.out_shapes(op, chosen)[0])
            return local.call(torch.ops.aten.new_zeros.default, [operands[0], shape], {})
        if axis is None or axis.patches or (axis.taps == 1 and axis.before == axis.after == 0):
            return local.call(op.node.target, args, kwargs)
        first, stop = axis.reads(owned[0][0], sum(owned[0]))
        pad = [0, 0] * (op.operands[0].ndim - out.dim)
        pad[-2:] = [max(0, -first), max(0, stop - axis.size)]
        if any(pad):
            args[0] = local.call(torch.ops.aten.constant_pad_nd.default, [args[0], pad], {})
        arguments = {**dict(zip(_arguments(op), args, strict=False)), **kwargs}
        arguments["padding"] = [0 if d == out.dim - 2 else a.before for d, a in enumerate(self._axes)]
        # padding="same" is an overload of its own
        return local.call(op.node.target.overloadpacket.default, [], arguments)  # type: ignore[union-attr]


def _arguments(op: OpView) -> list[str]:
    return [argument.name for argument in op.node.target._schema.arguments]  # type: ignore[union-attr]


def _listed(value: Any, length: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list) else [int(value)]
    return values * length if len(values) == 1 else values


@register_rule("convolution", "conv1d", "conv2d", "conv3d")
def _convolution(op: OpView) -> Rule | None:
    x, weight = op.operands[:2]
    space = x.ndim - 2
    if space < 1 or weight.ndim != x.ndim:
        return None
    if op.args.get("transposed"):
        return _batch_only(op)
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
    if any(axis.before != axis.after for axis in axes):
        return _batch_only(op)
    return Convolution(op, axes)


@register_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _batch_only(op: OpView) -> Rule:
    names: list[Hashable | None] = [0, *[None] * (op.operands[0].ndim - 1)]
    return Linked([names, *([None] * operand.ndim for operand in op.operands[1:])], [names])
