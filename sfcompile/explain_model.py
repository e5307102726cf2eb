"""What the compiler would do with a model on a topology, and why: in one process, without ranks, without a GPU.

``explain`` runs every pass that a compile runs, for one rank, on fake tensors. The numbers it shows are predictions of
the simulator and of the cost model on the topology's constants; nothing is timed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx

from sfcompile.backend import break_reason
from sfcompile.capture import Captured
from sfcompile.codegen.schedule import Schedule
from sfcompile.codegen.simulator import Timeline, layer, simulate
from sfcompile.codegen.sites import AttentionSite
from sfcompile.codegen.volumes import volume
from sfcompile.errors import OptionError, StreamFusionError, UnsupportedError
from sfcompile.explain_code import Block, Exchange, Facts, blocks_of, input_names
from sfcompile.explain_html import page
from sfcompile.explain_text import text_of
from sfcompile.passes.choose_plan import SitePlan
from sfcompile.passes.choose_schedules import Choices
from sfcompile.passes.pipeline import State, run_pipeline
from sfcompile.passes.report import GraphReport
from sfcompile.predict import each_graph
from sfcompile.runtime.topology import Topology
from sfcompile.timeline import write_text

DRAWN_LAYERS = 2


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
class Part:
    """One graph of the model (a model without graph breaks has one).

    Attributes:
        report: what the passes decided, as the backend reports it.
        axes: the sequence axes, most attention first.
        attentions: by kind.
        blocks: this rank's graph.
        choices: the planner's, for one group of ranks; None if the graph was refused.
        groups: how many groups of ranks take a part of the batch each.
        refused: why the graph cannot be sharded at all; "" if it can.
    """

    number: int
    report: GraphReport | None
    axes: tuple[Axis, ...] = ()
    attentions: tuple[Attentions, ...] = ()
    blocks: tuple[Block, ...] = ()
    choices: Choices | None = None
    break_reason: str = ""
    refused: str = ""
    groups: int = 1

    def seconds(self, *kinds: str, placement: str = "") -> float:
        """Predicted seconds of this rank's lines of some kinds (all, if none are named)."""
        lines = ((block.alike, line) for block in self.blocks for line in block.lines)
        return sum(
            n * line.seconds
            for n, line in lines
            if (not kinds or line.kind in kinds) and placement in ("", line.placement)
        )

    @property
    def exposed_s(self) -> float:
        """Predicted seconds in which this rank is blocked in waits."""
        return sum(block.alike * line.waits_s for block in self.blocks for line in block.lines)

    @property
    def sent(self) -> tuple[int, int]:
        """Bytes that this rank sends: in all, and to other machines."""
        lines = [(block.alike, line) for block in self.blocks for line in block.lines]
        return sum(n * line.nbytes for n, line in lines), sum(n * line.across for n, line in lines)

    @property
    def limit_s(self) -> float:
        """No schedule of these bytes and this compute is faster: per attention, the larger of the two."""
        if not self.attentions:
            return self.seconds()
        return sum(entry.count * entry.plan.price.limit_s for entry in self.attentions)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. Prints as tables; ``to_html`` and ``to_json`` give the same for a browser and tools.

    Attributes:
        name: of the model.
        where: the topology as it was asked for.
        topology: it.
        rank: whose graph is shown.
        parts: one per graph.
        weight_bytes: parameters and buffers, which every rank holds whole.
        seconds: how long tracing, planning and rewriting took.
        stopped: why the model's own code did not run to its end (code between graphs that needs values), or "".
    """

    name: str
    where: str
    topology: Topology
    rank: int
    parts: tuple[Part, ...]
    weight_bytes: int
    seconds: float
    stopped: str = ""

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step on this rank."""
        return sum(part.seconds() for part in self.parts)

    @property
    def exposed_s(self) -> float:
        """Predicted seconds of it in which the rank is blocked in waits."""
        return sum(part.exposed_s for part in self.parts)

    @property
    def limit_s(self) -> float:
        """No schedule of these bytes and this compute is faster."""
        return min(self.step_s, sum(part.limit_s for part in self.parts))

    @property
    def heap_bytes(self) -> int:
        """Symmetric memory per rank, shared by all layers and graphs."""
        return max((part.report.heap_bytes for part in self.parts if part.report is not None), default=0)

    @cached_property
    def _main(self) -> tuple[Part, Attentions] | None:
        kinds = [(part, kind) for part in self.parts for kind in part.attentions]
        return max(kinds, key=lambda pair: pair[1].count * (pair[1].plan.price.seconds or 0.0), default=None)

    def timeline(self) -> tuple[Timeline, Topology, str] | None:
        """Two layers around the attention on which the model spends most: events, ranks, title; None without one."""
        if self._main is None:
            return None
        part, kind = self._main
        assert part.choices is not None
        site = next(s for key, s in part.choices.sites.items() if part.choices.plans[key] is kind.plan)
        topology = part.choices.topology
        schedule = kind.plan.best.schedule(site, topology)
        steps = [step for epoch in range(1, DRAWN_LAYERS + 1) for step in layer(schedule, epoch, part.choices.other_s)]
        group = f"; one of {part.groups} groups that share the batch" if part.groups > 1 else ""
        title = f"{DRAWN_LAYERS} layers of {kind.plan.best}, predicted{group}"
        return simulate(steps, topology, record=True), topology, title

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
            "memory": {"heap_bytes": self.heap_bytes, "weight_bytes": self.weight_bytes},
            "graphs": [_plain_part(part) for part in self.parts],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The explanation as JSON text, also written to ``path`` if one is given.

        Raises:
            OptionError: the file cannot be written.
        """
        return _written(json.dumps(self.to_dict(), indent=1, default=str), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """One page that needs nothing else: plan, timeline, graph. Also written to ``path`` if one is given.

        Raises:
            OptionError: the file cannot be written.
        """
        return _written(page(self), path)

    def __str__(self) -> str:
        return text_of(self)

    def full(self) -> str:
        """Like ``str()``, with every line of the graph, every candidate and every schedule."""
        return text_of(self, full=True)


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_text(Path(path), text)
    return text


def _plain_part(part: Part) -> dict[str, Any]:
    sent, across = part.sent
    found: dict[str, Any] = {
        "graph": part.number,
        "break_reason": part.break_reason,
        "refused": part.refused,
        "groups": part.groups,
        "notes": list(part.choices.notes) if part.choices is not None else [],
        "axes": [asdict(axis) for axis in part.axes],
        "step": {
            "seconds": part.seconds(),
            "exposed_s": part.exposed_s,
            "limit_s": part.limit_s,
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
            for kind in part.attentions
        ],
        "code": [
            {"block": block.name, "alike": block.alike, "lines": [asdict(line) for line in block.lines]}
            for block in part.blocks
        ],
    }
    if part.report is not None:
        report = asdict(part.report)
        for name in ("plans", "axes", "graph", "break_reason"):
            report.pop(name)
        found["report"] = report
    return found


def explain(
    model: torch.nn.Module,
    *args: Any,
    topology: Topology | str = "4x8:a100-efa",
    mesh: Mapping[str, int] | None = None,
    schedule: str = "auto",
    placement: str = "auto",
    rank: int = 0,
    name: str = "",
    **kwargs: Any,
) -> Explanation:
    """Run every pass on a model for a topology and say what each decided. Nothing is computed, no rank is started.

    Args:
        model: any module; it may be on the meta device, at full size. ``args`` and ``kwargs`` are what it is called
            with: meta tensors, or real ones if the model's own code looks at values between graphs.
        topology: as in the backend's option: "4x8:a100-efa", a file, or a Topology.
        mesh, schedule, placement: as in the backend's options.
        rank: whose graph is shown.
        name: of the model, for titles.

    Raises:
        TopologyError: it cannot be read.
        OptionError: no such rank.
        MeshError: mesh or schedule are not possible.
        UnsupportedError: torch.compile traces nothing of the model.
    """
    where = topology if isinstance(topology, Topology) else Topology.parse(topology)
    if not 0 <= rank < where.num_ranks:
        raise OptionError(
            f"There is no rank {rank}", f"The topology has ranks 0 to {where.num_ranks - 1}", "Name one of them"
        )
    asked = topology if isinstance(topology, str) else f"{where.num_machines} machines, {where.num_ranks} ranks"
    begun = time.perf_counter()
    parts: list[Part] = []

    def visit(gm: fx.GraphModule, captured: Captured) -> None:
        state = State(
            captured.gm, captured.mode, where, rank, mesh, schedule, shard_everything=placement == "shard"
        )  # fmt: skip
        report = run_pipeline(state).report
        report.graph, report.break_reason = len(parts) + 1, break_reason(gm)
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        parts.append(_part(state, report, input_names([names[i] for i in captured.tensor_inputs]), rank, where))

    def refused(gm: fx.GraphModule, error: UnsupportedError) -> None:
        parts.append(Part(len(parts) + 1, None, break_reason=break_reason(gm), refused=str(error)))

    stopped = ""
    try:
        each_graph(model, args, kwargs, visit, refused)
    except StreamFusionError:
        raise
    except Exception as error:
        # Code between two graphs looked at values, which nobody computed: what was found so far is still true.
        if not parts or not parts[-1].break_reason:
            raise
        stopped = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    weights = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return Explanation(
        name or type(model).__name__, asked, where, rank, tuple(parts), sum(weights.values()),
        time.perf_counter() - begun, stopped,
    )  # fmt: skip


def _part(state: State, report: GraphReport, names: list[str], rank: int, job: Topology) -> Part:
    """What is to be said about a graph whose passes have run; ``job`` is the topology of all ranks."""
    assert state.placement is not None and state.choices is not None and state.local is not None
    programs = {state.local.program: state.schedules}
    reasons = {node.name: reason for node, reason in state.placement.reasons.items()}
    if state.part is not None:
        programs[state.part.program] = state.part.schedules
        reasons |= {node.name: f"batch: {why}" for node, (_, why) in state.part.left.items()}
    known: dict[int, Exchange] = {}  # layers repeat: simulate each distinct schedule once

    def exchange(program: str, site: int) -> Exchange:
        schedule = programs[program][site]
        if id(schedule) not in known:
            place, members = schedule.members(rank)
            before_s = state.choices.other_s if isinstance(schedule.site, AttentionSite) else 0.0  # type: ignore[union-attr]
            known[id(schedule)] = Exchange.of(schedule, place, job.subset(members), before_s)
        return known[id(schedule)]

    sharded = frozenset(node.name for node in state.placement.needs)
    facts = Facts(state.topology, names, sharded, reasons, exchange)
    return Part(
        report.graph, report, _axes(state, names), _attentions(state), blocks_of(state.local.graph, facts),
        state.choices, report.break_reason, groups=max(1, len(state.groups)),
    )  # fmt: skip


def _axes(state: State, names: list[str]) -> tuple[Axis, ...]:
    assert state.layouts is not None
    owners, chosen = state.layouts.owners, state.layouts.chosen
    segments: dict[int, list[int]] = {}
    for first, length in owners.segments:
        segments.setdefault(owners.axis_of(((first, length),)), []).append(length)
    inputs: dict[int, list[tuple[str, int, int]]] = {}
    placeholders = [node for node in state.gm.graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=False):
        if node in chosen:
            layout = chosen[node]
            inputs.setdefault(owners.axis_of(layout.runs), []).append((name, layout.dim, layout.tokens))
    found = []
    left = dict(segments)
    for tokens, count, work in state.layouts.axes:
        axis = next(key for key, parts in left.items() if sum(parts) == tokens and len(parts) == count)
        found.append(Axis(tokens, tuple(left.pop(axis)), work, tuple(inputs.get(axis, ()))))
    return tuple(found)


def _attentions(state: State) -> tuple[Attentions, ...]:
    """The kinds of attention that ranks share, and how often each occurs in this rank's graph."""
    assert state.choices is not None and state.local is not None
    found = []
    for key, plan in state.choices.plans.items():
        count = sum(isinstance(s, AttentionSite) and s.geometry() == key for s in state.local.sites)
        if not count:
            continue
        site = state.choices.sites[key]
        schedule: Schedule = plan.best.schedule(site, state.choices.topology)
        forms, sent = volume(schedule, state.choices.topology), schedule.bytes_by_link(state.choices.topology)
        inside, across = (
            (str(form), value, moved)
            for form, value, moved in zip((forms.inside, forms.across), forms.bytes, sent, strict=True)
        )
        symbols = {str(symbol): value for symbol, value in forms.numbers.items()}
        found.append(Attentions(count, _what(site), plan, inside, across, symbols, str(schedule)))
    return tuple(found)


def _what(site: AttentionSite) -> str:
    queries, keys = (sum(n for runs in places for _, n in runs) for places in (site.q_positions, site.kv_positions))
    tokens = f"{queries} tokens" if queries == keys else f"{queries} queries on {keys} keys"
    grouped = f" over {site.kv_heads} K/V heads" if site.kv_heads != site.heads else ""
    more = "".join([", causal" if site.causal else "", ", with a mask" if site.mask else ""])
    return f"{tokens}, {site.heads} heads{grouped} x {site.head_dim}, batch {site.batch}{more}"
