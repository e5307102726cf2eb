"""An explanation as tables for a terminal, and the words and units that the page uses too."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sfcompile.passes.report.report import Left, groups_do, short_source
from sfcompile.prediction.code import Block, Line
from sfcompile.prediction.explained import Attentions, Axis, Explained, ExplainedGraph
from sfcompile.runtime.program.weight_rows import held_in_shares

CANDIDATES, LEFT = 10, 12
"""Rows that a short explanation shows of each table."""
WORTH = 0.02
"""Part of its block's time from which a short explanation shows a line."""
COMMUNICATION = ("put", "attend", "collect", "gather", "exchange")
ATTENTION = ("put", "attend", "collect")


def size(nbytes: float) -> str:
    """Bytes for people: ``28.7 MiB``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds for people: ``3.51 ms``."""
    if seconds <= 0.0:
        return "0"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def ranks(explained: Explained) -> str:
    """How many ranks on how many machines."""
    machines, count = explained.topology.num_machines, explained.topology.num_ranks
    return f"{count} rank{'s' * (count > 1)} on {machines} machine{'s' * (machines > 1)}"


def step_rows(explained: Explained) -> list[tuple[str, float, str]]:
    """What a step is made of, on the rank that is shown: ``(name, seconds, in words)``."""

    def total(*kinds: str, placement: str = "") -> float:
        return sum(graph.seconds(*kinds, placement=placement) for graph in explained.graphs)

    return [
        ("attention", total(*ATTENTION), "puts, attention with its waits, outputs coming home"),
        ("on shards", total("compute", placement="sharded"), "everything else on this rank's tokens"),
        ("whole", total("compute", placement="whole"), "what every rank computes alike"),
        ("gathers", total("gather", "exchange"), "values that ranks gather or exchange"),
    ]


def axis_words(axis: Axis) -> str:
    """A sequence axis in a line."""
    parts = "" if len(axis.segments) == 1 else " = " + " + ".join(map(str, axis.segments[:6]))
    more = f" + {len(axis.segments) - 6} more" if len(axis.segments) > 6 else ""
    carried = ", ".join(f"{name} (dim {dim})" for name, dim, _ in axis.inputs)
    where = f"carried by {carried}" if carried else "made inside the model"
    return f"{axis.tokens} tokens{parts}{more}, {axis.flops / 1e9:.1f} GFLOP of attention; {where}"


def memory_rows(explained: Explained) -> list[tuple[str, str, str]]:
    """What a rank must hold: ``(name, size, in words)``."""
    return [
        ("heap", size(explained.heap_bytes), "symmetric memory per rank, two banks shared by all layers and steps"),
        ("weights", size(explained.weight_bytes), _who_holds_weights(explained)),
    ]


def _who_holds_weights(explained: Explained) -> str:
    if explained.weights == "whole":
        return "whole on every rank: tokens are split, weights are not"
    lines = [graph.report.weights for graph in explained.graphs if graph.report is not None and graph.report.weights]
    if lines:
        return "; ".join(lines)
    where = explained.topology
    if held_in_shares(explained.weights, where.of_gpus, where.machine_of) is not None:
        return "whole on every rank: none is large enough to be cut"
    if where.of_gpus:
        return "whole on every rank: no other GPU is there to hold a share"
    return "the large ones once for the ranks of a machine, in memory that they share"


def left_of(graph: ExplainedGraph) -> list[Left]:
    """Token ops that every rank computes whole, costliest first, without those that move nothing."""
    return [] if graph.report is None else graph.report.left_behind


def alike(rows: Sequence[Left]) -> list[tuple[Left, int]]:
    """Rows of the same line of source, op, reason and cost once, with how many there are: layers repeat."""
    kinds: dict[tuple[object, ...], tuple[Left, int]] = {}
    for row in rows:
        # Reasons name the reader, whose number differs from layer to layer.
        key = row.op, row.source, re.sub(r"\w*_\d+\b", "", row.reason), row.flops, row.nbytes
        first, count = kinds.get(key, (row, 0))
        kinds[key] = first, count + 1
    return list(kinds.values())


def cost(row: Left) -> str:
    """What it costs to leave an op whole."""
    return f"{row.flops / 1e9:.3f} GFLOP" if row.flops else size(row.nbytes)


def text_of(explained: Explained, full: bool = False) -> str:
    """Tables for a terminal; ``full``: every line, candidate and schedule."""
    step = explained.step_s
    lines = [
        f"{explained.name} on {explained.where}: {ranks(explained)}; explained in {explained.seconds:.1f} s.",
        f"Rank {explained.rank} is shown. Times are predicted from the topology's constants; nothing was run.",
        "",
        f"step       {step * 1e3:10.2f} ms predicted",
    ]
    lines += [f"  {name:<9}{seconds * 1e3:10.2f} ms  {words}" for name, seconds, words in step_rows(explained)]
    if step:
        lines += [
            f"exposed    {explained.exposed_s * 1e3:10.2f} ms of it in waits ({explained.exposed_s / step:.1%})",
            f"limit      {explained.limit_s * 1e3:10.2f} ms ({explained.limit_s / step:.0%} of the step): the larger "
            "of compute alone and bytes / bandwidth",
        ]
    lines += [f"{name:<11}{amount:>10}     {words}" for name, amount, words in memory_rows(explained)]
    if explained.stopped:
        lines += ["", f"The model's own code stopped the trace: {explained.stopped}"]
        lines += ["Code between graphs looks at values, and none were computed. Give real tensors, or an earlier cut."]
    for graph in explained.graphs:
        lines += ["", *_graph(graph, explained, full)]
    return "\n".join(lines)


def _graph(graph: ExplainedGraph, explained: Explained, full: bool) -> list[str]:
    several = len(explained.graphs) > 1
    lines = (
        [f"==== graph {graph.number} of {len(explained.graphs)}: {duration(graph.seconds())} ===="] if several else []
    )
    if graph.break_reason:
        lines.append(f"ends at a graph break: {graph.break_reason}")
    if graph.refused:
        return [*lines, f"runs unsharded: {graph.refused}"]
    assert graph.report is not None
    lines.append("sequence axes")
    lines += [f"  {axis_words(axis)}" for axis in graph.axes] or ["  none: no attention was found"]
    lines += _notes(graph)
    for kind in graph.attentions:
        lines += ["", *_attention(kind, full)]
    if not graph.attentions:
        lines.append("no attention is sharded over tokens")
    lines += ["", *_left("not sharded (token ops that every rank computes whole)", left_of(graph), full)]
    lines += _left("gathered (sharded values that some reader needs whole)", graph.report.gathered, full)
    lines += _left("exchanged in part (halos, other cuts, another dim)", graph.report.moved, full)
    lines += [f"warning: {text}" for text in graph.report.warnings]
    lines += [
        "",
        "this rank's graph" + ("" if full else f" (lines of {WORTH:.0%} of their block, or that communicate)"),
    ]
    for block in graph.blocks:
        lines += _block(block, full)
    return lines


def batch_words(graph: ExplainedGraph) -> str:
    """What groups of ranks do, or ""."""
    if graph.groups < 2 or graph.report is None:
        return ""
    doing = groups_do(graph.report.batch, graph.report.copies)
    return f"{graph.groups} groups of ranks {doing}; what follows is one group's"


def _notes(graph: ExplainedGraph) -> list[str]:
    notes = [*(graph.choices.notes if graph.choices is not None else ()), batch_words(graph)]
    return ["", *notes] if any(notes) else []


def _attention(kind: Attentions, full: bool) -> list[str]:
    head, *rows = str(kind.plan).splitlines()
    shown = rows if full else rows[:CANDIDATES]
    more = [f"  ... and {len(rows) - len(shown)} more candidates"] if len(shown) < len(rows) else []
    (inside, in_value, in_sent), (across, across_value, across_sent) = kind.inside, kind.across
    lines = [
        f"{kind.count} attention{'s' * (kind.count > 1)}: {kind.what}",
        *(f"  {row}" for row in (head, *shown)),
        *more,
        "  bytes of one attention over all ranks, in closed form and as sent:",
        f"    inside machines   {inside} = {size(in_value)}, sent {size(in_sent)}",
        f"    between machines  {across} = {size(across_value)}, sent {size(across_sent)}",
        f"    with {', '.join(f'{name} = {value}' for name, value in kind.symbols.items())}",
    ]
    return lines + ([f"  {line}" for line in kind.steps.splitlines()] if full else [])


def _left(title: str, rows: Sequence[Left], full: bool) -> list[str]:
    if not rows:
        return [f"{title}: none"]
    kinds = [(row, 1) for row in rows] if full else alike(rows)
    shown = kinds if full else kinds[:LEFT]
    lines = [f"{title}: {len(rows)}"]
    for row, count in shown:
        times = f"{count} x" if count > 1 else ""
        lines.append(f"  {row.node:<24} {row.op:<24} {times:>5} {cost(row):>13}  {row.source}  -- {row.reason}")
    hidden = sum(count for _, count in kinds) - sum(count for _, count in shown)
    return lines + ([f"  ... and {hidden} more"] if hidden else [])


def _block(block: Block, full: bool) -> list[str]:
    shown = [line for line in block.lines if full or _worth(line, block)]
    hidden = len(block.lines) - len(shown)
    alike = f", {block.alike} like this" if block.alike > 1 else ""
    head = f"  -- {block.name or 'between layers'}: {duration(block.seconds)}{alike}"
    return [head + (f", {hidden} smaller lines not shown" if hidden else ""), *(_code(line) for line in shown)]


def _worth(line: Line, block: Block) -> bool:
    return line.kind in COMMUNICATION or line.seconds >= WORTH * block.seconds > 0.0 or bool(line.reason and line.flops)


def _code(line: Line) -> str:
    sent = f" sends {size(line.nbytes)}" if line.nbytes else ""
    waits = f" ({duration(line.waits_s)} waiting)" if line.waits_s else ""
    text = line.text if len(line.text) <= 64 else line.text[:61] + "..."
    took = f"{duration(line.seconds):>9}{waits}{sent}"
    return f"     {line.placement:<8}{text:<65}{line.value:<24}{took}  {short_source(line.source)}"
