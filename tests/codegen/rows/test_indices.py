"""Index arithmetic: short where views cancel, and equal to what torch's views do."""

from __future__ import annotations

import itertools

import pytest
import torch

from sfcompile.codegen.rows.indices import Atom, Index, Remainder, is_column, is_mixed, parity_of, reshaped

H, W = Atom("h", 3), Atom("w", 8, 16)


def value(index: Index, h: int, w: int) -> int:
    return int(eval(str(index), {}, {"h": h, "w": w}))


@pytest.mark.parametrize("before", [(24,), (3, 4, 2), (3, 2, 4), (6, 4), (1, 3, 1, 8), (2, 12), (6, 2, 2)])
def test_a_reshaped_place_is_where_torch_puts_it(before: tuple[int, ...]) -> None:
    found = reshaped((Index.of(H), Index.of(W)), (3, 8), before)
    numbers = torch.arange(24).view(before)
    for h, w in itertools.product(range(3), range(8)):
        at = tuple(value(entry, h, w) for entry in found)
        assert numbers[at] == numbers.view(3, 8)[h, w]


def test_views_there_and_back_leave_the_index_as_it_was() -> None:
    place = (Index.of(H), Index.of(W))
    for between in ((24,), (3, 4, 2), (3, 2, 4), (6, 2, 2)):
        there = reshaped(place, (3, 8), between)
        assert reshaped(there, between, (3, 8)) == place, between
    assert str(Index.of(H) * 8 + Index.of(W) + 3) == "h * 8 + w + 3" and str(Index()) == "0"
    assert (Index.of(H) * 8 + Index.of(W)) // 8 == Index.of(H)
    assert (Index.of(H) * 8 + Index.of(W)) % 8 == Index.of(W)


def test_even_and_odd_columns_are_told_apart() -> None:
    halved, turn = Index.of(W) // 2, Index.of(W) % 2
    assert parity_of([Index.of(H), halved]) == W and parity_of([Index.of(W)]) is None
    half = W.half()
    assert (half.size, half.block, half.whole()) == (4, 8, W)
    for odd in (0, 1):
        put = {W: Index.of(half) * 2 + odd}
        assert halved.put(put) == Index.of(half) and turn.put(put) == Index((), odd)
    assert is_column(turn.terms[0][0]) and not is_column(H)
    assert is_mixed(Remainder(Index.of(H) + Index.of(W), 5)) and not is_mixed(W)


def test_a_range_that_a_condition_narrows() -> None:
    """Behind 3 columns of something else: h * 5 + (w - 3) is in row h, for the columns that matter."""
    behind = (Index.of(W) + -3).within(5)
    assert behind.range == (0, 4) and str(behind) == "(w + -3)"
    assert (Index.of(H) * 5 + behind) // 5 == Index.of(H) and Index.of(H).within(3) == Index.of(H)
    assert behind.put({W: Index((), 4)}) == Index((), 1)
    for w in range(3, 8):
        assert value(behind // 2, 0, w) == (w - 3) // 2 and value(behind % 2, 0, w) == (w - 3) % 2
