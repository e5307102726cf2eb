"""Convolutions on shards: halos, strides, patches, rows of a grid, batches of tokens."""

from __future__ import annotations

import torch
from helpers import ANY, captured, check_sharded, rewritten
from hypothesis import given
from hypothesis import strategies as st
from random_ops import Fn, few, rand, ranks, sizes
from torch.nn import functional as F

from sfcompile.runtime.program.sites import ExchangeSite


def test_pixelwise_convolution_and_batch_of_tokens() -> None:
    check_sharded(lambda x, w: F.conv1d(x, w), [rand(2, 6, 9), rand(4, 6, 1)], (0, 2))
    check_sharded(lambda x, w: F.conv2d(x.flatten(0, 1), w, padding=1), [rand(2, 5, 3, 4, 4), rand(2, 3, 3, 3)], (0, 1))


@few
@given(st.integers(6, 17), st.sampled_from([1, 3, 5]), st.integers(1, 2), st.integers(0, 2), ranks)
def test_taps_that_overlap_read_a_halo(n: int, taps: int, dilation: int, padding: int, p: int) -> None:
    same = dilation * (taps - 1) == 2 * padding
    check_sharded(
        lambda x, w: F.conv1d(x * 2, w, padding=padding, dilation=dilation) if n > dilation * (taps - 1) else x,
        [rand(2, 4, n), rand(4, 4, taps)], (0, 2), ranks=p, whole=() if same and taps <= n else ANY,
    )  # fmt: skip


def test_same_padding_and_a_bias() -> None:
    check_sharded(
        lambda x, w, b: F.conv1d(x * 2, w, b, padding="same"), [rand(2, 4, 9), rand(6, 4, 3), rand(6)], (0, 2)
    )


@few
@given(st.integers(2, 9), st.integers(2, 3), ranks)
def test_patches_need_no_halo(n: int, patch: int, p: int) -> None:
    def embed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv1d((x * 2).flatten(1)[:, None], w, stride=patch)

    check_sharded(embed, [rand(2, n, patch), rand(5, 1, patch)], (0, 1), ranks=p)


def depthwise(h: int, w: int, bias: bool = True) -> Fn:
    def mix(x: torch.Tensor, weight: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        grid = (x * 2).transpose(1, 2).unflatten(2, (h, w))
        grid = F.conv2d(grid, weight, b if bias else None, padding=1, groups=4)
        return F.silu(grid).flatten(2).transpose(1, 2) @ out

    return mix


@few
@given(st.integers(2, 9), sizes, ranks, st.booleans())
def test_a_grid_is_convolved_by_rows(h: int, w: int, p: int, bias: bool) -> None:
    inputs = [rand(2, h * w, 4), rand(4, 1, 3, 3), rand(4), rand(4, 4)]
    check_sharded(depthwise(h, w, bias), inputs, (0, 1), ranks=p, whole=() if h % p == 0 and w > 1 else ANY)


def test_a_halo_travels_between_neighbours_only() -> None:
    got = captured(depthwise(8, 6), rand(1, 48, 4), rand(4, 1, 3, 3), rand(4), rand(4, 4))
    _, traffic, locals_ = rewritten(got, [(0, 1)], 4)
    exchanges = [site for site in locals_[0].sites if isinstance(site, ExchangeSite)]
    halos = [site for site in exchanges if not site.is_gather]
    assert len(halos) == 1
    assert [halos[0].wanted_shape(rank)[2] for rank in range(4)] == [3, 4, 4, 3], "two rows and what lies next to them"
    assert len([site for site in exchanges if site.is_gather]) == 1, "the output"
    assert all(len(of_rank.moves) == 1 for of_rank in traffic)


def test_temporal_convolution_of_frames_in_the_batch() -> None:
    def spatial(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:  # [B, F H W, C] -> frames join the batch
        grid = (x * 2).reshape(2 * 4, 3, 5, 6).permute(0, 3, 1, 2)
        return F.conv2d(grid, w, padding=1).permute(0, 2, 3, 1).reshape(2, 60, 6)

    check_sharded(spatial, [rand(2, 60, 6), rand(6, 6, 3, 3)], (0, 1), ranks=4)


@few
@given(st.integers(3, 9), st.integers(1, 5), st.integers(1, 4), st.integers(1, 2), st.integers(0, 2), ranks)
def test_transposed_convolution(n: int, taps: int, stride: int, dilation: int, padding: int, p: int) -> None:
    padding = min(padding, dilation * (taps - 1) // 2)
    extra = min(padding, stride - 1)

    def fn(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        options = dict(stride=stride, padding=padding, dilation=dilation, output_padding=extra)
        return F.conv_transpose2d(x * 2, w, b, **options) + 1

    check_sharded(fn, [rand(2, 4, n, 3), rand(4, 6, taps, 2), rand(6)], (0, 2), ranks=p)
    check_sharded(lambda x, w: F.conv_transpose1d(x * 2, w), [rand(5, 4, 8), rand(4, 4, 3)], (0, 0))


@few
@given(st.integers(4, 12), st.integers(2, 5), st.integers(1, 4), st.integers(1, 2), ranks)
def test_strides(n: int, taps: int, stride: int, dilation: int, p: int) -> None:
    """Every size of grid has rows of its own."""
    padding = dilation * (taps - 1) // 2 + 1

    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x * 2, w, stride=stride, padding=padding, dilation=dilation) + 1

    check_sharded(fn, [rand(2, 3, n, 4), rand(5, 3, taps, 1)], (0, 2), ranks=p)


def test_rows_of_padding_alone_are_nobodys() -> None:
    check_sharded(lambda x, w: F.conv1d(x * 2, w, padding=6) + 1, [rand(1, 2, 4), rand(2, 2, 1)], (0, 2), ranks=4,
                  whole=["conv1d"])  # fmt: skip


@few
@given(st.integers(2, 4), ranks, st.integers(2, 3))
def test_as_many_taps_as_the_stride_with_rows_between_them(rows: int, p: int, taps: int) -> None:
    """Every input row is read once only where no row lies between the taps."""
    weight = rand(3, 4, taps)
    for beyond in range(taps):
        n = taps * rows * 2 + beyond
        check_sharded(lambda x: F.conv1d(x * 2, weight, stride=taps, dilation=2) + 1, [rand(1, 4, n)], (0, 2), ranks=p)


@few
@given(st.integers(5, 9), st.integers(1, 4), ranks)
def test_a_convolution_along_several_segments(n: int, m: int, p: int) -> None:
    """Text padded to the length of the sound cuts the tokens in two stretches: each has its own halo."""

    def fn(x: torch.Tensor, text: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([text * 2, text.new_zeros(1, n, 4)], 1)
        return F.conv1d((x + padded).transpose(1, 2), w, padding=2).transpose(1, 2) + x

    check_sharded(fn, [rand(1, n + m, 4), rand(1, m, 4), rand(4, 4, 5)], (0, 1), (1, 1), ranks=p)


@few
@given(st.integers(6, 12), ranks)
def test_causal_convolution_of_video(n: int, p: int) -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.silu(F.conv3d(F.pad(x * 2, (1, 1, 1, 1, 2, 0)), w)) + x

    check_sharded(fn, [rand(1, 2, 3, n, 4), rand(2, 2, 3, 3, 3)], (0, 3), ranks=p)
    check_sharded(fn, [rand(1, 2, n, 3, 4), rand(2, 2, 3, 3, 3)], (0, 2), ranks=p)
