from __future__ import annotations

import torch
from helpers import captured

from sfcompile.passes.analyse_attention import analyse_attention


def test_sites_in_order_with_their_flops() -> None:
    def two(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.scaled_dot_product_attention(q, k, k)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    sites = analyse_attention(captured(two, torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 7, 4)).gm.graph)
    assert [site.flops for site in sites] == [2 * 2 * 3 * 5 * 7 * 8, 2 * 2 * 3 * 5 * 5 * 8]


def test_nothing_to_find() -> None:
    assert analyse_attention(captured(lambda x: x.softmax(-1), torch.zeros(3)).gm.graph) == []
