"""An explanation as one page that needs nothing else: no request leaves it, and it works from a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from sfcompile.passes.report.report import Left, short_source
from sfcompile.prediction.code import Block, Line
from sfcompile.prediction.explained import Attentions, Explained, ExplainedGraph
from sfcompile.prediction.page import SCRIPT, STYLE
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
_ROW, _LANE = 40, 8
_PLACES = "".join(
    f'<li><i class="w-{name}"></i>{words}</li>'
    for name, words in (
        ("sharded", "computed on this rank's tokens"),
        ("whole", "computed whole by every rank"),
        ("wire", "talks to other ranks"),
    )
)
# Nothing may be loaded: a mistake of ours would be an error in the browser's console rather than a request.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(explained: Explained) -> str:
    """The whole page as HTML text."""
    title = f"{explained.name} on {explained.where}"
    data = json.dumps(explained.to_dict(), default=str).replace("</", "<\\/")
    graphs = "".join(_graph(graph, len(explained.graphs)) for graph in explained.graphs)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"{_head(explained, title)}{_timeline(explained)}{graphs}</main>"
        f'<script type="application/json" id="explanation">{data}</script><script>{SCRIPT}</script></body></html>\n'
    )


def _head(explained: Explained, title: str) -> str:
    step = explained.step_s
    share = f"{explained.exposed_s / step:.1%} of the step" if step else ""
    limit = f"{explained.limit_s / step:.0%} of the step" if step else ""
    cards = [
        ("predicted step", duration(step), f"rank {explained.rank}, from the topology's constants"),
        ("exposed", duration(explained.exposed_s), f"blocked in waits; {share}"),
        ("limit", duration(explained.limit_s), f"compute alone or bytes / bandwidth; {limit}"),
        *((name, amount, words) for name, amount, words in memory_rows(explained)),
    ]
    boxes = "".join(
        f'<div class="card"><h3>{escape(name)}</h3><b>{escape(value)}</b><p>{escape(words)}</p></div>'
        for name, value, words in cards
    )
    stopped = f'<p class="warn">The model\'s own code stopped the trace: {escape(explained.stopped)}</p>' * bool(
        explained.stopped
    )
    sub = f"{ranks(explained)}; explained in {explained.seconds:.1f} s in one process. "
    sub += "Times are predicted; nothing was run."
    head = f'<h1>{escape(title)}</h1><p class="sub">{escape(sub)}</p>'
    return f'{head}<div class="cards">{boxes}</div>{stopped}{_bar(explained)}'


def _bar(explained: Explained) -> str:
    """What a step is made of, as one bar."""
    step = explained.step_s
    if not step:
        return ""
    waits = explained.exposed_s
    rows = step_rows(explained)
    named = [(name, seconds, words) for name, seconds, words in rows if seconds > 0.0]
    segments = "".join(
        f'<i class="k-{name.replace(" ", "-")}" style="width:{100 * seconds / step:.3f}%" '
        f'title="{escape(f"{name}: {duration(seconds)}")}"></i>'
        for name, seconds, _ in named
    )
    legend = "".join(
        f'<li><i class="k-{name.replace(" ", "-")}"></i>{escape(name)} <b>{duration(seconds)}</b> '
        f"<span>{escape(words)}</span></li>"
        for name, seconds, words in named
    )
    extra = f"<li>of all this, <b>{duration(waits)}</b> <span>blocked in waits</span></li>"
    return f'<h2>A step</h2><div class="bar">{segments}</div><ul class="legend">{legend}{extra}</ul>'


# ---------------------------------------------------------------------- timeline


def _timeline(explained: Explained) -> str:
    drawn = explained.timeline()
    if drawn is None:
        return ""
    layers, title = drawn
    topology, end = layers.topology, layers.seconds
    shown = shown_ranks(topology.machine_of, MAX_RANKS)
    if not end:
        return ""
    rows = {rank: row for row, rank in enumerate(shown)}
    lanes = {lane: at for at, lane in enumerate(LANES)}
    marks = []
    for span in layers.spans:
        if span.rank not in rows:
            continue
        top = rows[span.rank] * _ROW + 3 + lanes[span.lane] * (_LANE + 1)
        what = f"rank {span.rank}: {span.name}, {duration(span.stop_s - span.start_s)}"
        what += f", {size(span.nbytes)}" if span.nbytes else ""
        x, width = 100 * span.start_s / end, 100 * (span.stop_s - span.start_s) / end
        marks.append(
            f'<rect class="l-{span.lane}" x="{x:.3f}%" y="{top}" width="{max(width, 0.03):.3f}%" height="{_LANE}">'
            f"<title>{escape(what)}</title></rect>"
        )
    height = len(shown) * _ROW
    grid = "".join(f'<line class="grid" x1="{x}%" x2="{x}%" y1="0" y2="{height}"/>' for x in range(0, 101, 10))
    rules = "".join(
        f'<line class="rule" x1="0" x2="100%" y1="{row * _ROW}" y2="{row * _ROW}"/>'
        for row, rank in enumerate(shown)
        if row and topology.machine_of[rank] != topology.machine_of[shown[row - 1]]
    )
    names = "".join(f"<div>rank {rank}<small>machine {topology.machine_of[rank]}</small></div>" for rank in shown)
    ticks = "".join(f'<span style="left:{x}%">{duration(end * x / 100)}</span>' for x in range(0, 101, 20))
    legend = "".join(f'<li><i class="l-{lane}"></i>{escape(LANE_WORDS[lane])}</li>' for lane in LANES)
    some = "" if len(shown) == topology.num_ranks else f"; {len(shown)} of {topology.num_ranks} ranks shown"
    return (
        f'<h2>Timeline</h2><p class="sub">{escape(title + some)}; ends after {duration(end)}. '
        "Point at a bar to read it; in gaps a rank starts messages. "
        '<label>zoom <input id="zoom" type="range" min="1" max="12" value="1" step="0.5"></label></p>'
        f'<ul class="legend">{legend}</ul><div class="line"><div class="names">{names}</div><div class="scroll">'
        f'<div id="wide"><svg width="100%" height="{height}" role="img" aria-label="predicted timeline">{grid}{rules}'
        f'{"".join(marks)}</svg><div class="ticks">{ticks}</div></div></div></div>'
    )


# ---------------------------------------------------------------------- one graph


def _graph(graph: ExplainedGraph, count: int) -> str:
    head = f"<h2>Graph {graph.number} of {count}</h2>" if count > 1 else ""
    if graph.break_reason:
        head += f'<p class="warn">Ends at a graph break: {escape(graph.break_reason)}</p>'
    if graph.refused or graph.report is None:
        return f'<section>{head}<p class="warn">Runs unsharded: {escape(graph.refused)}</p></section>'
    axes = _items(map(axis_words, graph.axes)) or "<p>None: no attention was found.</p>"
    notes = [*(graph.choices.notes if graph.choices is not None else ()), batch_words(graph)]
    kinds = (
        _items(filter(None, notes)) + "".join(map(_attention, graph.attentions))
        or "<p>No attention is sharded over tokens.</p>"
    )
    warnings = "".join(f'<p class="warn">{escape(text)}</p>' for text in graph.report.warnings)
    sent, across = graph.sent
    blocks = "".join(_block(block, graph) for block in graph.blocks)
    return (
        f"<section>{head}{warnings}<h2>Sequence axes</h2>{axes}<h2>Plan</h2>{kinds}"
        f"<h2>What stays whole, and why</h2>"
        f"{_left('Token ops that every rank computes whole', left_of(graph))}"
        f"{_left('Gathered: sharded values that some reader needs whole', graph.report.gathered)}"
        f"{_left('Exchanged in part: halos, other cuts, another dim', graph.report.moved)}"
        f'<h2>This rank\'s graph</h2><p class="sub">{duration(graph.seconds())} a step; the rank sends {size(sent)} '
        f"({size(across)} to other machines). Layers that are alike are shown once. "
        '<label><input type="checkbox" class="views"> views and cuts too</label> '
        '<input class="find" type="search" placeholder="filter lines" aria-label="filter lines"></p>'
        f'<ul class="legend">{_PLACES}</ul><div class="code">{blocks}</div></section>'
    )


def _items(texts: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def _attention(kind: Attentions) -> str:
    taken = kind.plan.price
    priced = [row for row in kind.plan.rows if row.seconds is not None]
    refused = [row for row in kind.plan.rows if row.seconds is None]
    most = max((row.seconds or 0.0 for row in priced), default=1.0) or 1.0
    rows = []
    for row in priced:
        assert row.seconds is not None
        bar = f'<div class="cost"><i style="width:{100 * row.seconds / most:.2f}%"></i></div>'
        cells = [
            f"<td>{escape(str(row.candidate))}</td><td>{bar}</td>",
            *(f'<td class="n">{1e3 * value:.3f}</td>' for value in (row.seconds, row.exposed_s, row.limit_s)),
            *(f'<td class="n">{size(value)}</td>' for value in (row.across_bytes, row.inside_bytes, row.heap_bytes)),
            f"<td>{escape(row.reason or 'taken')}</td>",
        ]
        rows.append(f'<tr class="{"taken" if row is taken else ""}">{"".join(cells)}</tr>')
    hidden = len(rows) - ROWS
    heads = ("plan", "", "ms a layer", "exposed", "limit", "between machines", "inside", "heap", "why not")
    numbers = ("ms a layer", "exposed", "limit", "between machines", "inside", "heap")
    head = "".join(f'<th class="{"n" if name in numbers else ""}">{name}</th>' for name in heads)
    head = f"<thead><tr>{head}</tr></thead>"
    others = "".join(f"<tr><td>{escape(str(r.candidate))}</td><td>{escape(r.reason)}</td></tr>" for r in refused)
    symbols = ", ".join(f"{name} = {value}" for name, value in kind.symbols.items())
    links = "".join(
        f'<tr><td>{name}</td><td><code>{escape(form)}</code></td><td class="n">{size(value)}</td>'
        f'<td class="n">{size(sent)}</td></tr>'
        for name, (form, value, sent) in (("inside machines", kind.inside), ("between machines", kind.across))
    )
    return (
        f"<h3>{kind.count} attention{'s' * (kind.count > 1)}: {escape(kind.what)}</h3>"
        f'<div class="wide"><table class="plan">{head}<tbody>{"".join(rows[:ROWS])}</tbody></table></div>'
        + f'<details><summary>{hidden} more, dearer</summary><div class="wide"><table class="plan">{head}'
        f"<tbody>{''.join(rows[ROWS:])}</tbody></table></div></details>"
        * (hidden > 0)
        + f"<details><summary>{len(refused)} more that needed no simulation</summary><table>{others}</table></details>"
        * bool(refused)
        + '<div class="wide"><table><thead><tr><th>bytes of one attention, all ranks</th><th>closed form</th>'
        f'<th class="n">its value</th><th class="n">sent</th></tr></thead><tbody>{links}</tbody></table></div>'
        f'<p class="sub">with {escape(symbols)}</p>'
        "<details><summary>The schedule that every rank runs, in offsets</summary>"
        f"<pre>{escape(kind.steps)}</pre></details>"
    )


def _left(title: str, rows: Sequence[Left]) -> str:
    if not rows:
        return f"<h3>{escape(title)}: none</h3>"
    body = "".join(
        f'<tr><td><code>{escape(row.node)}</code></td><td>{escape(row.op)}</td><td class="n">'
        f"{f'{count} x ' if count > 1 else ''}{cost(row)}</td>"
        f"<td>{escape(row.reason)}</td><td><code>{escape(row.source)}</code></td></tr>"
        for row, count in alike(rows)
    )
    head = '<th>value</th><th>op</th><th class="n">cost</th><th>why</th><th>your line</th>'
    return (
        f'<h3>{escape(title)}: {len(rows)}</h3><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _block(block: Block, graph: ExplainedGraph) -> str:
    whole = graph.seconds() or 1.0
    share = 100 * block.alike * block.seconds / whole
    alike = f"{block.alike} alike, " if block.alike > 1 else ""
    head = (
        f"{escape(block.name or 'between layers')} <span>{alike}{duration(block.seconds)} each, {share:.1f}% of a step"
    )
    most = max((line.seconds for line in block.lines), default=0.0) or 1.0
    lines = "".join(_line(line, most) for line in block.lines)
    opened = " open" if block.name and share > 10 else ""
    return f"<details{opened}><summary>{head}</span></summary><table>{lines}</table></details>"


def _line(line: Line, most: float) -> str:
    took = "" if line.seconds <= 0 else duration(line.seconds)
    waits = f"{duration(line.waits_s)} waiting" if line.waits_s > 0 else ""
    sent = f"{size(line.nbytes)} sent" if line.nbytes else ""
    note = ", ".join(text for text in (sent, waits, line.reason) if text)
    bar = f'<div class="cost"><i style="width:{100 * line.seconds / most:.1f}%"></i></div>' if line.seconds else ""
    quiet = "" if line.matters else " quiet"
    return (
        f'<tr class="p-{line.placement}{quiet}"><td class="p" title="{line.placement}"></td>'
        f"<td><code>{escape(line.text)}</code></td><td><code>{escape(line.value)}</code></td><td>{bar}</td>"
        f'<td class="n">{took}</td><td>{escape(note)}</td>'
        f'<td title="{escape(line.source)}"><code>{escape(short_source(line.source))}</code></td></tr>'
    )
