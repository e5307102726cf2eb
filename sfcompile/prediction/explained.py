"""The facts of an explanation: axes, attentions, graphs, the step. text.py and html.py show them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfcompile.codegen.plan.choose_plan import SitePlan
from sfcompile.codegen.plan.step import Drawn, Step, draw
from sfcompile.passes.report.report import GraphReport
from sfcompile.passes.state import Choices
from sfcompile.prediction.code import Block
from sfcompile.prediction.predict import caption
from sfcompile.prediction.timeline import write_text
from sfcompile.runtime.program.topology import Topology


@dataclass(frozen=True)
class Axis:
    """A sequence axis: positions that attention looks along.

    Attributes:
        tokens: its length; ``segments`` are the lengths of its parts (text and image of a joint attention).
        flops: of the attentions along it.
        inputs: the model's inputs that carry it, as ``(name, dim, tokens)``.
    """

    tokens: int
    segments: tuple[int, ...]
    flops: float
    inputs: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Attentions:
    """One kind of attention of a graph: how many there are, what they are, and how they run.

    Attributes:
        count: attentions of this kind.
        what: in words.
        plan: the pick and every rejected candidate with its reason.
        inside, across: bytes of one attention over all ranks of a group, inside and between machines, as
            ``(closed form, its value, what the schedule really sends)``. The closed form holds where heads and tokens
            divide evenly.
        symbols: values of the closed forms' symbols.
        steps: the schedule, instruction by instruction.
    """

    count: int
    what: str
    plan: SitePlan
    inside: tuple[str, int, int]
    across: tuple[str, int, int]
    symbols: dict[str, int]
    steps: str


@dataclass(frozen=True)
class ExplainedGraph:
    """One graph of the model (a model without graph breaks has one).

    Attributes:
        report: what the passes decided, as the backend reports it.
        axes: the sequence axes, most attention first.
        attentions: by kind.
        blocks: this rank's graph.
        choices: the planner's, for one group of ranks; None if the graph was refused, as is ``step``.
        step: this rank's; the lines of ``blocks`` add up to it.
        groups: how many groups of ranks take a part of the batch each.
        refused: why the graph cannot be sharded at all; "" if it can.
    """

    number: int
    report: GraphReport | None
    axes: tuple[Axis, ...] = ()
    attentions: tuple[Attentions, ...] = ()
    blocks: tuple[Block, ...] = ()
    choices: Choices | None = None
    step: Step | None = None
    break_reason: str = ""
    refused: str = ""
    groups: int = 1

    def seconds(self, *kinds: str, placement: str = "") -> float:
        """Predicted seconds of this rank's lines of some kinds; if none are named, of a step, which all lines are."""
        if not kinds and not placement:
            return 0.0 if self.step is None else self.step.seconds
        lines = ((block.alike, line) for block in self.blocks for line in block.lines)
        return sum(
            n * line.seconds
            for n, line in lines
            if (not kinds or line.kind in kinds) and placement in ("", line.placement)
        )

    @property
    def exposed_s(self) -> float:
        """Predicted seconds in which this rank is blocked in waits."""
        return 0.0 if self.step is None else self.step.exposed_s

    @property
    def sent(self) -> tuple[int, int]:
        """Bytes that this rank sends: in all, and to other machines."""
        lines = [(block.alike, line) for block in self.blocks for line in block.lines]
        return sum(n * line.nbytes for n, line in lines), sum(n * line.across for n, line in lines)

    @property
    def limit_s(self) -> float:
        """No order of this work and these bytes is faster: the larger of compute alone and bytes / bandwidth."""
        return 0.0 if self.step is None else self.step.limit_s


@dataclass(frozen=True)
class Explained:
    """What is known of a model on a topology; explain.py's Explanation adds its forms as words and as a page.

    Attributes:
        name: of the model.
        where: the topology as it was asked for.
        topology: it.
        rank: whose graph is shown.
        graphs: the model's, in the order in which they run.
        weight_bytes: parameters and buffers of the model, whole.
        seconds: how long tracing, planning and rewriting took.
        stopped: why the model's own code did not run to its end (code between graphs that needs values), or "".
        weights: the backend's option: who holds them.
    """

    name: str
    where: str
    topology: Topology
    rank: int
    graphs: tuple[ExplainedGraph, ...]
    weight_bytes: int
    seconds: float
    stopped: str = ""
    weights: str = "whole"

    @property
    def parts(self) -> tuple[ExplainedGraph, ...]:
        """The name that ``graphs`` had before."""
        return self.graphs

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step on this rank."""
        return sum(graph.seconds() for graph in self.graphs)

    @property
    def exposed_s(self) -> float:
        """Predicted seconds of it in which the rank is blocked in waits."""
        return sum(graph.exposed_s for graph in self.graphs)

    @property
    def limit_s(self) -> float:
        """No order of this work and these bytes is faster; graphs run one after the other."""
        return sum(graph.limit_s for graph in self.graphs)

    @property
    def heap_bytes(self) -> int:
        """Symmetric memory per rank, shared by all layers and graphs."""
        return max((graph.report.heap_bytes for graph in self.graphs if graph.report is not None), default=0)

    def timeline(self) -> tuple[Drawn, str] | None:
        """Two layers around the attention on which the model spends most, and a title; None without one."""
        drawn = draw([graph.step for graph in self.graphs if graph.step is not None])
        if drawn is None:
            return None
        key = drawn.schedule.site.geometry()
        planned = [(g.choices, g.groups) for g in self.graphs if g.choices is not None and key in g.choices.plans]
        return drawn, caption(drawn, *planned[0])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values. Times are in seconds, sizes in bytes."""
        return {
            "format": 1,
            "model": self.name,
            "topology": {"asked": self.where, **asdict(self.topology)},
            "rank": self.rank,
            "seconds_to_explain": self.seconds,
            "stopped": self.stopped,
            "step": {"seconds": self.step_s, "exposed_s": self.exposed_s, "limit_s": self.limit_s},
            "memory": {"heap_bytes": self.heap_bytes, "weight_bytes": self.weight_bytes, "weights": self.weights},
            "graphs": [_plain_graph(graph) for graph in self.graphs],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The explanation as JSON text, also written to ``path`` if one is given.

        Raises:
            OptionError: the file cannot be written.
        """
        return written(json.dumps(self.to_dict(), indent=1, default=str), path)


def written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_text(Path(path), text)
    return text


def _plain_graph(graph: ExplainedGraph) -> dict[str, Any]:
    sent, across = graph.sent
    plain: dict[str, Any] = {
        "graph": graph.number,
        "break_reason": graph.break_reason,
        "refused": graph.refused,
        "groups": graph.groups,
        "notes": list(graph.choices.notes) if graph.choices is not None else [],
        "axes": [asdict(axis) for axis in graph.axes],
        "step": {
            "seconds": graph.seconds(),
            "exposed_s": graph.exposed_s,
            "limit_s": graph.limit_s,
            "sent_bytes": sent,
            "sent_across_bytes": across,
        },
        "attentions": [
            {
                "count": kind.count,
                "what": kind.what,
                "taken": str(kind.plan.best),
                "candidates": [{**asdict(row), "candidate": str(row.candidate)} for row in kind.plan.rows],
                "bytes": {
                    "symbols": kind.symbols,
                    "inside": dict(zip(("closed_form", "value", "sent"), kind.inside, strict=True)),
                    "across": dict(zip(("closed_form", "value", "sent"), kind.across, strict=True)),
                },
                "schedule": kind.steps.splitlines(),
            }
            for kind in graph.attentions
        ],
        "code": [
            {"block": block.name, "alike": block.alike, "lines": [asdict(line) for line in block.lines]}
            for block in graph.blocks
        ],
    }
    if graph.report is not None:
        report = asdict(graph.report)
        for name in ("plans", "axes", "graph", "break_reason", "stages"):
            report.pop(name)
        plain["report"] = report
    return plain
