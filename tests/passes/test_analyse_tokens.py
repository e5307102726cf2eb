from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import captured
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sfcompile.capture.graph import Captured
from sfcompile.passes.analyse_attention import analyse_attention
from sfcompile.passes.analyse_tokens import analyse_tokens, seeds_of
from sfcompile.passes.graph.layout import Key
from sfcompile.passes.state import Tokens


def analysed(fn: Callable[..., Any], *args: torch.Tensor) -> tuple[Captured, Tokens]:
    got = captured(fn, *args)
    return got, analyse_tokens(got.gm.graph, seeds_of(analyse_attention(got.gm.graph)))


def input_layouts(got: Captured, tokens: Tokens) -> list[list[Key]]:
    return [sorted(tokens.layouts.get(node, {})) for node in got.gm.graph.nodes if node.op == "placeholder"]


def test_labels_flow_back_to_the_inputs_and_join_text_with_image() -> None:
    def joint(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        x = torch.cat([text, image], dim=1).unflatten(-1, (2, 4)).transpose(1, 2)
        return sdpa(x, x, x).transpose(1, 2).flatten(2)[:, text.shape[1] :]

    got, tokens = analysed(joint, torch.zeros(2, 3, 8), torch.zeros(2, 5, 8))
    assert input_layouts(got, tokens) == [[(1, 1, 1, 1)], [(1, 1, 1, 1)]]
    roots = [tokens.space.roots(tokens.layouts[node][1, 1, 1, 1].runs) for node in list(got.gm.graph.nodes)[:2]]
    assert roots[0][0][0] + 3 == roots[1][0][0], "text and image are neighbouring stretches of one axis"


def test_weights_and_modulations_carry_no_tokens() -> None:
    def block(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = (torch.nn.functional.linear(x, w) * t[:, None]).unsqueeze(1)
        return sdpa(h, h, h)

    got, tokens = analysed(block, torch.zeros(2, 6, 4), torch.zeros(4, 4), torch.zeros(2, 4))
    assert input_layouts(got, tokens) == [[(1, 1, 1, 1)], [], []]


def test_equal_sizes_are_not_the_same_axis() -> None:
    def cross(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return sdpa(x, text, text)

    got, tokens = analysed(cross, torch.zeros(2, 1, 6, 4), torch.zeros(2, 1, 6, 4))
    a, b = (tokens.layouts[node][2, 1, 1, 1].runs for node in list(got.gm.graph.nodes)[:2])
    assert tokens.space.roots(a) != tokens.space.roots(b)


def test_neighbour_differences_clash_and_are_reported() -> None:
    def shifted(x: torch.Tensor) -> torch.Tensor:
        y = x[:, :, 1:] - x[:, :, :-1]
        return sdpa(y, y, y)

    _, tokens = analysed(shifted, torch.zeros(2, 1, 6, 4))
    assert tokens.clashes


def test_without_attention_nothing_is_labelled() -> None:
    _, tokens = analysed(lambda x: x * 2, torch.zeros(2, 3))
    assert not tokens.layouts


def test_rows_of_products_are_followed_where_no_attention_is() -> None:
    def mlp(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, w) * torch.nn.functional.linear(t, w)[:, None]

    got = captured(mlp, torch.zeros(2, 9, 4), torch.zeros(4, 4), torch.zeros(2, 4))
    assert not analyse_tokens(got.gm.graph, []).layouts
    tokens = analyse_tokens(got.gm.graph, [], rows_from=4)
    assert input_layouts(got, tokens) == [[(1, 1, 1, 1)], [], []], "two samples are fewer than four ranks"
    assert [dim for _, dim, _ in tokens.rows] == [1]


def test_a_table_of_rows_without_columns_carries_no_grid() -> None:
    def rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        h, w = table[:4].view(4, 1, -1).expand(4, 5, -1), table[:5].view(1, 5, -1).expand(4, 5, -1)
        y = x * torch.cat([h, w], dim=-1).reshape(1, 20, -1)
        return sdpa(y, y, y)

    got, tokens = analysed(rope, torch.zeros(1, 20, 6), torch.zeros(30, 3))
    keys = {key for places in tokens.layouts.values() for key in places}
    assert max(grain for *_, grain in keys) <= 5
