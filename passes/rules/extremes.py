"""Rules for the largest and the smallest over tokens, and where it stands: of what each rank has of its own.

As with sums (``partial`` in rule.py) every rank reduces its own tokens; what all have told is reduced once more. Of
equal numbers the first counts, and a number that is none above all, as torch has it in one process.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from sfcompile.passes.graph.layout import Need, OpLayouts
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules.linked import Linked, Names

aten = torch.ops.aten


def least(dtype: torch.dtype, largest: bool) -> float | int | bool:
    """What no number of a dtype is smaller than (or, if not ``largest``, larger)."""
    if dtype == torch.bool:
        return not largest
    if dtype.is_floating_point:
        return -math.inf if largest else math.inf
    return torch.iinfo(dtype).min if largest else torch.iinfo(dtype).max


class Extreme(Linked):
    """``amax``, ``amin``, ``any`` and ``all`` over tokens."""

    def __init__(self, rule: Linked, op: OpView) -> None:
        reduced = op.dims("dim", op.operands[0].ndim)
        summed: list[Names] = [[d if d in reduced else None for d in range(op.operands[0].ndim)]]
        super().__init__(rule.ins, rule.outs, None, summed)
        self._largest = op.name in ("amax", "any")

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """The same call on this rank's tokens; without any, what changes nothing."""
        (x,) = operands
        if any(chosen.outs) or 0 not in x.meta["val"].shape:
            return super().emit(op, chosen, operands, local)
        dtype = op.node.meta["val"].dtype
        nothing = least(dtype, self._largest)
        return local.call(aten.new_full.default, [x, list(op.out_shapes[0]), nothing], {"dtype": dtype})

    def combine(self, op: OpView, chosen: OpLayouts, own: fx.Node, local: LocalGraph) -> fx.Node:
        """Of what all ranks have told."""
        target = {"amax": aten.amax.default, "amin": aten.amin.default, "any": aten.any.dim, "all": aten.all.dim}
        dims = [0] if op.name in ("amax", "amin") else 0
        return local.call(target[op.name], [local.of_all(own), dims], {})


class ExtremePlace(Linked):
    """``argmax`` and ``argmin`` along the dim of tokens: ranks tell the number and the place where it stands."""

    def __init__(self, rule: Linked, op: OpView) -> None:
        ndim = op.operands[0].ndim
        self._dim, self._largest = op.dim("dim", ndim), op.name == "argmax"
        super().__init__(rule.ins, rule.outs, None, [[d if d == self._dim else None for d in range(ndim)]])

    def partial(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Tokens that fill the dim, of a dtype whose numbers fp64 has."""
        needs, dtype = super().partial(op, chosen), op.operands[0].node.meta["val"].dtype
        layout = chosen.ins[0]
        plain = layout is not None and layout.plain
        return needs if plain and dtype.is_floating_point else None

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """The number and its place among all tokens, both in fp64."""
        if any(chosen.outs):
            return super().emit(op, chosen, operands, local)
        (x,), layout, wide = operands, chosen.ins[0], {"dtype": torch.float64}
        assert layout is not None
        positions = local.owners.positions(layout.runs, local.rank)
        if not len(positions):
            shape = [1 if d == self._dim else int(n) for d, n in enumerate(op.operands[0].shape)]
            number = local.call(aten.new_full.default, [x, shape, least(torch.float64, self._largest)], wide)
            at = local.call(aten.new_full.default, [x, shape, float(layout.size)], wide)
        else:
            mine = local.call(op.node.target, [x, self._dim, True], {})
            number = local.call(
                aten._to_copy.default, [local.call(aten.gather.default, [x, self._dim, mine], {})], wide
            )
            places = local.constant(torch.from_numpy(positions).to(torch.float64))
            flat = local.call(aten.reshape.default, [mine, [-1]], {})
            flat = local.call(aten.index_select.default, [places, 0, flat], {})
            at = local.call(aten.reshape.default, [flat, [int(n) for n in mine.meta["val"].shape]], {})
        return local.call(aten.stack.default, [[number, at]], {})

    def combine(self, op: OpView, chosen: OpLayouts, own: fx.Node, local: LocalGraph) -> fx.Node:
        """The first place that holds the largest number of all, or one that is none."""
        everyone = local.of_all(own)
        numbers, places = (local.call(aten.select.int, [everyone, 1, i], {}) for i in (0, 1))
        best = local.call(aten.amax.default if self._largest else aten.amin.default, [numbers, [0], True], {})
        differs = local.call(aten.ne.Tensor, [numbers, best], {})
        none = local.call(aten.isnan.default, [numbers], {})
        other = local.call(aten.logical_and.default, [differs, local.call(aten.logical_not.default, [none], {})], {})
        behind = float(op.operands[0].shape[self._dim])
        places = local.call(aten.masked_fill.Scalar, [places, other, behind], {})
        first = local.call(
            aten._to_copy.default, [local.call(aten.amin.default, [places, [0]], {})], {"dtype": torch.int64}
        )
        return local.call(aten.reshape.default, [first, list(op.out_shapes[0])], {})
