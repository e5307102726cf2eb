"""Recognise attention written by hand: matmul, softmax, matmul become one ``scaled_dot_product_attention`` node.

The scores are followed back from the softmax through scalings, casts, masks (added, or filled in with numbers that no
score survives) and the subtraction of their largest, to the product of queries and keys, and forward through casts and
inactive dropout to the product with the values. Products may be matmul, bmm, baddbmm or einsum; one head of keys and
values may serve all heads of queries. Anything else on the way, or a second reader of the scores, leaves the graph as
it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
_SOFTMAX = (_aten.softmax.int, _aten._softmax.default)
_MATMUL = (_aten.matmul.default, _aten.bmm.default)
_CASTS = (_aten._to_copy.default, _aten.to.dtype, _aten.clone.default, _aten.contiguous.default, _aten.alias.default)
_FILLS = (_aten.masked_fill.Scalar, _aten.where.ScalarOther)
_NEVER = -1e9
"""A score filled in with this or less is not attended to, unless all of a query's are: then all count the same, or,
if they are -inf, the query's result is no number."""
_INSTEAD = -1e30
"""What is added in its place: beside it a score vanishes, in fp64 too, and several of them are still a number."""

_Operand = tuple[fx.Node, tuple[int, ...]]
"""A value and the order of its dims."""


@dataclass
class _Scores:
    """softmax(scale * q @ k.mT + masks): what was found walking back from the softmax.

    ``masks`` are terms to add, with a factor; with a number they are places (True) to fill in with it.
    """

    q: _Operand
    k: _Operand
    scale: float = 1.0
    masks: list[tuple[fx.Node, float, float | None]] = field(default_factory=list)


@dataclass
class _Product:
    """weights @ v: the node, the values, and the order of dims that takes its usual result to the node's."""

    node: fx.Node
    v: _Operand
    out: tuple[int, ...]


def recognise_attention(graph: fx.Graph) -> int:
    """Replace every hand-written attention in place; returns how many were found."""
    count = 0
    for node in list(graph.nodes):
        if node.target not in _SOFTMAX or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        ndim = node.meta["val"].dim()
        if ndim not in (3, 4) or int(node.args[1]) % ndim != ndim - 1:
            continue
        _drop_largest(node)
        scores, product = _walk_back(node.args[0]), _walk_forward(node)
        if scores is None or product is None or not _is_kept(scores.masks, product.node.meta["val"].dtype):
            continue
        batches = [_shape(operand)[:-2] for operand in (scores.q, scores.k, product.v)]
        single = ndim == 4 and batches[1] == batches[2] == (batches[0][0], 1)
        if single or batches[0] == batches[1] == batches[2]:
            _replace(graph, scores, product, ndim, batches[0] != batches[1])
            count += 1
    return count


def _is_kept(masks: list[tuple[fx.Node, float, float | None]], dtype: torch.dtype) -> bool:
    """Whether one mask to add means the same as these, the last first, also to queries that may see no key at all.

    Such a query weighs alike the keys that were filled in with the same number; of several numbers, and of what is
    added to them later, one mask would lose the differences. So it would beside numbers that fp16 has.
    """
    numbers = [number for _, _, number in masks]
    finite = [i for i, number in enumerate(numbers) if number is not None and number != float("-inf")]
    if len({numbers[i] for i in finite}) > 1 or (finite and None in numbers[: finite[-1]]):
        return False
    return dtype != torch.float16 or not (finite or any(_is_wider(term, dtype) for term, _, n in masks if n is None))


def _is_wider(mask: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a mask has finite numbers that are infinite in a dtype, or may have."""
    own: torch.dtype = mask.meta["val"].dtype
    return own.is_floating_point and torch.finfo(own).min < torch.finfo(dtype).min


def _drop_largest(softmax: fx.Node) -> None:
    """softmax(s - max(s)) is softmax(s), both along the last dim."""
    node: Any = softmax.args[0]
    if node.target is not _aten.sub.Tensor or len(node.users) != 1 or node.kwargs:
        return
    scores: Any = node.args[0]
    largest, ndim = node.args[1], softmax.meta["val"].dim()
    if isinstance(largest, fx.Node) and largest.target is _aten.amax.default and list(largest.users) == [node]:
        dims = [int(d) % ndim for d in largest.args[1]]  # type: ignore[union-attr, arg-type]
        if largest.args[0] is node.args[0] and dims == [ndim - 1] and largest.args[2:] == (True,):
            softmax.replace_input_with(node, scores)
            for dead in (node, largest):
                dead.graph.erase_node(dead)


def _shape(operand: _Operand) -> tuple[int, ...]:
    node, order = operand
    return tuple(int(node.meta["val"].shape[d]) for d in order)


def _whole(node: fx.Node) -> _Operand:
    return node, tuple(range(node.meta["val"].dim()))


def _flipped(node: fx.Node) -> _Operand:
    ndim = node.meta["val"].dim()
    return node, (*range(ndim - 2), ndim - 1, ndim - 2)


def _letters(node: fx.Node) -> tuple[str, str, str] | None:
    """Of an einsum of two different values: the letters of both and of the result."""
    equation = str(node.args[0]).replace(" ", "")
    values = node.args[1]
    if "." in equation or "->" not in equation or not isinstance(values, (list, tuple)) or len(values) != 2:
        return None
    left, out = equation.split("->")
    a, b = left.split(",")
    distinct = all(len(set(part)) == len(part) for part in (a, b, out))
    return (a, b, out) if distinct and values[0] is not values[1] else None


def _einsum_scores(node: fx.Node) -> tuple[_Operand, _Operand] | None:
    """Queries [batch, i, d] and keys [batch, j, d] of an einsum whose result is [batch, i, j]."""
    letters = _letters(node)
    if letters is None:
        return None
    out, values = letters[2], list(node.args[1])  # type: ignore[arg-type]
    batch, i, j = out[:-2], out[-2], out[-1]
    operands = []
    for row, other in ((i, j), (j, i)):
        side = next((s for s in (0, 1) if row in letters[s] and other not in letters[s]), None)
        if side is None:
            return None
        summed = [c for c in letters[side] if c not in (*batch, row)]
        if len(summed) != 1 or len(letters[side]) != len(out):
            return None
        operands.append((values[side], tuple(letters[side].index(c) for c in (*batch, row, summed[0]))))
    return operands[0], operands[1]


def _einsum_product(node: fx.Node, weights: fx.Node) -> _Product | None:
    """Of weights [batch, i, j] and values that hold [batch, j, d] in some order."""
    letters = _letters(node)
    if letters is None:
        return None
    values = list(node.args[1])  # type: ignore[arg-type]
    side = values.index(weights)
    w, v, out = letters[side], letters[1 - side], letters[2]
    batch, i, j = w[:-2], w[-2], w[-1]
    last = [c for c in v if c not in (*batch, j)]
    if len(last) != 1 or len(v) != len(w) or i in v or set(out) != {*batch, i, last[0]}:
        return None
    usual = (*batch, i, last[0])
    order = tuple(v.index(c) for c in (*batch, j, last[0]))
    return _Product(node, (values[1 - side], order), tuple(usual.index(c) for c in out))


def _walk_back(node: Any) -> _Scores | None:
    scale = 1.0
    masks: list[tuple[fx.Node, float, float | None]] = []
    while isinstance(node, fx.Node) and len(node.users) == 1:
        target, args = node.target, node.args
        if target in _MATMUL:
            q, k_t = args
            if not (isinstance(q, fx.Node) and isinstance(k_t, fx.Node)):
                return None
            if q.meta["val"].dim() != k_t.meta["val"].dim():
                return None
            return _Scores(_whole(q), _flipped(k_t), scale, masks)
        if target is _aten.einsum.default:
            operands = _einsum_scores(node)
            return None if operands is None else _Scores(*operands, scale, masks)
        if target is _aten.baddbmm.default:
            factors: dict[str, Any] = dict(node.kwargs)
            beta, alpha = float(factors.get("beta", 1)), float(factors.get("alpha", 1))
            if beta != 0.0:
                masks.append((args[0], beta * scale, None))  # type: ignore[arg-type]
            return _Scores(_whole(args[1]), _flipped(args[2]), scale * alpha, masks)  # type: ignore[arg-type]
        if target in (_aten.mul.Tensor, _aten.div.Tensor) and isinstance(args[1], (int, float)):
            scale *= float(args[1]) if target is _aten.mul.Tensor else 1.0 / float(args[1])
            node = args[0]
        elif target is _aten.add.Tensor and not node.kwargs:
            wide = [a for a in args if isinstance(a, fx.Node) and a.meta["val"].shape == node.meta["val"].shape]
            rest = [a for a in args if a not in wide]
            if len(wide) != 1 or len(rest) != 1 or not isinstance(rest[0], fx.Node):
                return None
            masks.append((rest[0], scale, None))
            node = wide[0]
        elif target in _FILLS:
            number = args[2]
            if not isinstance(number, (int, float)) or not number * scale <= _NEVER:
                return None
            mask, inner = (args[1], args[0]) if target is _FILLS[0] else (args[0], args[1])
            # where() fills in the places that are False
            masks.append((mask, 1.0 if target is _FILLS[0] else -1.0, float(number) * scale))  # type: ignore[arg-type]
            node = inner
        elif target in _CASTS:
            node = args[0]
        else:
            return None
    return None


def _walk_forward(node: fx.Node) -> _Product | None:
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in _MATMUL and user.args[0] is node and user.args[1] is not node:
            value: Any = user.args[1]
            ndim = node.meta["val"].dim()
            return _Product(user, _whole(value), tuple(range(ndim))) if value.meta["val"].dim() == ndim else None
        if user.target is _aten.einsum.default:
            return _einsum_product(user, node)
        if user.target in _CASTS or (user.target is _aten.dropout.default and not user.args[2]):
            node = user
        else:
            return None
    return None


def _replace(graph: fx.Graph, scores: _Scores, product: _Product, ndim: int, one_head: bool) -> None:
    end = product.node
    dtype, mode = end.meta["val"].dtype, end.meta["val"].fake_mode

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with mode, torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        for key in ("stack_trace", "nn_module_stack"):
            if key in end.meta:
                node.meta[key] = end.meta[key]
        return node

    def cast(node: fx.Node) -> fx.Node:
        return node if node.meta["val"].dtype == dtype else call(_aten._to_copy.default, node, dtype=dtype)

    def narrowed(mask: fx.Node) -> fx.Node:
        """A mask in the dtype of the product, in which no number of it becomes infinite."""
        if not _is_wider(mask, dtype):
            return cast(mask)
        never = call(_aten.eq.Scalar, mask, float("-inf"))
        numbers = cast(call(_aten.clamp.default, mask, torch.finfo(dtype).min))
        return call(_aten.masked_fill.Scalar, numbers, never, float("-inf"))

    def ordered(operand: _Operand) -> fx.Node:
        node, order = operand
        if order == tuple(range(len(order))):
            return cast(node)
        if order == (*range(len(order) - 2), len(order) - 1, len(order) - 2):
            return cast(call(_aten.transpose.int, node, -1, -2))
        return cast(call(_aten.permute.default, node, list(order)))

    with graph.inserting_before(end):
        mask: fx.Node | None = None
        for term, factor, number in reversed(scores.masks):  # in the order in which they come to the scores
            if number is None:
                added = term if factor == 1.0 else call(_aten.mul.Tensor, term, factor)
                mask = added if mask is None else call(_aten.add.Tensor, mask, added)
                continue
            places = term if factor > 0 else call(_aten.logical_not.default, term)
            before = call(_aten.zeros_like.default, places, dtype=dtype) if mask is None else narrowed(mask)
            instead = number if number == float("-inf") else max(_INSTEAD, torch.finfo(dtype).min)
            mask = call(_aten.masked_fill.Scalar, before, places, instead)
        tensors = [ordered(operand) for operand in (scores.q, scores.k, product.v)]
        while mask is not None and mask.meta["val"].dim() < 2:  # one number for each key, or one for all
            mask = call(_aten.unsqueeze.default, mask, 0)
        bias = None if mask is None else narrowed(mask)
        never = None if bias is None else call(_aten.eq.Scalar, bias, float("-inf"))
        if ndim == 3:  # [batch * heads, tokens, dim]: every row of the batch is a head of its own
            tensors = [call(_aten.unsqueeze.default, tensor, 0) for tensor in tensors]
            if bias is not None:
                bias = call(_aten.unsqueeze.default, bias, 0)
        grouped = {"enable_gqa": True} if one_head else {}
        attention = _aten.scaled_dot_product_attention.default
        out = call(attention, *tensors, bias, 0.0, False, scale=scores.scale, **grouped)
        if ndim == 3:
            out = call(_aten.squeeze.dim, out, 0)
        if never is not None:  # softmax of nothing but -inf is no number
            hidden = call(_aten.all.dim, never, -1, True)
            out = call(_aten.masked_fill.Scalar, out, hidden, float("nan"))
        if product.out != tuple(range(ndim)):
            out = call(_aten.permute.default, out, list(product.out))
    end.replace_all_uses_with(out)
    graph.erase_node(end)
