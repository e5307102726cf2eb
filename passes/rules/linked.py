"""Rules for ops that keep dims: every dim of an operand either is a dim of the output or takes no part in sharding.

Each family only says which dims are which, by giving the same name to dims that run together (as einsum letters do);
None marks a dim that the op mixes (contracted, reduced, normalised over). Sharding any named dim is then exact: run
the op on the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Layout, Need, OpLayouts, Shape
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules.rule import Rule, Side, Spread, register_rule

Names = Sequence[Hashable | None]
FixArgs = Callable[[list[Any], dict[str, Any], list[Shape]], None]


@dataclass
class Linked:
    """Dim names for every operand and output; ``fix`` edits literal sizes of the local call in place."""

    ins: list[Names]
    outs: list[Names]
    fix: FixArgs | None = None
    summed: list[Names] | None = None  # names of contracted dims, where the op is a sum of products over them

    def _sides(self, op: OpView) -> list[tuple[Side, Names, Shape]]:
        sides: list[tuple[Side, Names, Shape]] = [
            (("in", operand.index), self.ins[operand.index], operand.shape) for operand in op.operands
        ]
        sides += [(("out", j), names, op.out_shapes[j]) for j, names in enumerate(self.outs)]
        return sides

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """Every dim of the same name and size carries the same tokens."""
        names = (self.ins if side[0] == "in" else self.outs)[side[1]]
        name = names[layout.dim]
        sides = self._sides(op)
        if name is None and self.summed is not None and side[0] == "in":
            name = self.summed[side[1]][layout.dim]
            sides = [(("in", operand.index), self.summed[operand.index], operand.shape) for operand in op.operands]
        if name is None:
            return []
        size = layout.size
        linked: Spread = []
        for other, other_names, shape in sides:
            if other != side and name in other_names:
                dim = list(other_names).index(name)
                if shape[dim] == size:
                    linked.append((other, layout.at(dim)))
        return linked

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """The outputs must agree on one sharded name; operands that have the dim at full size must be cut along it."""
        name: Hashable | None = None
        model: Layout | None = None
        for names, layout, output in zip(self.outs, chosen.outs, op.outputs, strict=True):
            if output is None:
                continue  # nothing reads it
            if layout is None or names[layout.dim] is None:
                return None
            if model is None:
                name, model = names[layout.dim], layout
            elif names[layout.dim] != name or not chosen.owners.same(layout.at(0), model.at(0)):
                return None
        if model is None:
            return None
        size = model.size
        needs: list[Need] = []
        for operand in op.operands:
            names = self.ins[operand.index]
            dim = list(names).index(name) if name in names else -1
            needs.append(model.at(dim) if dim >= 0 and operand.shape[dim] == size else None)
        # The tokens must come from some operand, unless the call spells their number out itself.
        return needs if any(needs) or self.fix is not None else None

    def partial(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Needs of a local call whose results add up over the ranks: every operand cut along one contracted dim."""
        if self.summed is None:
            return None
        for operand in op.operands:
            layout = chosen.ins[operand.index]
            name = self.summed[operand.index][layout.dim] if layout is not None else None
            if layout is None or name is None:
                continue
            needs: list[Need] = []
            for other in op.operands:
                names = list(self.summed[other.index])
                if name in names and other.shape[names.index(name)] == operand.shape[layout.dim]:
                    needs.append(layout.at(names.index(name)))
                else:
                    return None
            return needs
        return None

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """The same call on the shards."""
        args, kwargs = op.rebuild(operands)
        if self.fix is not None:
            self.fix(args, kwargs, local.out_shapes(op, chosen))
        return local.call(op.node.target, args, kwargs)


def aligned(shape: Shape, out: Shape) -> Names:
    """Names of an operand broadcast from the right against ``out``; the names are the dims of ``out``."""
    offset = len(out) - len(shape)
    return [offset + d if offset + d >= 0 and size == out[offset + d] else None for d, size in enumerate(shape)]


def _broadcast(op: OpView, fix: FixArgs | None = None) -> Rule:
    out = op.out_shapes[0]
    return Linked([aligned(operand.shape, out) for operand in op.operands], [list(range(len(out)))], fix)


@register_rule("__pointwise__", "clone", "contiguous", "alias", "detach", "to", "_to_copy", "type_as", "lift_fresh",
               "lift_fresh_copy", "copy", "where", "masked_fill", "zeros_like", "ones_like", "empty_like",
               "full_like", "_conj", "conj", "resolve_conj", "resolve_neg", "view_as", "expand_as", "positive",
               "real", "imag", "fill", "isfinite", "isinf", "isnan", "bucketize", "rsub", "conj_physical", "isin",
               "__and__", "__or__", "__xor__", "float_power", "prelu", "polar", "complex", "logical_not",
               "floor_divide", "isclose", "hardswish", "log_sigmoid")  # fmt: skip
def _pointwise(op: OpView) -> Rule | None:
    if len(op.out_shapes) != 1:
        return None
    if op.name in ("view_as", "prelu", "isin"):
        return None
    if op.name == "bucketize":
        return Linked([list(range(op.operands[0].ndim)), [None]], [list(range(len(op.out_shapes[0])))])
    return _broadcast(op)


@register_rule("dropout", "alpha_dropout", "feature_dropout")
def _dropout(op: OpView) -> Rule | None:
    return None if op.args["train"] else _broadcast(op)


@register_rule("expand", "new_zeros", "new_ones", "new_full", "new_empty")
def _expand(op: OpView) -> Rule:
    def fix(args: list[Any], kwargs: dict[str, Any], shapes: list[Shape]) -> None:
        args[1] = list(shapes[0])

    rule = _broadcast(op, fix)
    if op.name != "expand" and isinstance(rule, Linked):
        rule.ins = [[None] * op.operands[0].ndim]
    return rule


# --------------------------------------------------------------------------- moving dims about


def _permuted(op: OpView, order: Sequence[int]) -> Rule:
    return Linked([list(range(op.operands[0].ndim))], [list(order)])


@register_rule("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "numpy_T", "mT", "adjoint")
def _permute(op: OpView) -> Rule | None:
    ndim = op.operands[0].ndim
    order = list(range(ndim))
    if op.name == "permute":
        order = [int(d) % ndim for d in op.args["dims"]]
    elif op.name in ("transpose", "swapaxes", "swapdims"):
        a, b = ("axis0", "axis1") if op.name == "swapaxes" else ("dim0", "dim1")
        i, j = op.dim(a, ndim), op.dim(b, ndim)
        order[i], order[j] = order[j], order[i]
    elif op.name in ("t", "numpy_T"):
        order.reverse()
    elif op.name in ("mT", "adjoint"):
        order[-2:] = order[-1], order[-2]
    else:
        source = op.args["source"] if isinstance(op.args["source"], list) else [op.args["source"]]
        target = op.args["destination"] if isinstance(op.args["destination"], list) else [op.args["destination"]]
        places = {int(t) % ndim: int(s) % ndim for s, t in zip(source, target, strict=True)}
        rest = iter(d for d in range(ndim) if d not in places.values())
        order = [places[d] if d in places else next(rest) for d in range(ndim)]
    return _permuted(op, order)


@register_rule("unsqueeze")
def _unsqueeze(op: OpView) -> Rule:
    ndim = op.operands[0].ndim
    names: list[Hashable | None] = list(range(ndim))
    out = list(names)
    out.insert(op.dim("dim", ndim + 1), None)
    return Linked([names], [out])


@register_rule("squeeze")
def _squeeze(op: OpView) -> Rule:
    x = op.operands[0]
    named = op.args.get("dim", range(x.ndim))  # an empty list drops nothing
    asked = [int(d) % max(x.ndim, 1) for d in ([named] if isinstance(named, int) else named)]
    dropped = [d for d in asked if x.shape[d] == 1]
    out = [d for d in range(x.ndim) if d not in dropped]
    names: Names = [None if d in dropped else d for d in range(x.ndim)]
    return _Squeeze([names], [out], dropped)


class _Squeeze(Linked):
    """Squeeze drops what is 1 globally, never a token dim whose shard happens to be 1 long."""

    def __init__(self, ins: list[Names], outs: list[Names], dropped: list[int]) -> None:
        super().__init__(ins, outs)
        self._dropped = dropped

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        return local.call(torch.ops.aten.squeeze.dims, [operands[0], self._dropped], {})


@register_rule("select")
def _select(op: OpView) -> Rule:
    ndim = op.operands[0].ndim
    names: list[Hashable | None] = list(range(ndim))
    picked = op.dim("dim", ndim)
    out = [d for d in range(ndim) if d != picked]
    names[picked] = None
    return _Select([names], [out], None, [[d if d == picked else None for d in range(ndim)]])


class _Select(Linked):
    """One token, which its owner tells."""

    def partial(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Of a dim that holds the tokens and nothing else."""
        layout = chosen.ins[0]
        return super().partial(op, chosen) if layout is not None and layout.plain else None

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """The same call; of the picked dim this rank's own row, or zeros."""
        if any(chosen.outs):
            return super().emit(op, chosen, operands, local)
        layout, (x,), (dim, picked) = chosen.ins[0], operands, self._picked(op)
        assert layout is not None
        mine = [int(at) for at in local.owners.positions(layout.runs, local.rank)]
        if picked in mine:
            return local.call(torch.ops.aten.select.int, [x, dim, mine.index(picked)], {})
        return local.call(torch.ops.aten.new_zeros.default, [x, list(op.out_shapes[0])], {})

    def combine(self, op: OpView, chosen: OpLayouts, own: fx.Node, local: LocalGraph) -> fx.Node:
        """What the row's owner has told."""
        layout = chosen.ins[0]
        assert layout is not None
        owner = int(local.owners.vector(layout.runs)[self._picked(op)[1]])
        return local.call(torch.ops.aten.select.int, [local.of_all(own), 0, owner], {})

    def _picked(self, op: OpView) -> tuple[int, int]:
        dim = op.dim("dim", op.operands[0].ndim)
        return dim, int(op.args["index"]) % op.operands[0].shape[dim]


@register_rule("unbind")
def _unbind(op: OpView) -> Rule:
    ndim = op.operands[0].ndim
    picked = op.dim("dim", ndim)
    names: Names = [None if d == picked else d for d in range(ndim)]
    out = [d for d in range(ndim) if d != picked]
    return Linked([names], [out for _ in op.out_shapes])


@register_rule("stack")
def _stack(op: OpView) -> Rule:
    ndim = op.operands[0].ndim
    out: list[Hashable | None] = list(range(ndim))
    out.insert(op.dim("dim", ndim + 1), None)
    return Linked([list(range(ndim)) for _ in op.operands], [out])


@register_rule("meshgrid")
def _meshgrid(op: OpView) -> Rule | None:
    if any(operand.ndim != 1 for operand in op.operands):
        return None
    out: list[Hashable | None] = list(range(len(op.operands)))
    if op.args.get("indexing") == "xy" and len(out) > 1:
        out[0], out[1] = 1, 0
    return Linked([[i] for i in range(len(op.operands))], [out for _ in op.out_shapes])


@register_rule("view_as_complex")
def _view_as_complex(op: OpView) -> Rule:
    kept = list(range(op.operands[0].ndim - 1))
    return Linked([[*kept, None]], [kept])


@register_rule("view_as_real")
def _view_as_real(op: OpView) -> Rule:
    kept = list(range(op.operands[0].ndim))
    return Linked([kept], [[*kept, None]])
