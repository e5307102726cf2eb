"""Padding where the tokens are, and beside them: the rank that has the edge pads, and nothing travels."""

from __future__ import annotations

import pytest
import torch
from helpers import captured, check_sharded, rewritten
from hypothesis import given
from hypothesis import strategies as st
from random_ops import few, rand, ranks, tokens
from torch.nn import functional as F


@few
@given(tokens, st.integers(0, 4), st.integers(0, 4), ranks)
def test_tokens_between_padding(n: int, before: int, after: int, p: int) -> None:
    check_sharded(lambda x: F.pad(x, (0, 0, before, after)) + 1, [rand(2, n, 3)], (0, 1), ranks=p, exact=True)
    check_sharded(lambda x: F.pad(x, (1, 2)) + 1, [rand(2, n, 3)], (0, 1), ranks=p, exact=True)


@pytest.mark.parametrize("mode", ["constant", "replicate", "reflect"])
@few
@given(st.integers(3, 9), st.integers(0, 2), st.integers(0, 2), ranks)
def test_several_dims_at_once(mode: str, n: int, before: int, after: int, p: int) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x * 2, (1, 2, before, after), mode=mode) + 1

    check_sharded(fn, [rand(2, 3, n, 4)], (0, 2), ranks=p, exact=True)
    check_sharded(fn, [rand(n, 3, 5, 4)], (0, 0), ranks=p, exact=True)


@few
@given(st.integers(4, 9), ranks)
def test_video(n: int, p: int) -> None:
    check_sharded(lambda x: F.pad(x * 2, (1, 1, 1, 1, 2, 0), mode="replicate") + 1, [rand(1, 2, 3, n, 4)], (0, 3),
                  ranks=p, exact=True)  # fmt: skip
    check_sharded(lambda x: F.pad(x * 2, (0, 0, -1, -2)) + 1, [rand(1, 2, n, 4)], (0, 2), ranks=p, exact=True)


@few
@given(st.integers(8, 13), st.sampled_from(["constant", "replicate"]), ranks)
def test_padding_belongs_to_the_edge(n: int, mode: str, p: int) -> None:
    """Only the halo of the convolution travels: no exchange for the padding, of a strided call neither."""

    def conv(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x * 2, (1, 1, 1, 1), mode=mode), w) + x

    inputs = [rand(1, 3, n, 5), rand(3, 3, 3, 3)]
    check_sharded(conv, inputs, (0, 2), ranks=p)
    _, traffic, _ = rewritten(captured(conv, *inputs), [(0, 2)], p)
    assert all([move.value.name for move in mine.moves] == ["pad"] for mine in traffic), "the padded value's halo"
