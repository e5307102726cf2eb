"""Plans are kept in order and numbered from 1."""

from __future__ import annotations

import pytest

from sfcompile.passes.report import history
from sfcompile.passes.report.report import GraphReport


def test_reports_are_numbered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_reports", [])
    assert history.last_report() is None
    first, second = (GraphReport(2, 1, 1, 2, ()) for _ in range(2))
    history.remember(first)
    history.remember(second)
    assert history.reports() == [first, second] and history.last_report() is second
    assert (first.graph, second.graph) == (1, 2)
