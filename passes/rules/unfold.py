"""Rule for ``Tensor.unfold``: windows of rows that overlap, each with a dim of its own for the rows in it."""

from __future__ import annotations

import torch
from torch import fx

from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules.linked import Linked, Names
from sfcompile.passes.rules.rule import Rule, register_rule
from sfcompile.passes.rules.windows import Stretch, Windowed


class Unfold(Windowed):
    """x [..., n, ...] -> [..., windows, ..., size]: windows of ``size`` rows, ``step`` apart."""

    def __init__(self, op: OpView) -> None:
        ndim = op.operands[0].ndim
        self._dim, self._size, self._step = op.dim("dimension", ndim), int(op.args["size"]), int(op.args["step"])
        names: Names = [None if d == self._dim else d for d in range(ndim)]
        super().__init__(frozenset([self._dim]), Linked([names], [[*names, None]]))

    def reads(self, op: OpView, dim: int, start: int, stop: int) -> tuple[int, int]:
        """From the first row of the first window to the last of the last."""
        return start * self._step, (stop - 1) * self._step + self._size

    def local(self, op: OpView, stretch: Stretch, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """The same call on those rows."""
        return local.call(torch.ops.aten.unfold.default, [operands[0], self._dim, self._size, self._step], {})


@register_rule("unfold")
def _unfold(op: OpView) -> Rule | None:
    return Unfold(op) if op.operands[0].ndim else None
