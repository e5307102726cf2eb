"""Which rows of a value a rank holds, and where they are in its shard."""

from __future__ import annotations

from sfcompile.runtime.program.value_rows import ValueRows

CUT = ValueRows((2, 10, 3), 1, (((0, 2), (6, 1)), ((2, 4), (7, 3)), ()))


def test_shapes() -> None:
    assert [CUT.local_shape(rank) for rank in range(3)] == [(2, 3, 3), (2, 7, 3), (2, 0, 3)]


def test_places_of_rows_that_are_there_and_none_of_others() -> None:
    assert CUT.place(1, 2, 6) == 0 and CUT.place(1, 3, 5) == 1 and CUT.place(1, 8, 10) == 5
    assert CUT.place(0, 6, 7) == 2 and CUT.place(2, 4, 4) == 0
    assert CUT.place(1, 5, 8) is None and CUT.place(0, 2, 3) is None and CUT.place(2, 0, 1) is None
