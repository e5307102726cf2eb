from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Layout, Ownership, Window, map_through_view

factors = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def tokens_of_elements(shape: tuple[int, ...], layout: Layout) -> np.ndarray:
    """The token of every element, in the shape of the value."""
    along = np.arange(shape[layout.dim]) // layout.inner % layout.tokens
    return np.broadcast_to(along.reshape(-1, *[1] * (len(shape) - layout.dim - 1)), shape)


@settings(max_examples=300, deadline=None)
@given(factors, st.integers(2, 4), factors, st.data())
def test_tokens_stay_with_their_elements_through_a_view(
    before: list[int], n: int, after: list[int], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(before)))
    outer = math.prod(before[cut:])
    split = data.draw(st.integers(0, len(after)))
    inner = math.prod(after[:split])
    shape = (*before[:cut], outer * n * inner, *after[split:])
    layout = Layout(cut, ((0, n),), outer, inner)
    flat = [*before, n, *after]
    target: list[int] = []
    for size in flat:
        if target and data.draw(st.booleans()):
            target[-1] *= size
        else:
            target.append(size)
    mapped = map_through_view(layout, shape, tuple(target))
    assert mapped is not None, "every merge of factors keeps the tokens in one dim"
    np.testing.assert_array_equal(
        tokens_of_elements(shape, layout).reshape(target), tokens_of_elements(tuple(target), mapped)
    )
    back = map_through_view(mapped, tuple(target), shape)
    assert back is not None
    np.testing.assert_array_equal(tokens_of_elements(shape, back), tokens_of_elements(shape, layout))


def test_tokens_of_a_grid_are_followed_by_their_rows() -> None:
    tokens = Layout(1, ((0, 12),))
    rows = Layout(1, ((0, 12),), grain=4)
    assert map_through_view(tokens, (2, 12, 5), (2, 3, 4, 5)) == rows
    assert map_through_view(rows, (2, 3, 4, 5), (2, 12, 5)) == tokens
    assert map_through_view(rows, (2, 3, 4, 5), (2, 3, 20)) == rows
    assert map_through_view(rows, (2, 3, 4, 5), (6, 4, 5)) == Layout(0, ((0, 12),), 2, 1, 4)
    assert map_through_view(Layout(0, ((0, 24),)), (24, 5), (2, 3, 4, 5)) == Layout(0, ((0, 24),), grain=12)
    assert map_through_view(rows, (2, 3, 4, 5), (2, 2, 6, 5)) is None
    assert map_through_view(tokens, (2, 12, 5), (2, 5, 12)) is None


def test_rows_have_one_owner_where_the_segment_is_cut_between_rows() -> None:
    space = LabelSpace()
    runs = space.fresh(20)
    rows = Layout(1, runs, grain=5)
    assert not Ownership(space, [runs[0]], [0], 3).fits(rows)
    owners = Ownership(space, [runs[0]], [0], 3, {runs[0][0]: 5})
    assert owners.fits(rows)
    assert [owners.rows(rows, rank).tolist() for rank in range(3)] == [[0], [1], [2, 3]]
    assert owners.dim_runs(Layout(0, runs, 2, 3, 5), 1) == ((3, 3), (15, 3))
    assert owners.local_shape((2, 4, 5), rows, 2) == (2, 2, 5)


@given(st.integers(1, 60), st.integers(1, 7), st.integers(2, 4))
def test_rows_of_grids_of_several_sizes_are_cut_at_the_same_places(n: int, ranks: int, factor: int) -> None:
    space = LabelSpace()
    small, large = space.fresh(n), space.fresh(factor * n)
    owners = Ownership(space, [small[0], large[0]], [0, 1], ranks, {small[0][0]: 1, large[0][0]: 1})
    for rank in range(ranks):
        ends = [[sum(run) for run in owners.position_runs(runs, rank)] for runs in (small, large)]
        for coarse, fine in zip(*ends, strict=False):
            assert 0 <= fine - factor * coarse < factor
    assert owners.holds(Layout(0, small), Layout(0, small, inner=1))


def test_a_layout_holds_what_is_the_same_rows_under_another_name() -> None:
    space = LabelSpace()
    rows, tokens = space.fresh(6), space.fresh(24)
    owners = Ownership(space, [rows[0], tokens[0]], [0, 1], 3, {rows[0][0]: 1, tokens[0][0]: 4})
    assert not owners.same(Layout(1, rows), Layout(1, tokens, grain=4))
    assert owners.holds(Layout(1, rows), Layout(1, tokens, grain=4))
    assert owners.holds(Layout(1, rows), Window(1, (((0, 2),), ((2, 2),), ((4, 2),))))
    assert not owners.holds(Layout(1, rows), Window(1, (((0, 3),), ((2, 2),), ((4, 2),))))
    assert not owners.holds(Layout(1, rows), Layout(0, rows)) and not owners.holds(Layout(1, rows), None)


def test_padding_goes_to_the_owner_of_the_edge() -> None:
    space = LabelSpace()
    before, rows, after, more = (space.fresh(n) for n in (2, 9, 1, 1))
    space.glued += [(0, 2, 2, 1), (11, 1, 10, 1), (12, 1, 11, 1)]  # the last is padding of padding
    segments = [before[0], rows[0], after[0], more[0]]
    owners = Ownership(space, segments, [0] * 4, 3)
    assert owners.owners((*before, *rows, *after, *more)) == ((0, 5), (1, 3), (2, 5))
    assert Ownership(space, segments, [0] * 4, 2).owners(before) == ((0, 1), (1, 1)), "enough of it to be shared"
    loose = Ownership(space, segments, [0] * 4, 3, loose=[11])
    assert loose.owners((*rows, *after, *more)) == ((0, 3), (1, 3), (2, 3), (0, 2)), "its turn, and its own padding"


def test_rows_that_are_torn_apart_are_cut_together() -> None:
    """In proportion each row by itself would be the last rank's."""
    space = LabelSpace()
    (first, _), *_ = space.fresh(7)
    torn = [(first, 1), (first + 1, 1), (first + 2, 1), (first + 3, 3), (first + 6, 1)]
    grains = {start: 1 for start, _ in torn}
    rows = ((first, 4),)
    assert Ownership(space, torn[:4], [0] * 4, 3, grains).owners(((first, 6),)) == ((0, 2), (1, 2), (2, 2))
    assert Ownership(space, torn[:4], [0, 1, 0, 0], 2, grains).owners(rows) == ((1, 2), (0, 2)), "of one axis"
    assert Ownership(space, torn[3:], [0] * 2, 2, grains).owners(((first + 3, 4),)) == ((0, 2), (1, 2))
    long = [(first, 3), (first + 3, 4)]
    owners = Ownership(space, long, [0] * 2, 3, {start: 1 for start, _ in long})
    assert owners.owners(((first, 3), (first + 3, 4))) == ((0, 1), (1, 1), (2, 1), (0, 1), (1, 1), (2, 2))


def test_who_holds_labels_keeps_them() -> None:
    space = LabelSpace()
    (held,), (fresh,) = space.fresh(7), space.fresh(4)
    pieces = [(0, 1, 0), (1, 4, 1), (5, 2, 0)]
    owners = Ownership(space, [held, fresh], [0, 1], 2, held=pieces)
    assert owners.owners((held,)) == ((0, 1), (1, 4), (0, 2)) and owners.owners((fresh,)) == ((0, 2), (1, 2))
    torn = Ownership(space, [(0, 3), (3, 4)], [0, 0], 2, held=pieces)
    assert torn.owners((held,)) == owners.owners((held,)), "whoever tears them"
    two_owners = Ownership(space, [held], [0], 2, held=[*pieces, (0, 7, 1)])
    assert two_owners.owners((held,)) == ((0, 4), (1, 3)), "nobody's word counts then"


def test_single_tokens_map_where_their_dim_is_kept() -> None:
    assert map_through_view(Layout(1, ((0, 1),)), (2, 1, 5), (2, 5)) is None
    assert map_through_view(Layout(1, ((0, 1),)), (2, 1, 6), (2, 1, 2, 3)) == Layout(1, ((0, 1),))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 7))
def test_every_token_has_one_owner_and_pieces_differ_by_at_most_one(lengths: list[int], ranks: int) -> None:
    space = LabelSpace()
    segments = [space.fresh(length)[0] for length in lengths]
    owners = Ownership(space, segments, [0] * len(segments), ranks)
    everything = tuple(segments)
    counts = [owners.count(everything, rank) for rank in range(ranks)]
    assert sum(counts) == sum(lengths)
    assert max(counts) - min(counts) <= 1, "remainders rotate over the ranks"
    for segment in segments:
        counts = [owners.count((segment,), rank) for rank in range(ranks)]
        assert max(counts) - min(counts) <= 1
    joined = np.concatenate([owners.positions(everything, rank) for rank in range(ranks)])
    assert sorted(joined.tolist()) == list(range(sum(lengths)))
    for rank in range(ranks):
        spelled = [i for first, n in owners.position_runs(everything, rank) for i in range(first, first + n)]
        assert spelled == owners.positions(everything, rank).tolist()


def test_layouts_agree_when_their_owners_do() -> None:
    space = LabelSpace()
    a, b = space.fresh(6), space.fresh(6)
    owners = Ownership(space, [a[0], b[0]], [0, 1], 3)
    assert owners.same(Layout(1, a), Layout(1, b))
    assert not owners.same(Layout(1, a), Layout(0, a))
    assert not owners.same(Layout(1, a), None)
    assert owners.axis_of(a) == 0 and owners.axis_of(b) == 1
    assert owners.local_shape((2, 12, 5), Layout(1, a, outer=2), 0) == (2, 4, 5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(1, 4), st.integers(2, 3))
def test_a_ranks_parts_are_its_tokens_cut_evenly(lengths: list[int], ranks: int, parts: int) -> None:
    space = LabelSpace()
    runs = tuple(space.fresh(n)[0] for n in lengths)
    owners = Ownership(space, runs, [0] * len(runs), ranks)
    split = owners.split(parts)
    assert split.num_ranks == ranks * parts and owners.num_ranks == ranks
    whole, fine = owners.vector(runs), split.vector(runs)
    np.testing.assert_array_equal(fine // parts, whole)
    for rank in range(ranks):
        sizes = [int((fine == rank * parts + j).sum()) for j in range(parts)]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
