"""Rule for reshapes: tokens are followed by arithmetic on row-major factors (``layout.map_through_view``)."""

from __future__ import annotations

import torch
from torch import fx

from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Layout, Need, OpLayouts, map_through_view
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules.rule import Rule, Side, Spread, register_rule


class Reshape:
    """``view``, ``reshape``, ``flatten``, ``unflatten``: the local call reshapes to this rank's own sizes."""

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """Map the tokens to the other shape, if they land in one dim."""
        source, target = op.operands[0].shape, op.out_shapes[0]
        if side[0] == "out":
            mapped = map_through_view(layout, target, source)
            return [(("in", 0), mapped)] if mapped else []
        mapped = map_through_view(layout, source, target)
        return [(("out", 0), mapped)] if mapped else []

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """The layout of the output, mapped back."""
        layout = chosen.outs[0]
        mapped = map_through_view(layout, op.out_shapes[0], op.operands[0].shape) if layout else None
        return [mapped] if mapped is not None and chosen.owners.fits(mapped) else None

    def partial(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Never a sum over tokens."""
        return None

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """A reshape (a shard may lack the strides that a ``view`` wants)."""
        return local.call(torch.ops.aten.reshape.default, [operands[0], list(local.out_shapes(op, chosen)[0])], {})


@register_rule("view", "_unsafe_view", "reshape", "flatten", "unflatten", "_reshape_alias", "ravel")
def _view(op: OpView) -> Rule | None:
    if op.operands[0].node.meta["val"].dtype != op.node.meta["val"].dtype:
        return None
    return Reshape()
