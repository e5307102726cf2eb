"""Resampling by rows: interpolation, pooling and pixel shuffles on shards are shards of the resampled whole."""

from __future__ import annotations

import pytest
import torch
from helpers import ANY, check_sharded
from hypothesis import given
from hypothesis import strategies as st
from random_ops import Fn, few, rand, ranks
from torch.nn import functional as F

rows = st.integers(2, 11)

UP: dict[str, Fn] = {
    "nearest": lambda x: F.interpolate(x * 2, scale_factor=2.0, mode="nearest"),
    "nearest_by_size": lambda x: F.interpolate(x * 2, size=(x.shape[2] * 3, 5), mode="nearest"),
    "nearest_exact": lambda x: F.interpolate(x * 2, scale_factor=(2.0, 3.0), mode="nearest-exact"),
    "no_whole_factor": lambda x: F.interpolate(x * 2, size=(x.shape[2] + 3, 9), mode="nearest"),
    "shrunk": lambda x: F.interpolate(x * 2, size=(x.shape[2] // 2 + 1, 2), mode="nearest"),
    "fraction": lambda x: F.interpolate(x * 2, scale_factor=1.6, mode="nearest"),
    "bilinear": lambda x: F.interpolate(x * 2, scale_factor=2.0, mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x * 2, size=(x.shape[2] * 3, 8), mode="bicubic"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x * 2, 2),
}


@pytest.mark.parametrize("name", UP)
@few
@given(rows, ranks)
def test_interpolation(name: str, n: int, p: int) -> None:
    check_sharded(lambda x: UP[name](x) + 1, [rand(2, 4, n, 4)], (0, 2), ranks=p)
    check_sharded(lambda x: UP[name](x) + 1, [rand(n, 4, 3, 4)], (0, 0), ranks=p)


DOWN: dict[str, Fn] = {
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x * 2, 2),
    "bilinear": lambda x: F.interpolate(x * 2, scale_factor=0.5, mode="bilinear"),
    "avg_pool": lambda x: F.avg_pool2d(x * 2, 2),
    "avg_pool_padded": lambda x: F.avg_pool2d(x * 2, 3, 1, 1),
    "avg_pool_strided": lambda x: F.avg_pool2d(x * 2, (3, 2), (2, 1)),
    "avg_pool_of_what_is_there": lambda x: F.avg_pool2d(x * 2, 3, 2, 1, count_include_pad=False),
    "avg_pool_over_the_edge": lambda x: F.avg_pool2d(x * 2, (3, 2), (2, 3), (1, 0), ceil_mode=True),
    "avg_pool_by_a_number": lambda x: F.avg_pool2d(x * 2, 3, 2, 1, ceil_mode=True, divisor_override=5),
    "avg_pool_over_the_edge_of_what_is_there": lambda x: F.avg_pool2d(x * 2, 3, 2, 1, True, False),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x * 2, (3, 2)),
    "adaptive_avg_pool_to_more": lambda x: F.adaptive_avg_pool2d(x * 2, (x.shape[2] + 3, 3)),
    "max_pool": lambda x: F.max_pool2d(x * 2, 3, 2, 1),
    "max_pool_over_the_edge": lambda x: F.max_pool2d(x * 2, 2, 3, 1, ceil_mode=True),
    "max_pool_dilated": lambda x: F.max_pool2d(x * 2, 2, 1, 0, 2),
}


@pytest.mark.parametrize("name", DOWN)
@few
@given(st.integers(2, 7), ranks)
def test_pooling(name: str, half: int, p: int) -> None:
    check_sharded(lambda x: DOWN[name](x) + 1, [rand(2, 4, 2 * half, 4)], (0, 2), ranks=p)


def test_video_is_interpolated_by_rows() -> None:
    check_sharded(lambda x: F.interpolate(x * 2, scale_factor=2.0) + 1, [rand(1, 2, 3, 7, 4)], (0, 3), exact=True)
    check_sharded(lambda x: F.interpolate(x * 2, size=(5, 14, 4)) + 1, [rand(1, 2, 3, 7, 4)], (0, 3), exact=True)
    check_sharded(lambda x: F.avg_pool3d(x * 2, 2) + 1, [rand(1, 2, 4, 8, 4)], (0, 3))


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (lambda x: F.interpolate(x, scale_factor=2.1, mode="nearest"), "upsample_nearest2d"),
        (lambda x: F.adaptive_max_pool2d(x, 2), "adaptive_max_pool2d"),
    ],
)
def test_what_depends_on_the_whole_size_is_computed_whole(fn: Fn, name: str) -> None:
    check_sharded(lambda x: fn(x * 2), [rand(2, 4, 7, 4)], (0, 2), whole=[name])


@few
@given(st.integers(3, 9), ranks)
def test_sizes_come_and_go(n: int, p: int) -> None:
    """Down, a convolution, up, and a skip: two grids, each cut in proportion."""

    def net(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        small = F.conv2d(x * 2, w, padding=1, stride=2)
        large = F.interpolate(F.silu(small), size=x.shape[2:], mode="nearest")
        return torch.cat([F.conv2d(large, w, padding=1), x], 1)

    check_sharded(net, [rand(1, 3, n, 5), rand(3, 3, 3, 3)], (0, 2), ranks=p, whole=ANY if n < 2 * p else ())
