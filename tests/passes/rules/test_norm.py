"""Norms whose dims hold tokens: every rank's statistics together are those of the whole, to the last digits."""

from __future__ import annotations

import pytest
import torch
from helpers import ANY, captured, check_sharded, rewritten, run_lockstep
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_rms_norm_over_tokens_takes_torchs_own_epsilon(dtype: torch.dtype) -> None:
    """Of squares as small as that: torch adds the epsilon of the dtype that it computes in."""
    x = rand(2, 7, 4).to(dtype) * 3e-3
    check_sharded(lambda x: F.rms_norm(x * 1.0, (7, 4)).to(torch.float32), [x], (0, 1), ranks=3, whole=ANY)


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


def convolved(taps: int = 3, stride: int = 1, transposed: bool = False, residual: bool = False) -> Fn:
    """The block of a convolutional network: norm, activation, convolution."""

    def block(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        h = F.silu(F.group_norm(x * 2, 2, scale, shift).clamp(-2))
        if transposed:
            return F.conv_transpose2d(h, w, stride=stride, padding=taps // 2) + 1
        out = F.conv2d(h, w, padding=taps // 2, stride=stride)
        return out + h if residual else out + 1

    return block


@few
@given(st.integers(4, 13), ranks, st.sampled_from([3, 5]), st.integers(1, 2), st.booleans(), st.booleans())
def test_what_is_read_behind_a_norm_comes_as_rows_of_its_input(
    n: int, p: int, taps: int, stride: int, transposed: bool, residual: bool
) -> None:
    """Rows that do not divide, ranks that want rows of ranks beyond the next, two samples, strides, both readers."""
    fn = convolved(taps, stride, transposed, residual and stride == 1)
    check_sharded(fn, [rand(2, 4, n, 6), rand(4, 4, taps, taps), rand(4) + 1, rand(4)], (0, 2), ranks=p)


@few
@given(st.integers(2, 4), st.integers(4, 6))
def test_ranks_without_rows_tell_theirs_and_lack_nothing(n: int, p: int) -> None:
    check_sharded(convolved(residual=True), [rand(1, 4, n, 6), rand(4, 4, 3, 3), rand(4), rand(4)], (0, 2), ranks=p)


def test_statistics_and_a_halo_are_one_exchange() -> None:
    inputs = [rand(2, 4, 8, 3), rand(4, 4, 3, 3), rand(4), rand(4)]
    _, traffic, locals_ = rewritten(captured(convolved(residual=True), *inputs), [(0, 2)], 4)
    told, output = (site for site in locals_[0].sites if isinstance(site, ExchangeSite))
    statistics, row = 2 * 2 * 2, 2 * 4 * 3
    assert told.shape == (4 * statistics + 6 * row,), "of four ranks; two rows of those inside, one of the others"
    assert [told.wanted_shape(r)[0] - 4 * statistics for r in range(4)] == [row, 2 * row, 2 * row, row]
    assert output.is_gather and output.shape == (2, 4, 8, 3)
    assert all(len(mine.moves) == 1 for mine in traffic), "a halo, as the report counts it"


def test_what_is_not_made_row_by_row_has_an_exchange_of_its_own() -> None:
    def block(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = F.group_norm(x * 2, 2)
        return F.conv2d(h * F.conv2d(y, w), w, padding=1) + 1

    inputs = [rand(1, 4, 8, 3), rand(4, 4, 3, 3), rand(1, 4, 10, 5)]
    _, _, locals_ = rewritten(captured(block, *inputs), [(0, 2)], 2)
    shapes = [site.shape for site in locals_[0].sites if isinstance(site, ExchangeSite)]
    assert (2, 2, 1, 2, 1, 1, 1) in shapes, shapes
    check_sharded(block, inputs, (0, 2), ranks=2, whole=ANY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_narrow_types_travel_in_fp32_and_come_out_as_they_were_asked(dtype: torch.dtype) -> None:
    def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.silu(F.group_norm(x * 2, 2)), w, padding=1).float()

    inputs = [rand(1, 4, 9, 3).to(dtype), (rand(4, 4, 3, 3) / 8).to(dtype)]
    _, _, locals_ = rewritten(captured(block, *inputs), [(0, 2)], 3)
    assert next(site.dtype for site in locals_[0].sites if isinstance(site, ExchangeSite)) == torch.float32
    check_sharded(block, inputs, (0, 2), ranks=3)
