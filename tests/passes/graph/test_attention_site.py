"""From a node to a site: shapes, positions, mask and scale."""

from __future__ import annotations

import torch
from helpers import captured
from torch.nn.functional import conv2d
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sfcompile.options import Wire
from sfcompile.passes.analyse_attention import analyse_attention
from sfcompile.passes.analyse_tokens import analyse_tokens, seeds_of
from sfcompile.passes.choose_layouts import choose_layouts
from sfcompile.passes.choose_schedules import sharded_attentions


def test_a_site_says_all_that_a_schedule_needs() -> None:
    q, kv, mask = torch.zeros(2, 6, 10, 8), torch.zeros(2, 3, 10, 8), torch.zeros(1, 1, 10, 10)

    def attend(q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = q + kv.repeat_interleave(2, 1)  # one axis for queries and keys
        return sdpa(x, kv, kv, attn_mask=mask, scale=0.5, enable_gqa=True)

    graph = captured(attend, q, kv, mask).gm.graph
    sites = analyse_attention(graph)
    tokens = analyse_tokens(graph, seeds_of(sites))
    (site,) = sharded_attentions(tokens, choose_layouts(tokens, sites, 3), sites).values()
    assert (site.batch, site.heads, site.kv_heads, site.head_dim, site.v_head_dim) == (2, 6, 3, 8, 8)
    assert site.q_positions == site.kv_positions == (((0, 4),), ((4, 3),), ((7, 3),))
    assert (site.scale, site.causal, site.mask) == (0.5, False, "full")


def test_a_wire_that_makes_nothing_smaller_is_left_out() -> None:
    x = torch.zeros(1, 4, 12, 8, dtype=torch.bfloat16)
    graph = captured(lambda x: sdpa(x, x, x), x).gm.graph
    sites = analyse_attention(graph)
    tokens = analyse_tokens(graph, seeds_of(sites))
    wire = Wire(q="bf16", k="fp8", v="fp8", o="bf16")
    (site,) = sharded_attentions(tokens, choose_layouts(tokens, sites, 2), sites, wire=wire).values()
    assert site.dtype == torch.bfloat16 and site.wire == Wire(k="fp8", v="fp8")


def test_parts_of_whole_rows() -> None:
    """Six rows of five tokens on two ranks, in two parts: two rows and one, for a convolution is sharded by rows."""

    def attend(image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = image.flatten(2).transpose(1, 2)[:, None]
        out = sdpa(x, x, x)
        return conv2d(out[:, 0].view(1, 6, 5, 4).permute(0, 3, 1, 2), weight, padding=1)

    graph = captured(attend, torch.zeros(1, 4, 6, 5), torch.zeros(8, 4, 3, 3)).gm.graph
    sites = analyse_attention(graph)
    tokens = analyse_tokens(graph, seeds_of(sites))
    layouts = choose_layouts(tokens, sites, 2)
    (whole,) = sharded_attentions(tokens, layouts, sites).values()
    assert whole.parts == 1 and whole.q_sizes == whole.kv_sizes == ()
    (cut,) = sharded_attentions(tokens, layouts, sites, 2).values()
    assert cut.parts == 2 and cut.q_sizes == cut.kv_sizes == ((10, 5), (10, 5))
