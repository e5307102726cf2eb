"""Recognise attention written by hand: matmul, softmax, matmul become one ``scaled_dot_product_attention`` node.

The scores are followed back from the softmax through scalings, casts and additive masks to the product of queries and
keys, and forward through casts and inactive dropout to the product with the values. Anything else on the way, or a
second reader of the scores, leaves the graph as it is.
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


@dataclass
class _Scores:
    """softmax(scale * q @ k_t + masks): what was found walking back from the softmax."""

    q: fx.Node
    k_t: fx.Node
    scale: float = 1.0
    masks: list[tuple[fx.Node, float]] = field(default_factory=list)


def recognise_attention(graph: fx.Graph) -> int:
    """Replace every hand-written attention in place; returns how many were found."""
    found = 0
    for node in list(graph.nodes):
        if node.target not in _SOFTMAX or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        ndim = node.meta["val"].dim()
        scores = _walk_back(node.args[0]) if int(node.args[1]) % ndim == ndim - 1 else None
        product = _walk_forward(node)
        if scores is None or product is None or ndim not in (3, 4):
            continue
        _replace(graph, scores, product, ndim)
        found += 1
    return found


def _walk_back(node: Any) -> _Scores | None:
    scale = 1.0
    masks: list[tuple[fx.Node, float]] = []
    while isinstance(node, fx.Node) and len(node.users) == 1:
        target, args = node.target, node.args
        if target in _MATMUL:
            q, k_t = args
            if not (isinstance(q, fx.Node) and isinstance(k_t, fx.Node)):
                return None
            if q.meta["val"].shape[:-2] != k_t.meta["val"].shape[:-2]:
                return None
            return _Scores(q, k_t, scale, masks)
        if target is _aten.baddbmm.default:
            given: dict[str, Any] = dict(node.kwargs)
            beta, alpha = float(given.get("beta", 1)), float(given.get("alpha", 1))
            if beta != 0.0:
                masks.append((args[0], beta * scale))  # type: ignore[arg-type]
            return _Scores(args[1], args[2], scale * alpha, masks)  # type: ignore[arg-type]
        if target in (_aten.mul.Tensor, _aten.div.Tensor) and isinstance(args[1], (int, float)):
            scale *= float(args[1]) if target is _aten.mul.Tensor else 1.0 / float(args[1])
            node = args[0]
        elif target is _aten.add.Tensor and not node.kwargs:
            wide = [a for a in args if isinstance(a, fx.Node) and a.meta["val"].shape == node.meta["val"].shape]
            rest = [a for a in args if a not in wide]
            if len(wide) != 1 or len(rest) != 1 or not isinstance(rest[0], fx.Node):
                return None
            masks.append((rest[0], scale))
            node = wide[0]
        elif target in _CASTS:
            node = args[0]
        else:
            return None
    return None


def _walk_forward(node: fx.Node) -> fx.Node | None:
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in _MATMUL and user.args[0] is node and user.args[1] is not node:
            return user
        if user.target in _CASTS or (user.target is _aten.dropout.default and not user.args[2]):
            node = user
        else:
            return None
    return None


def _replace(graph: fx.Graph, scores: _Scores, product: fx.Node, ndim: int) -> None:
    dtype = product.meta["val"].dtype
    mode = product.meta["val"].fake_mode

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with mode, torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        for key in ("stack_trace", "nn_module_stack"):
            if key in product.meta:
                node.meta[key] = product.meta[key]
        return node

    def cast(node: fx.Node) -> fx.Node:
        return node if node.meta["val"].dtype == dtype else call(_aten._to_copy.default, node, dtype=dtype)

    with graph.inserting_before(product):
        key = call(_aten.transpose.int, scores.k_t, -1, -2)
        mask: fx.Node | None = None
        for term, factor in scores.masks:
            scaled = term if factor == 1.0 else call(_aten.mul.Tensor, term, factor)
            mask = scaled if mask is None else call(_aten.add.Tensor, mask, scaled)
        tensors = [cast(scores.q), cast(key), cast(product.args[1])]  # type: ignore[arg-type]
        bias = None if mask is None else cast(mask)
        if ndim == 3:  # [batch * heads, tokens, dim]: every row of the batch is a head of its own
            tensors = [call(_aten.unsqueeze.default, tensor, 0) for tensor in tensors]
            if bias is not None:
                bias = call(_aten.unsqueeze.default, bias, 0)
        out = call(_aten.scaled_dot_product_attention.default, *tensors, bias, 0.0, False, scale=scores.scale)
        if ndim == 3:
            out = call(_aten.squeeze.dim, out, 0)
    product.replace_all_uses_with(out)
    graph.erase_node(product)
