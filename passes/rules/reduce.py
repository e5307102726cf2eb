"""Rules for ops that use a dim up: products, reductions, orderings. Their other dims are kept (``Linked``)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import fx

from sfcompile.passes.graph.layout import OpLayouts
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules.extremes import Extreme, ExtremePlace
from sfcompile.passes.rules.linked import Linked, Names, aligned
from sfcompile.passes.rules.rule import Rule, register_rule

# --------------------------------------------------------------------------- contractions


def einsum_like(spec: Sequence[str], out: str) -> Linked:
    """Letters per operand and for the output; a letter missing from the output is contracted."""
    ins = [[letter if letter in out else None for letter in letters] for letters in spec]
    summed: list[Names] = [[None if letter in out else letter for letter in letters] for letters in spec]
    return Linked(ins, [list(out)], None, summed)  # type: ignore[arg-type]


@register_rule("linear")
def _linear(op: OpView) -> Rule:
    out = list(range(len(op.out_shapes[0])))
    ins: list[Names] = [[*out[:-1], None]]
    # Tokens may be made of output features (a projection to k tokens of d features): then the weight is cut.
    ins += [[out[-1], *[None] * (operand.ndim - 1)] for operand in op.operands[1:]]
    return Linked(ins, [out])


@register_rule("linalg_vecdot")
def _vecdot(op: OpView) -> Rule | None:
    """A product of two values of one shape, summed over a dim."""
    a, b = op.operands[:2]
    if a.shape != b.shape:
        return None
    dim = op.dim("dim", a.ndim)
    kept: Names = [None if d == dim else d for d in range(a.ndim)]
    summed: Names = ["c" if d == dim else None for d in range(a.ndim)]
    return Linked([kept, kept], [[d for d in range(a.ndim) if d != dim]], None, [summed, summed])


@register_rule("matmul", "bmm", "mm", "mv", "dot")
def _matmul(op: OpView) -> Rule | None:
    out = op.out_shapes[0]
    a, b = op.operands[:2]
    if a.ndim >= 2 and b.ndim == 1:  # tokens times a vector
        return Linked(
            [[*range(a.ndim - 1), None], [None]], [list(range(a.ndim - 1))], None,
            [[*[None] * (a.ndim - 1), "c"], ["c"]],
        )  # fmt: skip
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


@register_rule("_int_mm", "_scaled_mm")
def _quantised_mm(op: OpView) -> Rule:
    """Scales are one number, or one for each row of the left and each column of the right factor."""
    rows, columns = op.out_shapes[0]
    ins: list[Names] = [[0, None], [None, 1]]
    for operand in op.operands[2:]:
        shape, left = operand.shape, op.args.get("scale_a") is operand
        by_rows = left and shape == (rows, 1)
        by_columns = not left and operand.ndim and shape[-1] == columns and math.prod(shape) == columns
        names: list[Hashable | None] = [None] * operand.ndim
        if by_rows:
            names[0] = 0
        elif by_columns:
            names[-1] = 1
        elif left and math.prod(shape) != 1:
            ins[0] = [None, None]  # a scale for every block of rows
        elif math.prod(shape) != 1:
            ins[1] = [None, None]
        ins.append(names)
    return Linked(ins, [[0 if ins[0][0] == 0 else None, 1 if ins[1][1] == 1 else None]])


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
    return einsum_like(spec, out)


# --------------------------------------------------------------------------- reductions, orderings


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
        return _Total(rule.ins, rule.outs, None, summed)
    if op.name in ("amax", "amin", "any", "all"):
        return Extreme(rule, op)
    if op.name in ("argmax", "argmin") and op.args["dim"] is not None:
        return ExtremePlace(rule, op)
    return rule


class _Total(Linked):
    """A sum or a mean over tokens: ranks add up their own, a mean's by its share of all.

    Partial sums are fp32 or wider, as what torch adds up in: a sum of many fp16 numbers may be too large for fp16 where
    their mean, or the sum of all ranks, is not.
    """

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        if any(chosen.outs):
            return super().emit(op, chosen, operands, local)
        (x,), dtype = operands, op.node.meta["val"].dtype
        if dtype.is_floating_point and x.meta["val"].dtype != dtype:
            x = local.call(torch.ops.aten._to_copy.default, [x], {"dtype": dtype})
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        reduced = op.dims("dim", op.operands[0].ndim)
        names = {"keepdim": bool(op.args.get("keepdim")), "dtype": wide}
        total = local.call(torch.ops.aten.sum.dim_IntList, [x, list(reduced)], names)
        if op.name == "sum":
            return total
        count = math.prod(op.operands[0].shape[d] for d in reduced)
        return local.call(torch.ops.aten.div.Tensor, [total, count], {})


@register_rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumprod", "sort", "argsort", "topk",
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


@register_rule("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft", "fft_fft2", "fft_ifft2",
               "fft_rfft2", "fft_irfft2", "fft_hfft2", "fft_ihfft2", "fft_fftn", "fft_ifftn", "fft_rfftn",
               "fft_irfftn", "fft_hfftn", "fft_ihfftn", "_fft_r2c", "_fft_c2r", "_fft_c2c")  # fmt: skip
def _fourier(op: OpView) -> Rule | None:
    """Along other dims than those that are transformed."""
    x, sizes = op.operands[0], op.args.get("s")
    dims = op.dims("dim", x.ndim)
    if op.args.get("dim") is None and sizes:  # the last ones
        dims = tuple(range(x.ndim - len(sizes), x.ndim))
    names: Names = [None if d in dims else d for d in range(x.ndim)]
    return Linked([names], [names]) if len(op.operands) == 1 else None
