"""Rows of a weight are dealt out once, and neighbouring ones to ranks of one place in their machines."""

from __future__ import annotations

import pytest

from sfcompile.errors import OptionError
from sfcompile.runtime.program.weight_rows import WeightRows, held_in_shares, places_of


@pytest.mark.parametrize(
    ("machine_of", "places"),
    [
        ((0, 0), (0, 1)),
        ((0, 1), (0, 1)),
        ((0, 0, 1, 1), (0, 2, 1, 3)),
        ((3, 1, 3, 1, 3, 1), (0, 1, 2, 3, 4, 5)),
        ((0, 0, 0, 1), (0, 1, 2, 3)),
    ],
)
def test_places(machine_of: tuple[int, ...], places: tuple[int, ...]) -> None:
    assert places_of(machine_of) == places


def test_each_machine_holds_all() -> None:
    assert places_of((3, 1, 3, 1), by_machine=True) == (0, 0, 1, 1)
    weight = WeightRows((7, 3), places_of((0, 0, 1, 1), by_machine=True))
    assert weight.count == 2 and [weight.rows(rank) for rank in range(4)] == [(0, 4), (4, 7)] * 2


def test_every_row_is_one_ranks() -> None:
    weight = WeightRows((7, 3), places_of((0, 0, 1, 1)))
    rows = sorted(row for rank in range(4) for row in range(*weight.rows(rank)))
    assert rows == list(range(7))
    assert [weight.local_shape(rank) for rank in range(4)] == [(2, 3), (2, 3), (2, 3), (1, 3)]
    assert weight.rows(1) == (4, 6) and weight.owned[1] == ((4, 2),)


@pytest.mark.parametrize(
    ("weights", "on_gpu", "machine_of", "places"),
    [
        ("whole", True, (0, 0, 1, 1), None),
        ("sharded", False, (0, 0), None),
        ("sharded", True, (0, 0), (0, 1)),
        ("sharded", False, (0, 0, 1, 1), (0, 2, 1, 3)),
        ("sharded", True, (0,), None),
        ("sharded-by-machine", False, (0, 0, 1, 1), None),
        ("sharded-by-machine", True, (0, 0, 1, 1), (0, 1, 0, 1)),
        ("sharded-by-machine", True, (0, 1), None),
    ],
)
def test_who_keeps_shares(
    weights: str, on_gpu: bool, machine_of: tuple[int, ...], places: tuple[int, ...] | None
) -> None:
    assert held_in_shares(weights, on_gpu, machine_of) == places


def test_machines_that_are_not_alike() -> None:
    with pytest.raises(OptionError, match="machines of unequal numbers of ranks"):
        held_in_shares("sharded-by-machine", True, (0, 0, 1))
    assert held_in_shares("sharded-by-machine", False, (0, 0, 1)) is None
