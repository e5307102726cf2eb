"""Timelines for people: a picture (PNG), and a trace that https://ui.perfetto.dev opens (Chrome's JSON format)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfcompile.errors import OptionError
from sfcompile.runtime.program.spans import Span

LANES = ("compute", "wait", "send", "network")
"""From top to bottom: computing, blocked, messages inside the machine, messages between machines."""

STAGE = "stage"
"""A lane of recorded runs only: the nodes of the graph that talk to other ranks; pictures leave it out."""

# Okabe and Ito's palette: told apart by every kind of colour vision.
_COLOURS = {"compute": "#0072B2", "wait": "#D55E00", "send": "#009E73", "network": "#E69F00"}
LANE_WORDS = {
    "compute": "compute", "wait": "blocked in a wait", "send": "sends inside the machine",
    "network": "sends between machines",
}  # fmt: skip
"""What the lanes are, in words."""
_ROW, _GAP = 1.0, 0.35
_MAX_RANKS = 16


def write_perfetto(
    path: Path,
    spans: Sequence[Span],
    machine_of: Sequence[int],
    title: str,
    predicted: Sequence[Span] = (),
    ranks: Sequence[int] | None = None,
) -> None:
    """Write a trace: one process per rank, one thread per lane, an arrow from each message to its receiver.

    Args:
        predicted: a simulated run; its ranks are further processes, below the others.
        ranks: only these have processes (default: all).

    Raises:
        OptionError: the folder does not exist, or the file cannot be written.
    """
    events: list[dict[str, Any]] = []
    shown = range(len(machine_of)) if ranks is None else ranks
    events += _processes(shown, machine_of, 0, "", spans)
    events += _events(spans, 0, 0, set(shown))
    if predicted:
        events += _processes(shown, machine_of, len(machine_of), "predicted ", predicted)
        events += _events(predicted, len(machine_of), len(spans), set(shown))
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"title": title}})
    write_text(path, text)


def _processes(
    ranks: Sequence[int], machine_of: Sequence[int], first: int, what: str, spans: Sequence[Span]
) -> list[dict[str, Any]]:
    """The names of processes and threads; ``first`` is the process of rank 0."""
    events = []
    stages = any(span.lane == STAGE for span in spans)
    for rank in ranks:
        pid = first + rank
        events.append(_name("process_name", pid, 0, f"{what}rank {rank} (machine {machine_of[rank]})"))
        events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}})
        for lane, name in enumerate(LANES):
            events.append(_name("thread_name", pid, lane, LANE_WORDS[name]))
        if stages:
            events.append(_name("thread_name", pid, len(LANES), "stages of the graph"))
            top = {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": len(LANES), "args": {"sort_index": -1}}
            events.append(top)
    return events


def _events(spans: Sequence[Span], first: int, number: int, shown: set[int]) -> list[dict[str, Any]]:
    """The spans, and arrows between ranks that are shown, numbered from ``number`` on."""
    events = []
    for arrow_id, span in enumerate(spans, start=number):
        lane = len(LANES) if span.lane == STAGE else LANES.index(span.lane)
        start, stop = span.start_s * 1e6, span.stop_s * 1e6
        event = {"ph": "X", "name": span.name, "cat": span.lane, "pid": first + span.rank, "tid": lane, "ts": start}
        events.append({**event, "dur": stop - start, "args": {"bytes": span.nbytes} if span.nbytes else {}})
        if span.peer in shown:
            arrow = {"name": span.name, "cat": "message", "id": arrow_id}
            events.append({**arrow, "ph": "s", "pid": first + span.rank, "tid": lane, "ts": start})
            end = {"pid": first + span.peer, "tid": LANES.index("wait"), "ts": stop}
            events.append({**arrow, "ph": "f", "bp": "e", **end})
    return events


def _name(kind: str, rank: int, lane: int, text: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": lane, "args": {"name": text}}


def write_png(path: Path, spans: Sequence[Span], machine_of: Sequence[int], title: str) -> None:
    """Draw the ranks side by side, by machine; beyond _MAX_RANKS the first ranks of every machine.

    Raises:
        OptionError: nothing to draw, no matplotlib, or the file cannot be written.
    """
    if not spans:
        raise OptionError("there is nothing to draw", "the timeline is empty", "simulate at least one step")
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise OptionError(
            "a picture needs matplotlib, which is not installed", "", 'run pip install "sfcompile[plot]"'
        ) from error
    shown = shown_ranks(machine_of, _MAX_RANKS)
    scale, unit = _unit(max(span.stop_s for span in spans))
    figure = Figure(figsize=(12.0, 1.6 + 0.42 * len(shown)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    lanes: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for span in spans:
        lanes.setdefault((span.rank, span.lane), []).append(
            (span.start_s * scale, (span.stop_s - span.start_s) * scale)
        )
    height = _ROW / len(LANES)
    for row, rank in enumerate(shown):
        top = -row * (_ROW + _GAP)
        for lane, name in enumerate(LANES):
            bars = lanes.get((rank, name), [])
            axes.broken_barh(bars, (top - (lane + 1) * height, 0.9 * height), facecolors=_COLOURS[name], linewidth=0)
        if row and machine_of[rank] != machine_of[shown[row - 1]]:
            axes.axhline(top + _GAP / 2, color="0.6", linewidth=0.8)
    axes.set_yticks(
        [-row * (_ROW + _GAP) - _ROW / 2 for row in range(len(shown))],
        [f"rank {rank}, machine {machine_of[rank]}" for rank in shown],
        fontsize=8,
    )
    end = max(span.stop_s for span in spans) * scale
    axes.axvline(end, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlim(0.0, end * 1.01)
    axes.set_ylim(-len(shown) * (_ROW + _GAP) + _GAP / 2, _GAP / 2)
    axes.set_xlabel(f"{unit}; ends at {end:.2f} {unit}")
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    some = "" if len(shown) == len(machine_of) else f"; {len(shown)} of {len(machine_of)} ranks shown"
    axes.set_title(title + some, fontsize=10, loc="left", pad=26)
    axes.legend(
        handles=[Patch(color=_COLOURS[name], label=LANE_WORDS[name]) for name in LANES],
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(LANES), frameon=False, fontsize=8, borderaxespad=0.2,
    )  # fmt: skip
    folder = _folder(path)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        half = Path(scratch) / "picture.png"
        figure.savefig(half)
        os.replace(half, path)


def shown_ranks(machine_of: Sequence[int], limit: int) -> list[int]:
    """The first ranks of every machine, as many of each, until the limit."""
    ranks: dict[int, list[int]] = {}
    for rank, machine in enumerate(machine_of):
        ranks.setdefault(machine, []).append(rank)
    if len(machine_of) <= limit:
        return [rank for group in ranks.values() for rank in group]
    each = max(1, limit // len(ranks))
    return [rank for group in list(ranks.values())[:limit] for rank in group[:each]]


def _unit(seconds: float) -> tuple[float, str]:
    for scale, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * scale < 1000.0:
            return scale, unit
    return 1.0, "s"


def _folder(path: Path) -> Path:
    if not path.parent.is_dir():
        raise OptionError(f"{path} cannot be written", f"there is no folder {path.parent}", "create it first")
    return path.parent


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; through a link, and into a pipe or a device (/dev/stdout), as it comes.

    Raises:
        OptionError: the folder does not exist, or the file cannot be written.
    """
    folder = _folder(path)
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):  # a new file would take its place
            path.write_text(text, encoding="utf-8")
            return
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            half = Path(scratch) / "half"
            half.write_text(text, encoding="utf-8")
            os.replace(half, path)
    except OSError as error:
        raise OptionError(
            f"{path} cannot be written", str(error), "choose a folder with room that you may write"
        ) from error
