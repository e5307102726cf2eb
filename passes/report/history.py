"""The plans of the graphs that were compiled in this process."""

from __future__ import annotations

from sfcompile.passes.report.report import GraphReport

_reports: list[GraphReport] = []


def remember(report: GraphReport) -> None:
    """Add a plan and number it, from 1."""
    _reports.append(report)
    report.graph = len(_reports)


def reports() -> list[GraphReport]:
    """The plan of every graph compiled in this process, in order."""
    return list(_reports)


def last_report() -> GraphReport | None:
    """The plan of the graph compiled last, or None."""
    return _reports[-1] if _reports else None
