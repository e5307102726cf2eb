"""An explanation as one page that needs nothing else: no request leaves it, and it works from a file.

What the page looks like is in page.html.jinja, page.css and page.js; here is what they are given.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from sfcompile.passes.report.report import short_source
from sfcompile.prediction.code import Line
from sfcompile.prediction.explained import Explained, ExplainedGraph
from sfcompile.prediction.text import (
    alike,
    axis_words,
    batch_words,
    cost,
    duration,
    left_of,
    memory_rows,
    ranks,
    size,
    step_rows,
)
from sfcompile.prediction.timeline import LANE_WORDS, LANES, shown_ranks

MAX_RANKS = 8
"""Ranks that the timeline shows; more make it large and say little, as ranks run alike."""
ROWS = 12
"""Candidates of a plan that are shown at once."""
NARROWEST = 0.03
"""Percent of a drawing that a bar is wide at least, so that it can be pointed at."""
_ROW, _LANE, _MAP_ROW = 40, 8, 32
# Nothing may be loaded: a mistake of ours would be an error in the browser's console rather than a request.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_FOLDER = Path(__file__).parent
_SENDERS = {
    "put": "queries, keys and values on their way to the ranks that attend to them",
    "attend": "chunks that are passed on, and outputs on their way home, while a rank attends",
    "collect": "outputs that come home last",
    "gather": "values that some reader needs whole",
    "exchange": "halos, other cuts, another dim",
}


class Bar(NamedTuple):
    """A bar of a drawing: its class, its place (across in percent, down in pixels), and what it says when pointed at;
    ``block`` is the id of the block of lines that it belongs to."""

    kind: str
    x: float
    width: float
    y: int
    text: str
    block: str = ""


class TimelineDrawing(NamedTuple):
    """What the timeline shows: ``ranks`` with their machines, ``rules`` between machines, and the bars."""

    title: str
    seconds: float
    ranks: list[tuple[int, int]]
    height: int
    lane: int
    rules: list[int]
    marks: list[Bar]


def page(explained: Explained) -> str:
    """The whole page as HTML text."""
    return _template().render(
        explained=explained,
        title=f"{explained.name} on {explained.where}",
        policy=_POLICY,
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup((_FOLDER / "page.js").read_text(encoding="utf-8")),
        data=Markup(json.dumps(explained.to_dict(), default=str).replace("</", "<\\/")),
        cards=_cards(explained),
        step_rows=[row for row in step_rows(explained) if row[1] > 0.0],
        timeline=_timeline(explained),
        lanes={lane: LANE_WORDS[lane] for lane in LANES},
        most_rows=ROWS,
    )


@cache
def _template() -> Template:
    known = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = (alike, axis_words, cost, duration, left_of, ranks, short_source, size)
    known.filters |= {word.__name__: word for word in words}
    known.filters |= {
        "bytes_rows": bytes_rows, "map_marks": _map, "note": _note, "notes": _notes, "share": lambda x: f"{x:.3f}",
        "sum_of_two": lambda row: row[1] + row[2],
    }  # fmt: skip
    return known.get_template("page.html.jinja")


def _cards(explained: Explained) -> list[tuple[str, str, str]]:
    step = explained.step_s
    share = f"{explained.exposed_s / step:.1%} of the step" if step else ""
    limit = f"{explained.limit_s / step:.0%} of the step" if step else ""
    return [
        ("predicted step", duration(step), f"rank {explained.rank}, from the topology's constants"),
        ("exposed", duration(explained.exposed_s), f"blocked in waits; {share}"),
        ("limit", duration(explained.limit_s), f"compute alone or bytes / bandwidth; {limit}"),
        *memory_rows(explained),
    ]


def _timeline(explained: Explained) -> TimelineDrawing | None:
    drawn = explained.timeline()
    if drawn is None or not drawn[0].seconds:
        return None
    layers, title = drawn
    homes, end = layers.topology.machine_of, layers.seconds
    shown = shown_ranks(homes, MAX_RANKS)
    rows = {rank: row for row, rank in enumerate(shown)}
    lanes = {lane: at for at, lane in enumerate(LANES)}
    marks = []
    for span in layers.spans:
        if span.rank not in rows:
            continue
        took = span.stop_s - span.start_s
        text = f"rank {span.rank}: {span.name}, {duration(took)}" + (f", {size(span.nbytes)}" if span.nbytes else "")
        y = rows[span.rank] * _ROW + 3 + lanes[span.lane] * (_LANE + 1)
        width = max(100 * took / end, NARROWEST)
        marks.append(Bar(f"l-{span.lane}", 100 * span.start_s / end, width, y, text))
    some = "" if len(shown) == len(homes) else f"; {len(shown)} of {len(homes)} ranks shown"
    rules = [row * _ROW for row, rank in enumerate(shown) if row and homes[rank] != homes[shown[row - 1]]]
    places = [(rank, homes[rank]) for rank in shown]
    return TimelineDrawing(title + some, end, places, len(shown) * _ROW, _LANE, rules, marks)


def _map(graph: ExplainedGraph, number: int) -> list[Bar]:
    """The graph by time: its blocks, each as wide as all that are like it take together, above their lines."""
    whole = sum(block.alike * block.seconds for block in graph.blocks)
    if not whole:
        return []
    marks, x = [], 0.0
    for index, block in enumerate(graph.blocks):
        name, times = block.name or "between layers", f"{block.alike} x " if block.alike > 1 else ""
        width, key = 100 * block.alike * block.seconds / whole, f"block-{number}-{index}"
        if width:
            marks.append(Bar("block", x, width, 0, f"{name}: {times}{duration(block.seconds)}", key))
        for line in block.lines:
            wide = 100 * block.alike * line.seconds / whole
            if wide:
                marks.append(Bar(f"p-{line.placement}", x, wide, _MAP_ROW, f"{line.text}: {_took(line)}", key))
            x += wide
    return marks


def _took(line: Line) -> str:
    note = _note(line)
    return duration(line.seconds) + (f"; {note}" if note else "")


def bytes_rows(graph: ExplainedGraph) -> list[tuple[str, int, int, str]]:
    """What this rank sends in a step, by the kind of line that sends it: ``(kind, bytes inside the machine, bytes to
    other machines, in words)``; kinds that send nothing are left out."""
    rows = []
    for kind, words in _SENDERS.items():
        lines = [(block.alike, line) for block in graph.blocks for line in block.lines if line.kind == kind]
        sent = sum(count * line.nbytes for count, line in lines)
        across = sum(count * line.across for count, line in lines)
        if sent:
            rows.append((kind, sent - across, across, words))
    return rows


def _notes(graph: ExplainedGraph) -> list[str]:
    notes = [*(graph.choices.notes if graph.choices is not None else ()), batch_words(graph)]
    return [note for note in notes if note]


def _note(line: Line) -> str:
    sent = f"{size(line.nbytes)} sent" if line.nbytes else ""
    waits = f"{duration(line.waits_s)} waiting" if line.waits_s > 0 else ""
    return ", ".join(text for text in (sent, waits, line.reason) if text)
