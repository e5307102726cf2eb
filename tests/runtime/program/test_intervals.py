"""Runs of integers: counted, cut, compared."""

from __future__ import annotations

import pytest

from sfcompile.runtime.program.intervals import count, cut, overlap, places, slice_of


def test_count() -> None:
    assert count(()) == 0
    assert count(((3, 2), (9, 5))) == 7


@pytest.mark.parametrize(("total", "parts"), [(8, 4), (7, 3), (2, 5), (0, 2)])
def test_slices_are_even_and_cover(total: int, parts: int) -> None:
    slices = [slice_of(total, parts, index) for index in range(parts)]
    assert slices[0][0] == 0 and slices[-1][1] == total
    assert all(left[1] == right[0] for left, right in zip(slices, slices[1:], strict=False))
    sizes = [stop - start for start, stop in slices]
    assert max(sizes) - min(sizes) <= 1


def test_a_cut_of_positions_keeps_their_order() -> None:
    runs = ((10, 3), (20, 4), (40, 1))
    assert cut(runs, 0, 8) == runs
    assert cut(runs, 2, 5) == ((12, 1), (20, 2))
    assert cut(runs, 7, 7) == ()


def test_overlap_and_places() -> None:
    a, b = ((0, 4), (8, 4)), ((2, 8), (11, 3))
    assert overlap(a, b) == ((2, 2), (8, 2), (11, 1))
    assert places(overlap(a, b), a) == ((2, 2), (4, 2), (7, 1))
    assert places(overlap(a, b), b) == ((0, 2), (6, 2), (8, 1))
