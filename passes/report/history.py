"""The plans of the graphs that were compiled in this process, and the functions that are in no graph."""

from __future__ import annotations

from sfcompile.passes.report.report import GraphReport
from sfcompile.passes.report.whole_call import Skipped, whole_call

_reports: list[GraphReport] = []
_skipped: list[Skipped] = []
_said = {"reports": 0, "skipped": 0}
"""How many of each the lines of whole calls told of."""


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


def remember_skipped(frame: Skipped) -> None:
    """Add a function that Dynamo left to Python."""
    if frame not in _skipped:
        _skipped.append(frame)


def skipped() -> list[Skipped]:
    """Every function that Dynamo left to Python, in order."""
    return list(_skipped)


def next_whole_call() -> str:
    """The line for all graphs that no such line told of; "": there is nothing to say. A first call is over when one of
    its graphs is called again."""
    reports, frames = _reports[_said["reports"] :], _skipped[_said["skipped"] :]
    if not reports:
        return ""
    _said.update(reports=len(_reports), skipped=len(_skipped))
    return whole_call(reports, frames)
