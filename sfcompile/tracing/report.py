"""What a recorded run says: per layer the time blocked in waits, the time in attention, how much was hidden, and what
the simulator had predicted for the same schedules.

A layer's *window* is the time in which its chunks are under way: from its first put until the last of its waits is
over. Its *overlap* is the part of the window in which the rank was not blocked. Both are read off recorded events and
off the simulator's in the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sfcompile.codegen.plan.step import Drawn, StageTimes, Step, draw, in_order
from sfcompile.passes.report.report import GraphReport
from sfcompile.prediction.text import duration
from sfcompile.runtime.program.phases import EXCHANGE
from sfcompile.runtime.program.spans import Span
from sfcompile.runtime.rank.recorder import Event
from sfcompile.runtime.rank.session import Session

Key = tuple[int, int]
"""``(program, site)``: a layer's number in the session, the same on every rank."""


@dataclass(frozen=True)
class Times:
    """Of one call of a layer, mean over ranks (and calls): seconds blocked, in attention, and from first put to end."""

    blocked_s: float
    attend_s: float
    window_s: float

    @property
    def overlap(self) -> float:
        """The part of the window in which a rank was not blocked: 1.0 hides all communication."""
        return 1.0 - self.blocked_s / self.window_s if self.window_s > 0.0 else 1.0


@dataclass(frozen=True)
class Predicted:
    """The simulator's times of a layer, what the layer is called, and its kind: attention, gather or exchange."""

    name: str
    kind: str
    times: Times


@dataclass(frozen=True)
class LayerRow:
    """One layer of the table.

    Attributes:
        kind: attention, gather or exchange; "layer" if nothing is predicted, and so known, of it.
        slowest_s: the mean time blocked of the rank that was blocked most.
    """

    key: Key
    name: str
    kind: str
    calls: int
    measured: Times
    slowest_s: float
    predicted: Times | None

    @property
    def title(self) -> str:
        """What the layer is, for people."""
        return f"{self.kind} {self.name}"


@dataclass(frozen=True)
class TraceReport:
    """The table of a trace.

    Attributes:
        ranks, steps: how many were recorded.
        step_s: seconds from a step's first put to the next step's, mean over ranks; None with a single step.
        rows: one per layer, in the order in which they run.
        predicted_step_s: predicted seconds of a step's graphs (of rank 0); None if nothing is predicted.
    """

    ranks: int
    steps: int
    step_s: float | None
    rows: tuple[LayerRow, ...]
    predicted_step_s: float | None = None

    def total(self, predicted: bool = False) -> Times | None:
        """Sums over a step's layers; None if some layer has no prediction."""
        times = [row.predicted if predicted else row.measured for row in self.rows]
        known = [entry for entry in times if entry is not None]
        if len(known) < len(times):
            return None
        return Times(*(sum(getattr(t, name) for t in known) for name in ("blocked_s", "attend_s", "window_s")))

    @property
    def headline(self) -> str:
        """The trace in a line."""
        if not self.rows:
            return (
                "nothing was recorded: no sharded graph ran on CPU ranks while the trace was on (what GPU ranks do "
                "runs on their streams, where torch.profiler sees it)"
            )
        measured, predicted = self.total(), self.total(predicted=True)
        assert measured is not None
        beside = "" if predicted is None else f" (predicted {duration(predicted.blocked_s)}, {predicted.overlap:.0%})"
        return (
            f"{self.steps} step{'s' * (self.steps > 1)} of {self.ranks} ranks: {duration(measured.blocked_s)} a step "
            f"blocked in waits, {measured.overlap:.0%} of the communication windows not blocked{beside}"
        )

    def __str__(self) -> str:
        lines = [self.headline]
        if not self.rows:
            return lines[0]
        if self.step_s is not None:
            lines.append(f"a step takes {duration(self.step_s)}, from its first put to the next step's")
        if self.predicted_step_s is not None:
            lines.append(f"its graphs are predicted to take {duration(self.predicted_step_s)}")
        lines += [
            "means over ranks and calls; predicted = the simulator on the topology that the plan was made for",
            "",
            f"{'layer':<37}{'calls':>6}{'blocked':>11}{'worst rank':>11}{'predicted':>11}{'attention':>11}"
            f"{'predicted':>11}{'overlap':>9}{'predicted':>10}",
        ]
        lines += [_line(row.title, row.calls, row.measured, row.slowest_s, row.predicted) for row in self.rows]
        total = self.total()
        assert total is not None
        slowest = sum(row.slowest_s for row in self.rows)
        lines.append(_line("a step", self.steps, total, slowest, self.total(predicted=True)))
        return "\n".join(lines)


def _line(name: str, calls: int, measured: Times, slowest_s: float, predicted: Times | None) -> str:
    beside = ("-", "-", "-")
    if predicted is not None:
        beside = duration(predicted.blocked_s), duration(predicted.attend_s), f"{predicted.overlap:.0%}"
    short = name if len(name) <= 36 else name[:16] + "..." + name[-17:]
    return (
        f"{short:<37}{calls:>6}{duration(measured.blocked_s):>11}{duration(slowest_s):>11}{beside[0]:>11}"
        f"{duration(measured.attend_s):>11}{beside[1]:>11}{measured.overlap:>9.0%}{beside[2]:>10}"
    )


def report_of(
    events: Sequence[Event],
    predicted: Mapping[Key, Predicted],
    graphs: Sequence[tuple[tuple[int, ...], float]] = (),
) -> TraceReport:
    """The table of some recorded events (of all ranks, on one clock).

    Args:
        predicted: by layer; ``graphs``: of every graph, the numbers of its programs and the seconds of its step.
    """
    calls: dict[tuple[Key, int, int], list[Event]] = {}
    for event in events:
        calls.setdefault(((event.program, event.site), event.rank, event.epoch), []).append(event)
    times: dict[Key, dict[int, list[Times]]] = {}
    first: dict[Key, float] = {}
    for (key, rank, _), of_call in calls.items():
        stages = [event for event in of_call if event.lane == "stage"]
        first[key] = min(first.get(key, of_call[0].start_s), of_call[0].start_s)
        if _ended(stages):
            times.setdefault(key, {}).setdefault(rank, []).append(_times(of_call, stages))
    rows = []
    for key in sorted(times, key=lambda key: first[key]):
        ranks = {rank: _mean(of_rank) for rank, of_rank in times[key].items()}
        layer = predicted.get(key)
        name = layer.name if layer is not None else f"program {key[0]} site {key[1]}"
        rows.append(
            LayerRow(
                key, name, "layer" if layer is None else layer.kind,
                max(len(of_rank) for of_rank in times[key].values()), _mean(ranks.values()),
                max(t.blocked_s for t in ranks.values()), None if layer is None else layer.times,
            )
        )  # fmt: skip
    starts = steps_of(events)
    steps = max((len(of_rank) for of_rank in starts.values()), default=0)
    periods = [(s[-1] - s[0]) / (len(s) - 1) for s in starts.values() if len(s) > 1]
    ran = {event.program for event in events}
    known = [seconds for programs, seconds in graphs if ran & set(programs)]
    step_s = sum(periods) / len(periods) if periods else None
    return TraceReport(len(starts), steps, step_s, tuple(rows), sum(known) if known else None)


def _ended(stages: Sequence[Event]) -> bool:
    """Whether a call was recorded to its end: with tokens in parts, to the collect of every part that was sent;
    where an exchange gathers several weights, to the last of them."""
    names = [event.name for event in stages]
    collected = [name.removeprefix("collect") for name in names if name.startswith("collect")]
    sent = [name.removeprefix("put_q") for name in names if name.startswith("put_q")]
    starts, ends = (sum(name.startswith(phase) for name in names) for phase in EXCHANGE)
    return ends >= max(starts, 1) or (bool(collected) and set(collected) >= set(sent))


def _times(events: Sequence[Event], stages: Sequence[Event]) -> Times:
    def total(lane: str) -> float:
        return sum(event.stop_s - event.start_s for event in events if event.lane == lane)

    attend = total("compute")
    if not attend:  # a generated kernel waits and computes inside
        attend = sum(event.stop_s - event.start_s for event in stages if event.name == "attend")
    return Times(total("wait"), attend, max(e.stop_s for e in stages) - min(e.start_s for e in stages))


def _mean(times: Iterable[Times]) -> Times:
    every = list(times)
    return Times(*(sum(getattr(t, n) for t in every) / len(every) for n in ("blocked_s", "attend_s", "window_s")))


def steps_of(events: Sequence[Event]) -> dict[int, list[float]]:
    """When each rank began its steps: a step ends where a stage comes up that it has had already."""
    starts: dict[int, list[float]] = {}
    had: dict[int, set[tuple[int, int, str]]] = {}
    for event in sorted((e for e in events if e.lane == "stage"), key=lambda e: e.start_s):
        stage = event.program, event.site, event.name
        if event.rank not in had or stage in had[event.rank]:
            had[event.rank] = set()
            starts.setdefault(event.rank, []).append(event.start_s)
        had[event.rank].add(stage)
    return starts


def spans_of(events: Sequence[Event]) -> list[Span]:
    """Events as spans from 0 on; where a rank is between two stages of a step it runs its graph ("compute")."""
    zero = min((event.start_s for event in events), default=0.0)
    spans = [
        Span(e.rank, e.lane, e.name, e.start_s - zero, e.stop_s - zero, e.nbytes, None if e.lane == "wait" else e.peer)
        for e in events
    ]
    starts = steps_of(events)
    last: dict[int, Event] = {}
    for event in sorted((e for e in events if e.lane == "stage"), key=lambda e: e.start_s):
        before = last.get(event.rank)
        if before is not None and event.start_s not in starts[event.rank] and event.start_s > before.stop_s:
            spans.append(Span(event.rank, "compute", "graph", before.stop_s - zero, event.start_s - zero))
        last[event.rank] = event
    return spans


def last_layers(events: Sequence[Event], report: TraceReport) -> list[Event]:
    """The events of the last calls of the last two attentions: what a picture shows."""
    attentions = [row for row in report.rows if row.kind == "attention"]
    keys = [row.key for row in (attentions or report.rows)[-2:]]
    latest: Counter[tuple[int, Key]] = Counter()
    for e in events:
        latest[e.rank, (e.program, e.site)] = max(latest[e.rank, (e.program, e.site)], e.epoch)
    chosen = [e for e in events if (e.program, e.site) in keys and e.epoch == latest[e.rank, (e.program, e.site)]]
    start, stop = min(e.start_s for e in chosen), max(e.stop_s for e in chosen)
    return [event for event in events if event.stop_s > start and event.start_s < stop]


# ---------------------------------------------------------------------- predictions


@dataclass(frozen=True)
class Expected:
    """What the simulator says of the graphs of a session.

    Attributes:
        layers: the times of every layer.
        steps: per graph, the numbers of its programs and the seconds of its step on this rank.
        spans: the events of two layers of the heaviest attention.
    """

    layers: dict[Key, Predicted]
    steps: list[tuple[tuple[int, ...], float]]
    spans: list[Span]


def predict_layers(session: Session, reports: Sequence[GraphReport]) -> Expected:
    """Predict the graphs of a session as explain and simulate do: what a report says of its order, played.

    On the topology that the plan was made for. Where no report of a program is left, its sites are taken to follow one
    another on the session's own topology, with nothing between them.
    """
    programs: dict[str, list[Any]] = {**session.programs}  # the runtime knows schedules as what it runs, no more
    number = {program: i for i, program in enumerate(programs)}
    plans = {program: report for report in reports for program in report.programs}
    graphs: dict[int, Step] = {}  # by the number of one of the graph's programs
    for program, schedules in programs.items():
        plan = plans.get(program)
        job = session.topology
        if plan is not None and plan.topology is not None:
            job = plan.topology.on(session.topology.machine_of)
        if plan is None or plan.stages is None:
            alone = in_order(program, schedules, 0.0 if plan is None else plan.other_s)
            graphs[number[program]] = Step(alone, {program: schedules}, session.rank, job)
        elif all(other in number for other in plan.programs):
            mine = {other: programs[other] for other in plan.programs}
            graphs[min(number[other] for other in mine)] = Step(plan.stages, mine, session.rank, job)
    layers: dict[Key, Predicted] = {}
    for step in graphs.values():
        for (program, site), stages in _by_site(step).items():
            plan = plans.get(program)
            names = [] if plan is None else plan.programs[program]
            name = names[site] if site < len(names) else stages[0].schedule.site.name
            layers[number[program], site] = Predicted(name, stages[0].kind, _predicted(stages))
    drawn = draw(list(graphs.values()))
    seconds = [(tuple(number[program] for program in step.schedules), step.seconds) for step in graphs.values()]
    return Expected(layers, seconds, [] if drawn is None else _of_job(drawn))


def _by_site(step: Step) -> dict[tuple[str, int], list[StageTimes]]:
    sites: dict[tuple[str, int], list[StageTimes]] = {}
    for times in step.stages:
        sites.setdefault((times.stage.program, times.stage.site), []).append(times)
    return sites


def _predicted(stages: Sequence[StageTimes]) -> Times:
    """Means over ranks of one layer, by the definitions that recorded events are read with."""
    return Times(
        sum(float(times.blocked_s.mean()) for times in stages),
        sum(float(times.attend_s.mean()) for times in stages),
        float((stages[-1].stop_s - stages[0].start_s).mean()),
    )


def _of_job(drawn: Drawn) -> list[Span]:
    """The drawn events with the job's numbers of their ranks."""
    return [
        replace(span, rank=drawn.members[span.rank], peer=None if span.peer is None else drawn.members[span.peer])
        for span in drawn.spans
    ]
