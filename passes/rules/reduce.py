"""Rules for ops that use a dim up: products, norms, reductions, orderings. Their other dims are kept (``Linked``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sfcompile.passes.graph.layout import OpLayouts, Shape
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules.linked import FixArgs, Linked, Names, aligned
from sfcompile.passes.rules.rule import Rule, register_rule

# --------------------------------------------------------------------------- contractions


def einsum_like(op: OpView, spec: Sequence[str], out: str, fix: FixArgs | None = None) -> Linked:
    """Letters per operand and for the output; a letter missing from the output is contracted."""
    ins = [[letter if letter in out else None for letter in letters] for letters in spec]
    summed: list[Names] = [[None if letter in out else letter for letter in letters] for letters in spec]
    return Linked(ins, [list(out)], fix, summed)  # type: ignore[arg-type]


@register_rule("linear")
def _linear(op: OpView) -> Rule:
    out = list(range(len(op.out_shapes[0])))
    ins: list[Names] = [[*out[:-1], None]]
    # Tokens may be made of output features (a projection to k tokens of d features): then the weight is cut.
    ins += [[out[-1], *[None] * (operand.ndim - 1)] for operand in op.operands[1:]]
    return Linked(ins, [out])


@register_rule("matmul", "bmm", "mm", "mv", "dot", "linalg_vecdot")
def _matmul(op: OpView) -> Rule | None:
    out = op.out_shapes[0]
    a, b = op.operands[:2]
    if a.ndim < 2 or b.ndim < 2:
        return None
    rows: Names = [*aligned(a.shape[:-2], out[:-2]), len(out) - 2, None]
    columns: Names = [*aligned(b.shape[:-2], out[:-2]), None, len(out) - 1]
    summed: list[Names] = [[*[None] * (a.ndim - 1), "c"], [*[None] * (b.ndim - 2), "c", None]]
    return Linked([rows, columns], [list(range(len(out)))], None, summed)


@register_rule("addmm", "baddbmm")
def _addmm(op: OpView) -> Rule:
    out = op.out_shapes[0]
    batch = list(range(len(out) - 2))
    row, column = len(out) - 2, len(out) - 1
    return Linked(
        [aligned(op.operands[0].shape, out), [*batch, row, None], [*batch, None, column]], [list(range(len(out)))]
    )


@register_rule("outer", "ger")
def _outer(op: OpView) -> Rule:
    return Linked([[0], [1]], [[0, 1]])


@register_rule("einsum")
def _einsum(op: OpView) -> Rule | None:
    equation = str(op.args["equation"]).replace(" ", "")
    if "->" not in equation:
        return None
    left, out = equation.split("->")
    spec = left.split(",")
    if "..." in equation:
        widths = [operand.ndim - (len(part) - 3) for part, operand in zip(spec, op.operands, strict=True)]
        if any("..." not in part for part in (*spec, out)) or len(set(widths)) != 1:
            return None
        dots = "".join(chr(0x3B1 + i) for i in range(widths[0]))
        spec = [part.replace("...", dots) for part in spec]
        out = out.replace("...", dots)
    if any(len(set(part)) != len(part) for part in (*spec, out)):
        return None
    return einsum_like(op, spec, out)


# --------------------------------------------------------------------------- norms, reductions, orderings


@register_rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(op: OpView) -> Rule:
    x = op.operands[0]
    kept = x.ndim - len(op.args["normalized_shape"])
    names: Names = [*range(kept), *[None] * (x.ndim - kept)]
    ins: list[Names] = [names, *([None] * operand.ndim for operand in op.operands[1:])]
    outs: list[Names] = [list(range(x.ndim))]
    outs += [[*range(kept), *[None] * (len(shape) - kept)] for shape in op.out_shapes[1:]]
    outs[0] = names
    return Linked(ins, outs)


@register_rule("group_norm", "native_group_norm", "batch_norm", "instance_norm")
def _group_norm(op: OpView) -> Rule | None:
    if op.name == "batch_norm" and op.args["training"]:
        return None
    ins: list[Names] = [[None] * operand.ndim for operand in op.operands]
    ins[0] = [0, *[None] * (op.operands[0].ndim - 1)]
    if op.name == "native_group_norm" and any(node is not None for node in op.outputs[1:]):
        return None
    outs: list[Names] = [[0, *[None] * (len(shape) - 1)] for shape in op.out_shapes]
    return Linked(ins, outs, _fix_group_norm if op.name == "native_group_norm" else None)


def _fix_group_norm(args: list[Any], kwargs: dict[str, Any], shapes: list[Shape]) -> None:
    args[3] = shapes[0][0]


def _keep_dims(op: OpView, reduced: tuple[int, ...], keepdim: bool) -> Linked:
    x = op.operands[0]
    kept = [d for d in range(x.ndim) if d not in reduced]
    names: Names = [None if d in reduced else d for d in range(x.ndim)]
    out: Names = names if keepdim else kept
    ins: list[Names] = [names, *([None] * operand.ndim for operand in op.operands[1:])]
    return Linked(ins, [out for _ in op.out_shapes])


@register_rule("mean", "sum", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "var", "std",
               "var_mean", "std_mean", "logsumexp", "norm", "linalg_vector_norm", "median", "nansum",
               "aminmax")  # fmt: skip
def _reduce(op: OpView) -> Rule | None:
    if op.operands[1:] or "dim" not in op.args:
        return None
    reduced = op.dims("dim", op.operands[0].ndim)
    rule = _keep_dims(op, reduced, bool(op.args.get("keepdim")))
    if op.name in ("sum", "mean"):
        summed: list[Names] = [[d if d in reduced else None for d in range(op.operands[0].ndim)]]
        return (_Mean if op.name == "mean" else Linked)(rule.ins, rule.outs, None, summed)
    return rule


class _Mean(Linked):
    """A mean over tokens adds up only after each rank's mean is weighed by its share of the tokens."""

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        if any(chosen.outs):
            return super().emit(op, chosen, operands, local)
        args, kwargs = op.rebuild(operands)
        reduced = op.dims("dim", op.operands[0].ndim)
        names = {"keepdim": bool(op.args.get("keepdim")), "dtype": kwargs.get("dtype")}
        total = local.call(torch.ops.aten.sum.dim_IntList, [args[0], list(reduced)], names)
        count = math.prod(op.operands[0].shape[d] for d in reduced)
        return local.call(torch.ops.aten.div.Tensor, [total, count], {})


@register_rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "argsort", "topk",
               "kthvalue", "logcumsumexp", "glu", "_safe_softmax", "renorm", "cummax", "cummin")  # fmt: skip
def _along_dim(op: OpView) -> Rule | None:
    x = op.operands[0]
    reduced = op.dims("dim", x.ndim)
    if op.name == "renorm":
        return None
    return _keep_dims(op, reduced, op.name != "kthvalue" or bool(op.args.get("keepdim")))


@register_rule("normalize")
def _normalize(op: OpView) -> Rule:
    return _keep_dims(op, op.dims("dim", op.operands[0].ndim), True)
