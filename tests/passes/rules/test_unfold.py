"""Windows of rows that overlap: each rank makes its own of its rows and a halo."""

from __future__ import annotations

import pytest
import torch
from helpers import captured, check_sharded
from hypothesis import given
from hypothesis import strategies as st
from random_ops import few, rand, ranks
from torch.nn import functional as F


@few
@given(st.integers(4, 12), ranks, st.integers(1, 4), st.integers(1, 3))
def test_windows(n: int, p: int, size: int, step: int) -> None:
    check_sharded(lambda x: (x * 2).unfold(1, size, step) + 1, [rand(2, n, 3)], (0, 1), ranks=p, exact=True)
    check_sharded(lambda x: (x * 2).unfold(2, 2, step) + 1, [rand(2, n, 3)], (0, 1), ranks=p, exact=True)


@pytest.mark.parametrize("named", [{}, {"padding": 1}, {"dilation": 2, "padding": (1, 2)}, {"stride": (2, 1)}])
@few
@given(st.integers(5, 9), ranks)
def test_patches_that_overlap_are_windows_along_two_dims(named: dict, n: int, p: int) -> None:
    x = rand(2, 3, n, 6)
    got = captured(lambda x: F.unfold(x * 2, (3, 2), **named) + 1, x)
    assert not [node for node in got.gm.graph.nodes if "im2col" in str(node.target)]
    assert torch.equal(got.gm(x)[0], F.unfold(x * 2, (3, 2), **named) + 1)
