"""Ops whose rows are made of neighbouring rows: which window a rank asks for, and what it does with stretches."""

from __future__ import annotations

import pytest
import torch
from helpers import captured, rewritten
from hypothesis import given
from hypothesis import strategies as st
from random_ops import few, rand, ranks
from torch.nn import functional as F

from sfcompile.passes.analyse_tokens import analyse_tokens
from sfcompile.passes.choose_layouts import choose_layouts
from sfcompile.passes.graph.layout import Window
from sfcompile.runtime.program.sites import ExchangeSite


def halo_of(n: int, p: int, stride: int) -> list[list[int]]:
    """Rows of the input that each rank wants of a convolution of 3 taps with padding 1."""
    got = captured(lambda x, w: F.conv1d(x * 2, w, padding=1, stride=stride) + 1, rand(1, 2, n), rand(2, 2, 3))
    placement, _, _ = rewritten(got, [(0, 2)], p)
    conv = next(node for node in placement.needs if "conv1d" in node.name)
    window = placement.needs[conv][0]
    assert isinstance(window, Window)
    return [[i for first, k in runs for i in range(first, first + k)] for runs in window.wanted]


def test_rows_of_both_grids_are_cut_in_proportion() -> None:
    assert halo_of(12, 3, 1) == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7, 8], [7, 8, 9, 10, 11]]
    assert halo_of(12, 3, 2) == [[0, 1, 2, 3], [3, 4, 5, 6, 7], [7, 8, 9, 10, 11]]


@few
@given(st.integers(8, 40), ranks, st.integers(1, 3))
def test_a_halo_is_a_few_rows_however_sizes_divide(n: int, p: int, stride: int) -> None:
    rows = [(rank * n // p, (rank + 1) * n // p) for rank in range(p)]
    for wanted, (start, stop) in zip(halo_of(n, p, stride), rows, strict=True):
        assert len(set(wanted) - set(range(start, stop))) <= 2 + 2 * stride


def test_a_window_of_ones_own_rows_needs_no_exchange() -> None:
    got = captured(lambda x: F.interpolate(x * 2, scale_factor=2.0) + 1, rand(1, 2, 8, 4))
    _, traffic, locals_ = rewritten(got, [(0, 2)], 4)
    assert not any(mine.moves for mine in traffic)
    assert [site.is_gather for site in locals_[0].sites if isinstance(site, ExchangeSite)] == [True], "the output"


def test_sizes_of_a_grid_are_kin() -> None:
    """What has rows at one size is sharded along them at all sizes, though another dim is as long."""

    def net(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = F.conv2d(x * 2, w, padding=1, stride=2)
        return x + 1

    got = captured(net, rand(1, 2, 16, 16), rand(2, 2, 3, 3))
    first = next(node for node in got.gm.graph.nodes if node.op == "placeholder")
    tokens = analyse_tokens(got.gm.graph, [(first, 3), (first, 2)])
    assert len(tokens.space.kin) == 4
    tokens.rows.append((first, 3, 1.0))
    layouts = choose_layouts(tokens, [], 4)
    assert {layout.dim for layout in layouts.chosen.values()} == {3}


@pytest.mark.parametrize("stretches", [2, 9])
def test_every_stretch_has_its_halo(stretches: int) -> None:
    """Up to eight stretches on a rank; beyond that the op is computed whole."""

    def net(x: torch.Tensor, w: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        return F.conv1d(x + torch.cat([part * 2 for part in parts], 2), w, padding=1) + x

    n = 4 * stretches
    parts = [rand(1, 2, 4) + i for i in range(stretches)]
    got = captured(net, rand(1, 2, n), rand(2, 2, 3), *parts)
    placement, _, _ = rewritten(got, [(0, 2), *((2 + i, 2) for i in range(stretches))], 2)
    sharded = {str(node.target) for node in placement.needs}
    assert ("aten.conv1d.default" in sharded) == (stretches == 2)
