"""Rule for running sums: along tokens, ranks tell each other what their own add up to.

The running sum at a token is that of its own stretch, plus the sums of all stretches before it: numbers without a dim
of tokens, of which there are as many as ranks have stretches. Linear attention that is causal, positions that are
counted from a mask and recurrences in chunks sum like this.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Layout, Need, OpLayouts
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules.linked import Linked, Names
from sfcompile.passes.rules.rule import Rule, Side, Spread, register_rule
from sfcompile.passes.rules.windows import MAX_STRETCHES

aten = torch.ops.aten


class RunningSum:
    """``cumsum`` along ``dim``; the other dims are kept."""

    def __init__(self, ndim: int, dim: int) -> None:
        names: Names = [None if d == dim else d for d in range(ndim)]
        self._dim, self._kept = dim, Linked([names], [names])

    def _along(self, layout: Layout | None) -> bool:
        return layout is not None and layout.dim == self._dim

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """Tokens stay where they are."""
        if not self._along(layout):
            return self._kept.spread(op, space, side, layout)
        return [(("out", 0) if side[0] == "in" else ("in", 0), layout)] if layout.outer == layout.inner == 1 else []

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """The output's own tokens, if no rank has them in too many stretches."""
        out = chosen.outs[0]
        if out is None or not self._along(out):
            return self._kept.needs(op, chosen)
        most = max(len(chosen.owners.dim_runs(out, rank)) for rank in range(chosen.owners.num_ranks))
        return [out] if out.outer == out.inner == 1 and most <= MAX_STRETCHES else None

    def partial(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Never a sum over tokens alone."""
        return None

    def statistics(self, op: OpView, chosen: OpLayouts) -> int:
        """The sums of as many stretches as any rank has."""
        out = chosen.outs[0]
        if out is None or not self._along(out):
            return 0
        most = max(len(chosen.owners.dim_runs(out, rank)) for rank in range(chosen.owners.num_ranks))
        rows = math.prod(n for d, n in enumerate(op.out_shapes[0]) if d != self._dim)
        return most * rows * max(4, int(op.node.meta["val"].dtype.itemsize))

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """Every stretch by itself, and the sums of those before it."""
        out = chosen.outs[0]
        if out is None or not self._along(out):
            return self._kept.emit(op, chosen, operands, local)
        dim, dtype = self._dim, op.node.meta["val"].dtype
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        (x,) = operands
        for kind in (dtype, wide):  # as torch does it: first to the dtype that is asked for
            x = x if x.meta["val"].dtype == kind else local.call(aten._to_copy.default, [x], {"dtype": kind})
        owned = [chosen.owners.dim_runs(out, rank) for rank in range(chosen.owners.num_ranks)]
        most, at, pieces = max(map(len, owned)), 0, []
        for _, length in owned[local.rank]:
            pieces.append(local.narrow(x, dim, at, length))
            at += length
        shape = [int(n) for d, n in enumerate(x.meta["val"].shape) if d != dim]
        sums = [local.call(aten.sum.dim_IntList, [piece, [dim]], {"dtype": wide}) for piece in pieces]
        sums += [local.call(aten.new_zeros.default, [x, shape], {"dtype": wide})] * (most - len(pieces))
        everyone = local.of_all(local.call(aten.stack.default, [sums], {}))
        everyone = local.call(aten.reshape.default, [everyone, [len(owned) * most, *shape]], {})
        starts = {rank * most + j: first for rank, runs in enumerate(owned) for j, (first, _) in enumerate(runs)}
        running = []
        for (first, _), piece in zip(owned[local.rank], pieces, strict=True):
            total = local.call(aten.cumsum.default, [piece, dim], {"dtype": wide})
            # Also where nothing stands before: every rank reads what came, so that all talk in one order.
            before = sorted((place for place, start in starts.items() if start < first), key=starts.__getitem__)
            index = local.constant(torch.tensor(before, dtype=torch.int64))
            earlier = local.call(aten.index_select.default, [everyone, 0, index], {})
            earlier = local.call(aten.sum.dim_IntList, [earlier, [0]], {"dtype": wide})
            earlier = local.call(aten.unsqueeze.default, [earlier, dim], {})
            running.append(local.call(aten.add.Tensor, [total, earlier], {}))
        if not running:
            return local.empty(op, chosen, everyone)
        summed = running[0] if len(running) == 1 else local.call(aten.cat.default, [running, dim], {})
        return summed if wide == dtype else local.call(aten._to_copy.default, [summed], {"dtype": dtype})


@register_rule("cumsum")
def _cumsum(op: OpView) -> Rule | None:
    x = op.operands[0]
    return RunningSum(x.ndim, op.dim("dim", x.ndim)) if x.ndim else None
