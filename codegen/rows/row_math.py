"""Rules of ops that compute: pointwise ones from their operands at the same place, norms and means from whole rows.

Every result is rounded to its node's dtype, as eager does.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sfcompile.codegen.rows.indices import Index, is_column
from sfcompile.codegen.rows.op_table import argument, broadcast, dim_of, first_of, register, shape_of
from sfcompile.codegen.rows.rows import CannotFollowError, Conditions, Place, RowText, Value, name_of


def _operand(text: RowText, node: fx.Node, operand: Any, place: Place, conditions: Conditions) -> Value:
    if isinstance(operand, fx.Node):
        return text.at(operand, broadcast(place, operand), conditions)
    if isinstance(operand, bool) or not isinstance(operand, (int, float)) or not math.isfinite(operand):
        raise CannotFollowError(node, f"operand {operand}")
    return Value(f"{float(operand)!r}" if operand >= 0 else f"({float(operand)!r})")


def _pointwise(pattern: str, *names: str) -> None:
    def op(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None or len(node.args) > 2:
            raise CannotFollowError(node, "more arguments than operands")
        operands = [_operand(text, node, value, place, conditions) for value in node.args[: pattern.count("{}")]]
        return text.rounded(text.combined(node, pattern, operands), node.meta["val"].dtype, node)

    register(*names, pointwise=True)(op)


_pointwise("{} + {}", "add.Tensor", "add.Scalar")
_pointwise("{} - {}", "sub.Tensor", "sub.Scalar")
_pointwise("{} * {}", "mul.Tensor", "mul.Scalar")
_pointwise("{} / {}", "div.Tensor", "div.Scalar")
_pointwise("-{}", "neg.default")
_pointwise("tl.rsqrt({})", "rsqrt.default")
_pointwise("tl.sqrt({})", "sqrt.default")
_pointwise("1.0 / {}", "reciprocal.default")


@register("_to_copy.default", "to.dtype", "type_as.default", pointwise=True)
def _cast(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    return text.rounded(text.at(first_of(node), place, conditions), node.meta["val"].dtype, node)


@register("square.default", "pow.Tensor_Scalar", pointwise=True)
def _power(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    power = 2 if name_of(node) == "square.default" else node.args[1]
    patterns = {2: "{0} * {0}", 0.5: "tl.sqrt({0})", -0.5: "tl.rsqrt({0})", -1: "1.0 / {0}"}
    if power not in patterns:
        raise CannotFollowError(node, f"power {power}")
    value = text.combined(node, patterns[power], [text.at(first_of(node), place, conditions)])  # type: ignore[index]
    return text.rounded(value, node.meta["val"].dtype, node)


# ---------------------------------------------------------------------- over the columns of a row


def _total(text: RowText, value: Value, size: int) -> Value:
    """The sum over a row's columns; those of the block beyond them count as 0."""
    columns = text.columns_of(size)
    block = text.full(value, value.rows, columns)
    if columns.block != size:
        block = text.emit(f"tl.where(({columns.name} < {size})[None, :], {block}, 0.0)")
    return Value(text.emit(f"tl.sum({block}, axis=1)[:, None]"), value.rows)


def _average(text: RowText, value: Value, size: int) -> Value:
    total = _total(text, value, size)
    return replace(total, name=text.emit(f"{total.name} / {float(size)}"))


def _whole_row(text: RowText, source: fx.Node, place: Place, conditions: Conditions, size: int) -> Value:
    """All columns of the row that a place is in."""
    whole = Index.of(text.columns_of(size))
    # A condition on columns does not narrow what a norm reads: it reads all of them.
    by_row = tuple(entry for entry in conditions if not any(is_column(factor) for factor, _ in entry.index.terms))
    return text.at(source, (*place[:-1], whole), by_row)


@register("mean.dim", "sum.dim_IntList")
def _mean(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    source = first_of(node)
    rank = len(shape_of(source))
    dims = [dim_of(dim, rank) for dim in argument(node, "dim") or range(rank)]
    if dims != [rank - 1]:
        raise CannotFollowError(node, f"over dims {dims}")
    size = shape_of(source)[-1]
    full = place if argument(node, "keepdim") else (*place, Index())
    row = _whole_row(text, source, full, conditions, size)
    total = _average(text, row, size) if name_of(node) == "mean.dim" else _total(text, row, size)
    return text.rounded(total, node.meta["val"].dtype, node)


@register("rms_norm.default", "layer_norm.default")
def _norm(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    source = first_of(node)
    (size,) = argument(node, "normalized_shape") if len(argument(node, "normalized_shape")) == 1 else (0,)
    if not size:
        raise CannotFollowError(node, "over several dims")
    row, here = _whole_row(text, source, place, conditions, size), text.at(source, place, conditions)
    if name_of(node) == "layer_norm.default":
        mean = _average(text, row, size)
        row, here = (text.combined(node, "{} - {}", [value, mean]) for value in (row, here))
    squares = text.combined(node, "{0} * {0}", [row])
    eps = argument(node, "eps")
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    total = _total(text, squares, size)
    scale = replace(total, name=text.emit(f"tl.rsqrt({total.name} / {float(size)} + {eps!r})"))
    value = text.combined(node, "{} * {}", [here, scale])
    for name, sign in (("weight", "*"), ("bias", "+")):
        factor = argument(node, name) if name == "weight" or name_of(node) == "layer_norm.default" else None
        if factor is not None:
            value = text.combined(node, f"{{}} {sign} {{}}", [value, text.at(factor, place[-1:], conditions)])
    return text.rounded(value, node.meta["val"].dtype, node)
