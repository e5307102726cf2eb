from __future__ import annotations

import torch
from graph_text import parse
from helpers import captured
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sfcompile.passes.analyse_attention import analyse_attention
from sfcompile.passes.analyse_tokens import analyse_tokens, seeds_of
from sfcompile.passes.choose_layouts import choose_layouts
from sfcompile.passes.state import Layouts


def chosen(fn: object, *args: torch.Tensor) -> tuple[Layouts, list[torch.fx.Node]]:
    got = captured(fn, *args)  # type: ignore[arg-type]
    sites = analyse_attention(got.gm.graph)
    tokens = analyse_tokens(got.gm.graph, seeds_of(sites))
    return choose_layouts(tokens, sites, 3), [n for n in got.gm.graph.nodes if n.op == "placeholder"]


def test_a_mask_over_two_token_dims_is_cut_along_one() -> None:
    layouts, (x, mask) = chosen(
        lambda x, m: sdpa(x * 2, x, x, attn_mask=m + 1), torch.zeros(1, 2, 7, 4), torch.zeros(7, 7)
    )
    assert layouts.chosen[x].dim == 2
    assert layouts.chosen[mask].dim == 0


def test_the_axis_with_more_attention_work_wins() -> None:
    def frames_and_space(x: torch.Tensor) -> torch.Tensor:
        space = x.flatten(0, 1).unsqueeze(1)
        space = sdpa(space, space, space).squeeze(1).unflatten(0, (2, 3))
        frames = space.transpose(1, 2).flatten(0, 1).unsqueeze(1)
        return sdpa(frames, frames, frames)

    layouts, (x,) = chosen(frames_and_space, torch.zeros(2, 3, 20, 4))
    assert layouts.chosen[x].dim == 2, "20 positions in space beat 3 frames"
    assert [tokens for tokens, _, _ in layouts.axes] == [20, 3]


def test_text_and_image_are_two_segments_of_one_axis() -> None:
    def joint(t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.cat([t, x], dim=2)
        y = sdpa(y, y, y)
        return y[:, :, :4], y[:, :, 4:]

    layouts, (text, image) = chosen(joint, torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 11, 4))
    assert [(tokens, segments) for tokens, segments, _ in layouts.axes] == [(15, 2)]
    owners = layouts.owners
    for node, count in ((text, 4), (image, 11)):
        counts = [owners.count(layouts.chosen[node].runs, rank) for rank in range(3)]
        assert sum(counts) == count and max(counts) - min(counts) <= 1
    totals = [sum(owners.count(layouts.chosen[n].runs, r) for n in (text, image)) for r in range(3)]
    assert totals == [5, 5, 5], "the longer shards are on different ranks"


def test_what_a_mask_is_padded_for_is_shared_out_like_other_tokens() -> None:
    """Single tokens are joined to a text, whose mask and whose positions are padded for them."""

    def joined(text: torch.Tensor, one: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        x = torch.cat([text, *((one * i)[:, None] for i in range(3))], 1) + torch.nn.functional.pad(
            places, (0, 0, 0, 3)
        )
        y = x.unsqueeze(1)
        return sdpa(y, y, y, attn_mask=torch.nn.functional.pad(mask, (0, 3))[:, None, None]).squeeze(1)

    layouts, _ = chosen(joined, torch.zeros(1, 9, 8), torch.zeros(1, 8), torch.zeros(1, 9), torch.zeros(1, 9, 8))
    (attention,) = (node for node in layouts.chosen if "attention" in node.name)
    owners = layouts.owners
    assert [owners.count(layouts.chosen[attention].runs, rank) for rank in range(3)] == [4, 4, 4]


def test_rows_that_have_several_owners_leave_the_value_to_its_next_axis() -> None:
    def pairs(x: torch.Tensor) -> torch.Tensor:
        y = sdpa(x[:, :, ::2], x[:, :, ::2], x[:, :, ::2])
        z = torch.stack([y, y + 1], 3).flatten(2, 3)
        return sdpa(z, z, z)

    got = captured(pairs, torch.zeros(1, 2, 24, 4))
    sites = analyse_attention(got.gm.graph)
    tokens = analyse_tokens(got.gm.graph, seeds_of(sites))
    layouts = choose_layouts(tokens, sites, 3)
    assert all(layouts.owners.fits(layout) for layout in layouts.chosen.values())
    assert {site.node for site in sites} <= set(layouts.chosen), "both attentions can be sharded"


def test_a_value_is_cut_along_the_dim_in_which_its_tokens_lie() -> None:
    graph = parse(
        """
        x: f32[2,6,8] = input
        t: f32[2,8] = input
        m: f32[2,6,8] = aten.mul.Tensor(x, x)
        h: f32[2,6,2,4] = aten.view(m, [2, 6, 2, 4])
        q: f32[2,2,6,4] = aten.transpose.int(h, 1, 2)
        o: f32[2,2,6,4] = aten.scaled_dot_product_attention(q, q, q)
        return o, t
        """
    ).gm.graph
    sites = analyse_attention(graph)
    layouts = choose_layouts(analyse_tokens(graph, seeds_of(sites)), sites, 3)
    assert {str(node): layout.dim for node, layout in layouts.chosen.items()} == {
        "x": 1,
        "m": 1,
        "h": 1,
        "q": 2,
        "o": 2,
    }
    assert [layouts.owners.count(layouts.chosen[sites[0].q].runs, rank) for rank in range(3)] == [2, 2, 2]
