"""What a sharded attention asks of the ranks, read off the graph: the bridge from a node to codegen's site."""

from __future__ import annotations

import torch

from sfcompile.codegen.sites import AttentionSite
from sfcompile.passes.op_rules import Chosen
from sfcompile.passes.op_view import OpView


def attention_site(op: OpView, chosen: Chosen, dtype: torch.dtype) -> AttentionSite:
    """The site of an attention whose q, k and v are sharded over tokens (op_rules_attention.Attention.torus)."""
    q, k, v = op.operands[:3]
    layout_q, layout_k = chosen.ins[0], chosen.ins[1]
    assert layout_q is not None and layout_k is not None
    owners = chosen.owners
    everyone = range(owners.num_ranks)
    scale = op.args.get("scale")
    return AttentionSite(
        name=op.node.name,
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        dtype=dtype,
        q_positions=tuple(owners.position_runs(layout_q.runs, r) for r in everyone),
        kv_positions=tuple(owners.position_runs(layout_k.runs, r) for r in everyone),
        scale=float(scale) if scale is not None else q.shape[-1] ** -0.5,
        causal=bool(op.args.get("is_causal")),
        mask="full" if len(op.operands) > 3 else None,
    )
