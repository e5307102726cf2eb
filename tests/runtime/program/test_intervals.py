"""Runs of integers: counted, cut, compared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfcompile.runtime.program.intervals import (
    Runs,
    beyond,
    count,
    flip,
    join,
    overlap,
    places,
    slice_of,
    stretch,
    union,
)

runs_lists = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=5).map(join)


def spelled(runs: Runs) -> list[int]:
    return [label for first, length in runs for label in range(first, first + length)]


@given(runs_lists, st.integers(0, 20), st.integers(0, 20), st.integers(1, 4))
def test_slices_and_flips_are_those_of_lists(runs: Runs, start: int, stop: int, step: int) -> None:
    plain = spelled(runs)
    assert count(runs) == len(plain)
    assert spelled(stretch(runs, start, stop, step)) == plain[start:stop:step]
    assert spelled(flip(runs)) == plain[::-1]


def test_merging_joins_what_continues() -> None:
    assert join([(0, 2), (2, 3), (9, 0), (4, 1)]) == ((0, 5), (4, 1))


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


def test_a_stretch_keeps_the_order() -> None:
    runs = ((10, 3), (20, 4), (40, 1))
    assert stretch(runs, 0, 8) == runs
    assert stretch(runs, 2, 5) == ((12, 1), (20, 2))
    assert stretch(runs, 7, 7) == ()


def test_overlap_and_places() -> None:
    a, b = ((0, 4), (8, 4)), ((2, 8), (11, 3))
    assert overlap(a, b) == ((2, 2), (8, 2), (11, 1))
    assert places(overlap(a, b), a) == ((2, 2), (4, 2), (7, 1))
    assert places(overlap(a, b), b) == ((0, 2), (6, 2), (8, 1))


ascending = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=5).map(union)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=5), ascending, ascending)
def test_unions_and_differences_are_those_of_sets(loose: list[tuple[int, int]], a: Runs, b: Runs) -> None:
    assert spelled(union(loose)) == sorted(set(spelled(tuple(loose))))
    assert spelled(beyond(a, b)) == sorted(set(spelled(a)) - set(spelled(b)))
    assert join(union(loose)) == union(loose) and join(beyond(a, b)) == beyond(a, b)
