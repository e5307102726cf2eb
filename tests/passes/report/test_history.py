"""Plans are kept in order and numbered from 1."""

from __future__ import annotations

import pytest

from sfcompile.passes.report import history
from sfcompile.passes.report.report import GraphReport
from sfcompile.passes.report.whole_call import Skipped


def test_reports_are_numbered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_reports", [])
    assert history.last_report() is None
    first, second = (GraphReport(2, 1, 1, 2, ()) for _ in range(2))
    history.remember(first)
    history.remember(second)
    assert history.reports() == [first, second] and history.last_report() is second
    assert (first.graph, second.graph) == (1, 2)


def test_a_line_tells_of_the_graphs_that_none_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_reports", []), ("_skipped", []), ("_said", {"reports": 0, "skipped": 0})):
        monkeypatch.setattr(history, name, value)
    history.remember_skipped(Skipped("forward", "model.py:1", "a loop"))
    history.remember_skipped(Skipped("forward", "model.py:1", "a loop"))
    assert history.next_whole_call() == "", "nothing was compiled yet"
    history.remember(GraphReport(2, 1, 1, 2, ()))
    history.remember_skipped(Skipped("inner", "model.py:5", "a branch"))
    line = history.next_whole_call()
    assert line.count("forward (model.py:1)") == line.count("inner (model.py:5)") == 1
    assert history.next_whole_call() == ""
