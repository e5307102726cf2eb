"""One line for the whole call of a model that is several graphs: why, what it costs, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfcompile.passes.report.report import GraphReport, short_source


@dataclass(frozen=True)
class Skipped:
    """A function that Dynamo leaves to Python: its own ops are in no graph, and run whole on every rank.

    Attributes:
        name: of the function, with its class.
        place: file and line where it begins.
        reason: of the break in it that Dynamo cannot continue after, with its place.
    """

    name: str
    place: str
    reason: str


_ITEM = "compute the number from shapes, or give it to the model as an int"
CURES = {
    "Unsupported Tensor.item()": _ITEM,
    "Data dependent operator": _ITEM,
    "generic_jump": "decide by a Python number, or write torch.where",
    "Data-dependent branching": "decide by a Python number, or write torch.where",
    "Dynamic shape operator": "keep all rows and multiply by a mask, or write torch.where",
    "Attempted to call function marked as skipped": "call it outside of the model",
    "Failed to trace builtin operator": "call it outside of the model",
}
"""What to do about a break, by the beginning of Dynamo's words for it."""
_CURE = "TORCH_LOGS=graph_breaks tells more"


def whole_call(reports: Sequence[GraphReport], skipped: Sequence[Skipped]) -> str:
    """The line for the graphs of one call, in order; "": it is one graph, or several without a break."""
    reasons = [report.break_reason for report in reports if report.break_reason]
    if not reasons and not skipped:
        return ""
    ranks = max(report.num_ranks for report in reports)
    total = sum(report.total_flops for report in reports)
    per_rank = [sum(report.rank_flops[rank] for report in reports if report.rank_flops) for rank in range(ranks)]
    share = f", busiest rank {max(per_rank) * ranks / total:.2f} x FLOPs/{ranks} in all of them" if total else ""
    sites = sum(report.sharded_sites for report in reports)
    gathers = sum(len(report.gathered) for report in reports)
    said = [
        f"the whole call is {_count(len(reports), 'graph')}, {_count(sites, 'sharded attention')}, "
        f"{_count(gathers, 'gather')}{share}",
        *(f"broken at {reason}: {_cure(reason)}" for reason in _each_once(reasons)),
        *(
            f"{frame.name} ({frame.place}) is left to Python, its own ops are in no graph and run whole on every rank: "
            f"{frame.reason}: {_cure(frame.reason)}"
            for frame in skipped
        ),
    ]
    at_breaks = sum(len(report.gathered) for report in reports if report.break_reason and not report.boundary)
    if at_breaks:
        gathered = f"{_count(at_breaks, 'gather')} of these in graphs that end at a break"
        said.append(f"{gathered}: options={{'boundaries': 'shards'}} hands values on in shards")
    return "; ".join(said)


def _each_once(reasons: Sequence[str]) -> list[str]:
    """Reasons with short places, and how often each came."""
    short = [_short(reason) for reason in reasons]
    return [
        f"{reason} ({times} x)" if (times := short.count(reason)) > 1 else reason for reason in dict.fromkeys(short)
    ]


def _short(reason: str) -> str:
    what, at, place = reason.rpartition(" at ")
    return f"{what} at {short_source(place)}" if at else reason


def _cure(reason: str) -> str:
    return next((cure for beginning, cure in CURES.items() if reason.startswith(beginning)), _CURE)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
