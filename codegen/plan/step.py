"""How layers add up to a step: the one prediction that explain, simulate, the timeline and the trace report share.

A step of a graph is what one rank does from the graph's first node to its last: it computes, reaches a stage (a put, an
attend, a collect, an end of an exchange), computes on. ``Step`` plays all of it in one sweep of the simulator, in the
order in which the compiler wrote it, so nothing has to be said about kinds of attention, about exchanges, or about the
gather of the output; and where tokens come in parts, the order of the stages is the pipeline. All ranks of the job take
part: groups that share a batch run beside each other. Between stages they compute for as long as the rank whose graph
it is; attention and messages are each rank's own.

The planner has to choose before a graph is written. Its ``price`` of a layer is a sweep over the order that it expects
(``in_order``: layer by layer, or pipelined if tokens come in parts), in which ranks share all other compute equally. It
compares candidates; it is not added up to a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from sfcompile.codegen.plan.links import Vector
from sfcompile.codegen.plan.simulator import Compute, Mark, Phase, Timeline, Work, simulate
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.runtime.program.phases import ATTEND, COLLECT, PUTS
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.spans import Span
from sfcompile.runtime.program.stages import GraphStages, Stage
from sfcompile.runtime.program.topology import Topology

DRAWN_LAYERS = 2
"""How many layers a picture shows."""

T = TypeVar("T", float, Vector)


@dataclass(frozen=True)
class StageTimes:
    """A stage as predicted, in seconds since the step began; vectors are by rank of the job.

    Attributes:
        start_s: when ranks reach it, after the compute before it; ``stop_s``: when they leave it.
        blocked_s: of this, time in waits; ``attend_s``: time in attention.
        rank: whose graph it is.
    """

    stage: Stage
    schedule: Schedule
    start_s: Vector
    stop_s: Vector
    blocked_s: Vector
    attend_s: Vector
    rank: int

    @property
    def seconds(self) -> float:
        """How long the stage takes on the rank whose graph it is."""
        return float(self.stop_s[self.rank] - self.start_s[self.rank])

    @property
    def waits_s(self) -> float:
        """How long that rank is blocked in it."""
        return float(self.blocked_s[self.rank])

    @property
    def kind(self) -> str:
        """What it is a stage of: "attention", "gather" (all ranks want all), "exchange" (halos, other cuts)."""
        site = self.schedule.site
        return "attention" if isinstance(site, AttentionSite) else "gather" if site.is_gather else "exchange"


@dataclass(frozen=True)
class Drawn:
    """The events of some layers of a step on one group of ranks, from 0 on.

    Attributes:
        spans: ranks are numbered as in ``members``, the job's ranks of the group; ``topology`` is the group's.
        schedule: of the attention that the layers surround.
        layers: how many.
    """

    spans: list[Span]
    members: tuple[int, ...]
    topology: Topology
    schedule: Schedule
    layers: int

    @property
    def seconds(self) -> float:
        """When the last event ends."""
        return max((span.stop_s for span in self.spans), default=0.0)


@dataclass(frozen=True)
class Step:
    """What a step of one graph takes on one rank.

    Attributes:
        graph: the rank's compute and stages, in their order.
        schedules: by program.
        rank: of the job, whose graph it is; ``job`` is the topology of all ranks.
    """

    graph: GraphStages
    schedules: Mapping[str, Sequence[Schedule]]
    rank: int
    job: Topology

    @property
    def seconds(self) -> float:
        """Predicted seconds until this rank has its outputs."""
        return float(self._sweep.marks[-1].clock[self.rank]) if self._sweep.marks else 0.0

    @property
    def exposed_s(self) -> float:
        """Predicted seconds of it in which this rank is blocked in waits."""
        return float(self._sweep.exposed_s[self.rank])

    @property
    def limit_s(self) -> float:
        """No order of this work and these bytes is faster: the larger of compute alone and bytes / bandwidth."""
        return min(self.seconds, self._sweep.limit_s)

    @cached_property
    def stages(self) -> tuple[StageTimes, ...]:
        """Every stage with its times, in the order of the graph."""
        zero = np.zeros(self.job.num_ranks)
        before = Mark(zero, zero, zero)
        rows: list[StageTimes] = []
        stages = iter(self.graph.stages)
        for work, after in zip(self.line, self._sweep.marks, strict=True):
            if isinstance(work, Phase):
                rows.append(
                    StageTimes(
                        next(stages), work.schedule, before.clock, after.clock, after.exposed_s - before.exposed_s,
                        after.compute_s - before.compute_s, self.rank,
                    )
                )  # fmt: skip
            before = after
        return tuple(rows)

    @property
    def attention_s(self) -> dict[int, float]:
        """Seconds in the stages of each attention schedule on this rank, by the schedule's id."""
        spent: dict[int, float] = {}
        for times in self.stages:
            if times.kind == "attention":
                spent[id(times.schedule)] = spent.get(id(times.schedule), 0.0) + times.seconds
        return spent

    def draw(self, layers: int = DRAWN_LAYERS) -> Drawn | None:
        """Layers around the attention on which the step spends most; not its first, if it has more than are drawn.

        The events are those that the step's seconds count. None if ranks share no attention.
        """
        spent = self.attention_s
        if not spent:
            return None
        heaviest = max(spent, key=spent.__getitem__)
        calls: dict[int, list[int]] = {}  # by epoch: where in the line the stages of a call are
        for at, work in enumerate(self.line):
            if isinstance(work, Phase) and id(work.schedule) == heaviest:
                calls.setdefault(work.epoch, []).append(at)
        skipped = int(len(calls) > layers)
        shown = list(calls.values())[skipped : skipped + layers]
        first, last = min(map(min, shown)), max(map(max, shown))
        while first and isinstance(self.line[first - 1], Compute):  # a layer begins with what is computed for it
            first -= 1
        main = self.line[last]
        assert isinstance(main, Phase)
        members = main.schedule.members(self.rank)[1]
        place = {rank: at for at, rank in enumerate(members)}
        spans = simulate(self.line, self.job, record=range(first, last + 1)).spans
        began_s = min((span.start_s for span in spans), default=0.0)
        moved = [
            replace(
                span, rank=place[span.rank], start_s=span.start_s - began_s, stop_s=span.stop_s - began_s,
                peer=None if span.peer is None else place.get(span.peer),
            )
            for span in spans
            if span.rank in place
        ]  # fmt: skip
        return Drawn(moved, members, self.job.subset(members), main.schedule, len(shown))

    @cached_property
    def line(self) -> list[Work]:
        """The step as work for the simulator."""
        return work_of(self.graph, self.schedules)

    @cached_property
    def _sweep(self) -> Timeline:
        return simulate(self.line, self.job)


def draw(steps: Sequence[Step], layers: int = DRAWN_LAYERS) -> Drawn | None:
    """Of the graphs of a model, layers of the one that spends most in one attention; None without any."""
    main = max(steps, key=lambda step: max(step.attention_s.values(), default=0.0), default=None)
    return None if main is None else main.draw(layers)


def work_of(graph: GraphStages, schedules: Mapping[str, Sequence[Schedule]]) -> list[Work]:
    """A graph as work for the simulator. Sites are the epochs of a step, numbered in the order in which they begin."""
    line: list[Work] = []
    epochs: dict[tuple[str, int], int] = {}
    for stage in graph.stages:
        if stage.before_s > 0.0:
            line.append(Compute(stage.before_s, "layer"))
        epoch = epochs.setdefault((stage.program, stage.site), len(epochs) + 1)
        line.append(Phase(schedules[stage.program][stage.site], epoch, stage.phase, stage.part))
    if graph.after_s > 0.0:
        line.append(Compute(graph.after_s, "layer"))
    return line


# ---------------------------------------------------------------------- before there is a graph


def in_order(program: str, schedules: Sequence[Schedule], before_s: float) -> GraphStages:
    """Stages in the order that the planner expects of a graph, for sites that follow one another.

    Layer by layer; if tokens come in parts, a part's outputs are collected and its next q, k and v computed and sent
    while the other parts are still on their way.

    Args:
        before_s: compute before each attention, all parts together.
    """
    stages: list[Stage] = []
    late: list[Stage] = []  # collects of the attention before, by part
    for site, schedule in enumerate(schedules):
        attention = isinstance(schedule, AttentionSchedule)
        parts = schedule.site.parts
        if parts == 1:
            phases = list(schedule.origin.phases)
            lead = before_s if attention else 0.0
            stages += late
            stages += [Stage(program, site, name, -1, lead if at == 0 else 0.0) for at, name in enumerate(phases)]
            late = []
            continue
        for part in range(parts):
            stages += late[part : part + 1]
            stages += [
                Stage(program, site, name, part, before_s / parts if name == PUTS["k"] else 0.0)
                for name in (PUTS["k"], PUTS["v"], PUTS["q"])
            ]
        stages += [*late[parts:], Stage(program, site, ATTEND)]
        late = [Stage(program, site, COLLECT, part) for part in range(parts)]
    return GraphStages((*stages, *late))


def layer(schedule: Schedule, epoch: int, before_s: float = 0.0) -> list[Work]:
    """One transformer layer around an attention site.

    Args:
        before_s: compute before q, k and v exist.
    """
    phases: list[Work] = [Phase(schedule, epoch, name) for name in schedule.origin.phases]
    return [Compute(before_s, "layer"), *phases] if before_s else phases


def pipelined(schedule: Schedule, layers: int, before_s: float) -> list[Work]:
    """So many layers of one attention, in the order of :func:`in_order`."""
    schedules = {"": [schedule] * layers}
    return work_of(in_order("", schedules[""], before_s), schedules)


def price(schedule: Schedule, topology: Topology, before_s: float, layers: int = 1) -> Timeline:
    """One layer of so many, on average. If tokens come in parts, layers overlap: the first is simulated alone, all
    others are what the second of two adds, so that few layers pay for filling and draining and many hardly do.
    """
    if not isinstance(schedule, AttentionSchedule) or schedule.site.parts == 1:
        return simulate(layer(schedule, 1, before_s), topology)
    one = simulate(pipelined(schedule, 1, before_s), topology)
    if layers == 1:
        return one
    two = simulate(pipelined(schedule, 2, before_s), topology)

    def mean(first: T, both: T) -> T:
        average: T = (first + (layers - 1) * (both - first)) / layers
        return average

    return replace(
        two, seconds=mean(one.seconds, two.seconds), compute_s=mean(one.compute_s, two.compute_s),
        exposed_s=mean(one.exposed_s, two.exposed_s), busy_s=mean(one.busy_s, two.busy_s),
        inside_bytes=one.inside_bytes, across_bytes=one.across_bytes, limit_s=mean(one.limit_s, two.limit_s),
    )  # fmt: skip
