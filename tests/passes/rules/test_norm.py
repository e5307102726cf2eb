"""Norms whose dims hold tokens: every rank's statistics together are those of the whole, to the last digits."""

from __future__ import annotations

import pytest
import torch
from helpers import captured, check_sharded, rewritten, run_lockstep
from hypothesis import given
from hypothesis import strategies as st
from random_ops import Fn, few, rand, ranks, tokens
from torch import fx
from torch.nn import functional as F

from sfcompile.runtime.program.sites import ExchangeSite

NORMS: dict[str, Fn] = {
    "group_norm": lambda x: F.group_norm(x * 2, 2, rand(4), rand(4) + 1, 1e-5) + 1,
    "group_norm_bare": lambda x: F.group_norm(x * 2, 4) + 1,
    "instance_norm": lambda x: F.instance_norm(x * 2, weight=rand(4), bias=rand(4)) + 1,
    "batch_norm": lambda x: F.batch_norm(x * 2, rand(4), rand(4).abs() + 1, rand(4), rand(4)) + 1,
}


@pytest.mark.parametrize("name", NORMS)
@few
@given(tokens, ranks)
def test_norms_of_a_grid_sharded_by_rows(name: str, n: int, p: int) -> None:
    check_sharded(NORMS[name], [rand(2, 4, n, 3)], (0, 2), ranks=p)
    check_sharded(NORMS[name], [rand(2, 4, n)], (0, 2), ranks=p)
    check_sharded(NORMS[name], [rand(n, 4, 3, 2)], (0, 0), ranks=p)


@few
@given(tokens, ranks, st.booleans())
def test_layer_norm_over_tokens(n: int, p: int, affine: bool) -> None:
    def norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x * 2, (n, 3), w if affine else None, b if affine else None)
        return F.rms_norm(x + 1, (n, 3), w if affine else None, 1e-6) * 2

    check_sharded(norm, [rand(2, n, 3), rand(n, 3), rand(n, 3)], (0, 1), ranks=p)


@few
@given(tokens, ranks, st.integers(3, 4))
def test_a_mean_far_from_zero_cancels_nothing(n: int, p: int, magnitude: int) -> None:
    """Against fp64: the error is that of torch's own norm, which takes two passes too, give or take a few roundings.

    Values of 1e3 or 1e4 with a deviation of 1 have 4 or 3 digits after the point in fp32. Sums of squares would lose
    twice as many and come out wrong at order one.
    """
    x = rand(2, 4, n, 5) + 10.0**magnitude
    want = F.group_norm(x.double(), 2)
    bound = 4 * float((F.group_norm(x, 2) - want).abs().max()) + 10.0**magnitude * 2**-22
    got = captured(lambda x: F.group_norm(x + 0, 2), x)
    _, _, locals_ = rewritten(got, [(0, 2)], p)
    graphs = [(fx.GraphModule(local.root, local.graph), local.sites) for local in locals_]
    for out in run_lockstep(lambda rank: graphs[rank], p, [x]):
        assert float((out[0] - want).abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_normalised_in_fp32(dtype: torch.dtype) -> None:
    x = rand(1, 4, 9, 3).to(dtype)
    check_sharded(lambda x: F.group_norm(x * 2, 2).float(), [x], (0, 2), ranks=3)


def test_ranks_tell_each_other_two_numbers_a_group() -> None:
    got = captured(lambda x: F.group_norm(x * 2, 2) * 3, rand(2, 4, 8, 3))
    placement, _, locals_ = rewritten(got, [(0, 2)], 4)
    statistics, output = (site for site in locals_[0].sites if isinstance(site, ExchangeSite))
    assert statistics.shape == (4, 2, 2, 2, 1, 1, 1), "ranks, mean and variance, batch, groups"
    assert output.shape == (2, 4, 8, 3)
    assert not placement.reasons


def test_statistics_that_are_returned_are_not_sharded() -> None:
    def native(x: torch.Tensor) -> torch.Tensor:
        out, mean, _ = torch.native_group_norm(x * 2, None, None, 2, 4, 21, 1, 1e-5)
        return out + mean.sum()

    check_sharded(native, [rand(2, 4, 7, 3)], (0, 2), whole=["native_group_norm"])
