"""Steps of all ranks or of none."""

from __future__ import annotations

from typing import Any

import pytest

from sfcompile.errors import HeapError, UnsupportedError
from sfcompile.runtime.gpu.together import together

TOLD = ("it is missing", "all ranks need it", "install it")


def test_what_ends_well_everywhere_is_returned() -> None:
    said: list[tuple[Any, str]] = []

    def share(value: Any, doing: str) -> list[Any]:
        said.append((value, doing))
        return [value, None]

    assert together(share, "take a step", lambda: 7) == 7 and said == [(None, "take a step")]


def test_a_failure_is_told_and_everybodys() -> None:
    def fails() -> None:
        raise HeapError("no room", "two banks are needed", "make room")

    told: list[Any] = []
    with pytest.raises(HeapError, match="no room") as own:
        together(lambda value, doing: told.append(value) or [value, None], "take a step", fails)
    assert own.value.on_every_rank and told == [("no room", "two banks are needed", "make room", False)]
    with pytest.raises(UnsupportedError, match="rank 1: it is missing. All ranks need it. Install it") as other:
        together(lambda value, doing: [value, TOLD], "take a step", lambda: 7)
    assert other.value.on_every_rank


def test_who_only_waited_in_vain_is_told_what_went_wrong() -> None:
    """It fails on rank 1, and rank 0 waits for it until time is up. Where all do, each has its own error."""

    def late() -> None:
        raise HeapError("no answer", "", "") from TimeoutError()

    with pytest.raises(UnsupportedError, match="rank 1: it is missing"):
        together(lambda value, doing: [value, (*TOLD, False)], "take a step", late)
    with pytest.raises(HeapError, match="no answer"):
        together(lambda value, doing: [value, ("it waited", "", "", True)], "take a step", late)
    with pytest.raises(UnsupportedError, match="rank 2: it is missing"):
        together(lambda value, doing: [value, ("it waited", "", "", True), (*TOLD, False)], "take a step", lambda: None)


def test_what_is_no_error_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        together(lambda value, doing: [value], "take a step", lambda: 1 // 0)
