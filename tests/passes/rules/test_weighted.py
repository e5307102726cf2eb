"""Rows that are weighted sums of a few others: torch's interpolation by any factor, on shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import check_sharded
from hypothesis import given
from hypothesis import strategies as st
from random_ops import few, rand, ranks
from torch.nn import functional as F

KINDS: dict[str, dict[str, Any]] = {
    "linear": {"mode": "bilinear"},
    "linear, corners": {"mode": "bilinear", "align_corners": True},
    "cubic": {"mode": "bicubic"},
    "cubic, corners": {"mode": "bicubic", "align_corners": True},
    "linear, antialiased": {"mode": "bilinear", "antialias": True},
    "cubic, antialiased": {"mode": "bicubic", "antialias": True},
}


@pytest.mark.parametrize("name", KINDS)
@few
@given(st.integers(1, 12), st.integers(5, 14), ranks)
def test_to_any_size(name: str, n: int, out: int, p: int) -> None:
    """In fp64, where a wrong weight is no rounding; the other dim changes too."""
    x = rand(2, 3, n, 4).double()
    check_sharded(lambda x: F.interpolate(x * 2, size=(out, 5), **KINDS[name]) + 1, [x], (0, 2), ranks=p)


@pytest.mark.parametrize("name", KINDS)
@few
@given(st.integers(4, 9), st.sampled_from([0.6, 1.3, 1.5, 2.5]), ranks)
def test_by_a_factor_that_is_not_whole(name: str, n: int, factor: float, p: int) -> None:
    """torch takes the factor that is named, not that of the sizes."""
    check_sharded(
        lambda x: F.interpolate(x * 2, scale_factor=factor, **KINDS[name]) + 1, [rand(2, 3, n, 4)], (0, 2), ranks=p
    )


def test_lines_and_videos_and_half_precision() -> None:
    check_sharded(lambda x: F.interpolate(x * 2, size=11, mode="linear") + 1, [rand(2, 3, 7)], (0, 2))
    corners = {"mode": "trilinear", "align_corners": True}
    check_sharded(lambda x: F.interpolate(x * 2, size=(4, 9, 5), **corners) + 1, [rand(1, 2, 3, 7, 4)], (0, 3))

    def halves(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x.to(torch.bfloat16), size=(9, 4), mode="bilinear", align_corners=True).float()

    check_sharded(lambda x: halves(x * 0 + 1), [rand(1, 2, 7, 4)], (0, 2), exact=True)


@pytest.mark.parametrize("antialias", [False, True])
def test_a_factor_that_changes_no_size_is_left_to_the_kernel(antialias: bool) -> None:
    """Which one it is goes by sizes: one takes the factor, another copies rows."""

    def same(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x * 2, scale_factor=(1.3, 1.5), mode="bilinear", antialias=antialias)

    name = "_upsample_bilinear2d_aa" if antialias else "upsample_bilinear2d"
    for shape in ((2, 3, 2, 8), (2, 3, 7, 1)):
        check_sharded(same, [rand(*shape)], (0, 2), ranks=2, whole=[name])


def test_more_rows_than_taps_are_worth_is_computed_whole() -> None:
    def thumbnail(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x * 2, size=(2, 4), mode="bilinear", antialias=True)

    check_sharded(thumbnail, [rand(1, 2, 40, 4)], (0, 2), whole=["_upsample_bilinear2d_aa"])
