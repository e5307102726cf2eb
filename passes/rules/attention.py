"""Rule for softmax attention.

Queries are independent of each other, so the query dim (and any batch dim) shards freely if this rank holds every key
it needs. Keys and values come in two ways:

* *torus*: q, k and v are all sharded over tokens of one axis. The op becomes a visible subgraph put / attend / collect
  and the runtime moves the chunks (``LocalGraph.attention``).
* *whole*: k and v are needed in full (cross-attention to a short text); the op runs locally on this rank's queries.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Layout, Need, OpLayouts
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import Operand, OpView
from sfcompile.passes.rules.linked import Names, aligned
from sfcompile.passes.rules.rule import Rule, Side, Spread, register_rule

Q, K, V = 0, 1, 2


class Attention:
    """``scaled_dot_product_attention``: q [..., q, d], k [..., k, d], v [..., k, e], mask broadcast to [..., q, k]."""

    def __init__(self, op: OpView) -> None:
        out = op.out_shapes[0]
        batch = out[:-2]
        self.query_dim = len(out) - 2
        self.ins: list[Names] = []
        for operand in op.operands:
            names = list(aligned(operand.shape[:-2], batch))
            if operand.index in (Q, K, V):
                names += ["q" if operand.index == Q else "k", None]
            else:
                names = list(aligned(operand.shape[:-2], batch)) if operand.ndim >= 2 else []
                tail: list[str | None] = [
                    "q" if operand.ndim >= 2 and operand.shape[-2] == out[-2] and out[-2] > 1 else None,
                    "k" if operand.shape[-1] == op.operands[K].shape[-2] and operand.shape[-1] > 1 else None,
                ]
                names += tail[-operand.ndim :] if operand.ndim < 2 else tail
            self.ins.append(names)
        self.out: Names = [*range(len(batch)), "q", None]

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """Queries tie q, the output and mask rows; keys tie k, v and mask columns; batch dims tie what has them."""
        names = self.ins[side[1]] if side[0] == "in" else self.out
        name = names[layout.dim]
        if name is None:
            return []
        size = layout.size
        sides: list[tuple[Side, Names, tuple[int, ...]]] = [
            (("in", operand.index), self.ins[operand.index], operand.shape) for operand in op.operands
        ]
        sides.append((("out", 0), self.out, op.out_shapes[0]))
        linked: Spread = []
        for other, other_names, shape in sides:
            if other != side and name in other_names:
                dim = list(other_names).index(name)
                if shape[dim] == size:
                    linked.append((other, layout.at(dim)))
        return linked

    def torus(self, op: OpView, chosen: OpLayouts) -> bool:
        """Whether q, k and v are sharded over one token axis (then chunks travel, nothing is gathered)."""
        q, k, v = (chosen.ins[i] for i in (Q, K, V))
        out = chosen.outs[0]
        if q is None or k is None or v is None or out is None:
            return False
        dims = (q.dim, k.dim, v.dim, out.dim)
        if dims != tuple(operand.ndim - 2 for operand in op.operands[:3]) + (self.query_dim,):
            return False
        if op.operands[Q].ndim != 4 or op.operands[K].ndim != 4 or op.operands[V].ndim != 4:
            return False
        if op.operands[K].shape[0] != op.operands[Q].shape[0] or float(op.args.get("dropout_p") or 0.0) > 0.0:
            return False
        kv_heads = op.operands[K].shape[1]
        # Sites know one number of K/V heads: a lone K head that is broadcast against V's many would be cut like theirs.
        if op.operands[V].shape[:2] != op.operands[K].shape[:2] or op.operands[Q].shape[1] % kv_heads:
            return False
        same_axis = chosen.owners.axis_of(q.runs) == chosen.owners.axis_of(k.runs)
        return same_axis and chosen.owners.same(k, v)

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Torus: shards of q, k, v and the whole mask. Otherwise whole keys, or matching shards of a batch dim."""
        out = chosen.outs[0]
        if out is None or float(op.args.get("dropout_p") or 0.0) > 0.0:
            return None
        name = self.out[out.dim]
        if name is None:
            return None
        if self.torus(op, chosen):
            return [out, chosen.ins[K], chosen.ins[V], *([None] * (len(op.operands) - 3))]
        if name == "q" and not out.plain and op.args.get("is_causal"):
            return None
        fewer = [n for n in (operand.shape[-3:-2] for operand in op.operands[K : V + 1]) if n not in ((), (1,))]
        if name == len(self.out) - 3 and any(n != op.out_shapes[0][-3:-2] for n in fewer):
            return None  # heads of q, of which each head of k and v serves several
        size = out.size
        needs: list[Need] = []
        for operand in op.operands:
            names = self.ins[operand.index]
            dim = list(names).index(name) if name in names else -1
            if dim >= 0 and operand.shape[dim] == size:
                needs.append(out.at(dim))
            elif operand.index == Q:
                return None
            else:
                needs.append(None)
        return needs

    def partial(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Never a sum over tokens."""
        return None

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """Torus subgraph, or the same op on this rank's queries."""
        if self.torus(op, chosen):
            return local.attention(op, chosen, operands)
        args, kwargs = op.rebuild(operands)
        out = chosen.outs[0]
        assert out is not None
        if op.args.get("is_causal") and self.out[out.dim] == "q":
            # The causal rule speaks of global positions: write this rank's rows of the mask.
            rows = chosen.owners.positions(out.runs, local.rank)
            allowed = np.arange(op.operands[K].shape[-2])[None, :] <= rows[:, None]
            names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"]
            values = {**dict(zip(names, args, strict=False)), **kwargs}
            values.update(attn_mask=local.constant(torch.from_numpy(allowed)), is_causal=False)
            return local.call(op.node.target, [values.pop(n) for n in names[:3]], values)
        return local.call(op.node.target, args, kwargs)


@register_rule("scaled_dot_product_attention")
def _attention(op: OpView) -> Rule | None:
    if any(not isinstance(op.args[name], Operand) for name in ("query", "key", "value")):
        return None
    return Attention(op)
