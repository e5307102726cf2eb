"""Rules for look-ups and writes by index: the dims they do not touch are kept (``Linked``)."""

from __future__ import annotations

import math

import torch

from sfcompile.passes.graph.op_view import Operand, OpView
from sfcompile.passes.rules.linked import Linked, Names, aligned
from sfcompile.passes.rules.rule import Rule, register_rule


@register_rule("embedding")
def _embedding(op: OpView) -> Rule:
    kept = list(range(op.operands[1].ndim))
    return Linked([[None, None], kept], [[*kept, None]])


@register_rule("index_select")
def _index_select(op: OpView) -> Rule:
    x = op.operands[0]
    dim = op.dim("dim", x.ndim)
    names: Names = [None if d == dim else d for d in range(x.ndim)]
    return Linked([names, [dim] * op.operands[1].ndim], [list(range(x.ndim))])


@register_rule("gather", "take_along_dim")
def _gather(op: OpView) -> Rule | None:
    x, index = op.operands[0], op.operands[1]
    if op.args["dim"] is None:
        return None
    dim = op.dim("dim", x.ndim)
    # An index narrower than the source pairs row r with source row r: such a dim cannot be cut on one side only.
    paired = [d for d in range(x.ndim) if d != dim and x.shape[d] == index.shape[d]]
    source: Names = [d if d in paired else None for d in range(x.ndim)]
    names: Names = [d if d in paired or d == dim else None for d in range(x.ndim)]
    return Linked([source, names], [names])


@register_rule("index")
def _index(op: OpView) -> Rule | None:
    x = op.operands[0]
    slots = op.args["indices"]
    used = [d for d, slot in enumerate(slots) if isinstance(slot, Operand)]
    if not used or used != list(range(used[0], used[-1] + 1)):
        return None
    if any(op.operands[i].node.meta["val"].dtype == torch.bool for i in range(1, len(op.operands))):
        return None
    width = max(op.operands[i].ndim for i in range(1, len(op.operands)))
    out_dims = len(op.out_shapes[0])
    index_out = op.out_shapes[0][used[0] : used[0] + width]
    before = list(range(used[0]))
    after = list(range(used[0] + width, out_dims))
    ins: list[Names] = [[*before, *[None] * len(used), *after]]
    for operand in op.operands[1:]:
        dims = [name if isinstance(name, int) else None for name in aligned(operand.shape, index_out)]
        ins.append([None if dim is None else dim + used[0] for dim in dims])
    if len(ins[0]) != x.ndim:
        return None
    return Linked(ins, [list(range(out_dims))])


@register_rule("one_hot")
def _one_hot(op: OpView) -> Rule | None:
    if int(op.args["num_classes"]) < 0:
        return None
    kept = list(range(op.operands[0].ndim))
    return Linked([kept], [[*kept, None]])


# --------------------------------------------------------------------------- writes


@register_rule("select_scatter")
def _select_scatter(op: OpView) -> Rule:
    ndim = op.operands[0].ndim
    dim = op.dim("dim", ndim)
    names: Names = [None if d == dim else d for d in range(ndim)]
    return Linked([names, [d for d in range(ndim) if d != dim]], [names])


@register_rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(op: OpView) -> Rule | None:
    """Written is ``self[.., index[i, j], ..]``: along another dim row ``i`` of index and source goes to row ``i``."""
    x, index = op.operands[0], op.operands[1]
    if x.ndim == 0 or any(operand.ndim != x.ndim for operand in op.operands):
        return None
    dim = op.dim("dim", x.ndim)
    alike = [all(operand.shape[d] == x.shape[d] for operand in op.operands) for d in range(x.ndim)]
    names: Names = [d if d != dim and alike[d] else None for d in range(x.ndim)]
    return Linked([names for _ in op.operands], [names]) if index.ndim else None


@register_rule("index_add", "index_copy", "index_fill", "index_reduce")
def _index_write(op: OpView) -> Rule:
    x = op.operands[0]
    dim = op.dim("dim", x.ndim)
    names: Names = [None if d == dim else d for d in range(x.ndim)]
    ins: list[Names] = [names if operand.ndim == x.ndim else [None] * operand.ndim for operand in op.operands]
    ins[1] = [None] * op.operands[1].ndim
    return Linked(ins, [names])


@register_rule("index_put", "_unsafe_index_put")
def _index_put(op: OpView) -> Rule | None:
    """Positions where a mask is true get one value, or one row of values."""
    x, slots = op.operands[0], op.args["indices"]
    masks = [slot for slot in slots if isinstance(slot, Operand)]
    values = op.args["values"]
    if len(masks) != 1 or not isinstance(slots[0], Operand) or not isinstance(values, Operand):
        return None
    mask = masks[0]
    width = x.ndim - mask.ndim
    row = values.shape[values.ndim - width :] if width else ()
    if mask.node.meta["val"].dtype != torch.bool or math.prod(values.shape) != math.prod(row):
        return None  # a value for every position
    names: Names = list(range(x.ndim))
    ins: list[Names] = [names, list(range(mask.ndim)), [None] * values.ndim]
    written = aligned(values.shape, x.shape)
    ins[2] = [name if isinstance(name, int) and name >= mask.ndim else None for name in written]
    return Linked(ins, [names])
