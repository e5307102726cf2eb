"""What a sharded attention asks of the ranks, read off the graph: the bridge from a node to codegen's site."""

from __future__ import annotations

import torch

from sfcompile.options import AS_IT_IS, Wire
from sfcompile.passes.graph.layout import Layout, OpLayouts
from sfcompile.passes.graph.op_view import OpView
from sfcompile.runtime.program.formats import smaller
from sfcompile.runtime.program.intervals import Runs, count, slice_of
from sfcompile.runtime.program.sites import AttentionSite


def attention_site(
    op: OpView, chosen: OpLayouts, dtype: torch.dtype, parts: int = 1, wire: Wire = AS_IT_IS
) -> AttentionSite:
    """The site of an attention whose q, k and v are sharded over tokens (op_rules_attention.Attention.torus).

    Args:
        parts: a rank's tokens are that many ranks' in ``chosen.owners`` (Ownership.split).
        wire: how its chunks shall travel; what that makes no smaller travels as it is.
    """
    q, k, v = op.operands[:3]
    layout_q, layout_k = chosen.ins[0], chosen.ins[1]
    assert layout_q is not None and layout_k is not None
    owners = chosen.owners
    everyone = range(owners.num_ranks // parts)

    # A layout may be of another axis than the tokens' own: rows of a grid whose tokens attend together.
    def places(layout: Layout) -> tuple[Runs, ...]:
        return tuple(
            tuple(run for j in range(parts) for run in owners.dim_runs(layout, r * parts + j)) for r in everyone
        )

    def sizes(layout: Layout) -> tuple[tuple[int, ...], ...]:
        lengths = tuple(tuple(count(owners.dim_runs(layout, r * parts + j)) for j in range(parts)) for r in everyone)
        spans = [[slice_of(sum(each), parts, j) for j in range(parts)] for each in lengths]
        even = all(each == tuple(b - a for a, b in span) for each, span in zip(lengths, spans, strict=True))
        return () if even else lengths

    scale = op.args.get("scale")
    return AttentionSite(
        name=op.node.name,
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        dtype=dtype,
        q_positions=places(layout_q),
        kv_positions=places(layout_k),
        scale=float(scale) if scale is not None else q.shape[-1] ** -0.5,
        causal=bool(op.args.get("is_causal")),
        mask="full" if len(op.operands) > 3 else None,
        parts=parts,
        q_sizes=sizes(layout_q),
        kv_sizes=sizes(layout_k),
        wire=smaller(wire, dtype, q.shape[-1], v.shape[-1]),
    )
