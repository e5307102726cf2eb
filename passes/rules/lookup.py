"""Rules for look-ups by index and resampling: the dims they do not touch are kept (``Linked``)."""

from __future__ import annotations

import torch

from sfcompile.passes.graph.op_view import Operand, OpView
from sfcompile.passes.rules.linked import Linked, Names, aligned
from sfcompile.passes.rules.rule import Rule, register_rule

# --------------------------------------------------------------------------- look-ups


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


# --------------------------------------------------------------------------- resampling


@register_rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
               "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
               "upsample_bicubic2d", "_adaptive_avg_pool2d", "upsample_trilinear3d", "_upsample_nearest_exact2d",
               "replication_pad1d", "replication_pad2d", "replication_pad3d", "reflection_pad1d",
               "reflection_pad2d", "pixel_shuffle", "pixel_unshuffle")  # fmt: skip
def _resample(op: OpView) -> Rule:
    x = op.operands[0]
    kept = x.ndim - {"1": 1, "2": 2, "3": 3}.get(op.name.rstrip("d")[-1:], 3)
    if op.name.startswith("pixel"):
        kept = x.ndim - 3
    names: Names = [*range(kept), *[None] * (x.ndim - kept)]
    return Linked([names], [names])
