"""Calls that end in time give their value or their error; others are not waited for."""

from __future__ import annotations

import threading

import pytest

from sfcompile.runtime.rank.bounded import within


def test_values_and_errors_come_through() -> None:
    assert within(20.0, lambda: 3) == 3
    assert within(20.0, lambda: None) is None
    with pytest.raises(KeyError, match="mine"):
        within(20.0, lambda: {}["mine"])


def test_what_does_not_end_is_left_alone() -> None:
    go_on = threading.Event()
    with pytest.raises(TimeoutError, match="no answer within 0.05 s"):
        within(0.05, lambda: go_on.wait(20.0))
    go_on.set()
