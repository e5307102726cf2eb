"""What a recorded run says: per layer the time blocked in waits, the time in attention, how much was hidden, and what
the simulator had predicted for the same schedules.

A layer's *window* is the time in which its chunks are under way: from its first put until the last of its waits is
over. Its *overlap* is the part of the window in which the rank was not blocked. Both are read off recorded events and
off the simulator's in the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfcompile.codegen.plan.simulator import Timeline, layer, pipelined, simulate
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.passes.report.report import GraphReport
from sfcompile.prediction.text import duration
from sfcompile.runtime.program.sites import AttentionSite
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
    """The simulator's times of a layer, and what the layer is called."""

    name: str
    attention: bool
    times: Times


@dataclass(frozen=True)
class LayerRow:
    """One layer of the table. ``slowest_s``: the mean time blocked of the rank that was blocked most."""

    key: Key
    name: str
    attention: bool
    calls: int
    measured: Times
    slowest_s: float
    predicted: Times | None

    @property
    def title(self) -> str:
        """What the layer is, for people."""
        return f"{'attention' if self.attention else 'gather'} {self.name}"


@dataclass(frozen=True)
class TraceReport:
    """The table of a trace.

    Attributes:
        ranks, steps: how many were recorded.
        step_s: seconds from a step's first put to the next step's, mean over ranks; None with a single step.
        rows: one per layer, in the order in which they run.
    """

    ranks: int
    steps: int
    step_s: float | None
    rows: tuple[LayerRow, ...]

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


def report_of(events: Sequence[Event], predicted: Mapping[Key, Predicted]) -> TraceReport:
    """The table of some recorded events (of all ranks, on one clock)."""
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
        known = predicted.get(key)
        name = known.name if known is not None else f"program {key[0]} site {key[1]}"
        rows.append(
            LayerRow(
                key, name, known.attention if known is not None else False,
                max(len(of_rank) for of_rank in times[key].values()), _mean(ranks.values()),
                max(t.blocked_s for t in ranks.values()), None if known is None else known.times,
            )
        )  # fmt: skip
    starts = steps_of(events)
    steps = max((len(of_rank) for of_rank in starts.values()), default=0)
    periods = [(s[-1] - s[0]) / (len(s) - 1) for s in starts.values() if len(s) > 1]
    return TraceReport(len(starts), steps, sum(periods) / len(periods) if periods else None, tuple(rows))


def _ended(stages: Sequence[Event]) -> bool:
    """Whether a call was recorded to its end: with tokens in parts, to the collect of every part that was sent."""
    names = [event.name for event in stages]
    collected = [name.removeprefix("collect") for name in names if name.startswith("collect")]
    sent = [name.removeprefix("put_q") for name in names if name.startswith("put_q")]
    return "gather_finish" in names or (bool(collected) and set(collected) >= set(sent))


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


def last_layers(events: Sequence[Event], report: TraceReport, count: int = 2) -> list[Event]:
    """The events of the last calls of the last ``count`` attentions: what a picture shows."""
    keys = [row.key for row in report.rows if row.attention][-count:] or [row.key for row in report.rows][-count:]
    latest: Counter[tuple[int, Key]] = Counter()
    for e in events:
        latest[e.rank, (e.program, e.site)] = max(latest[e.rank, (e.program, e.site)], e.epoch)
    chosen = [e for e in events if (e.program, e.site) in keys and e.epoch == latest[e.rank, (e.program, e.site)]]
    start, stop = min(e.start_s for e in chosen), max(e.stop_s for e in chosen)
    return [event for event in events if event.stop_s > start and event.start_s < stop]


# ---------------------------------------------------------------------- predictions


def predict_layers(session: Session, reports: Sequence[GraphReport]) -> tuple[dict[Key, Predicted], list[Span]]:
    """The simulator's times for every layer of a session's programs, and its events around the heaviest attention.

    On the topology that the plan was made for; on the session's own where no report of the program is left.
    """
    plans = {program: report for report in reports for program in report.programs}
    found: dict[Key, Predicted] = {}
    made: dict[int, tuple[Predicted, list[Span]]] = {}  # layers repeat: simulate each distinct schedule once
    for number, (program, schedules) in enumerate(session.programs.items()):
        plan = plans.get(program)
        job = session.topology
        if plan is not None and plan.topology is not None:
            job = plan.topology.on(session.topology.machine_of)
        for site, schedule in enumerate(schedules):
            if id(schedule) not in made:
                made[id(schedule)] = _predict(schedule, session.rank, job, 0.0 if plan is None else plan.other_s)
            known = made[id(schedule)][0]
            names = [] if plan is None else plan.programs[program]
            name = names[site] if site < len(names) else schedule.site.name
            found[number, site] = Predicted(name, known.attention, known.times)
    main = max(made.values(), key=lambda entry: (entry[0].attention, entry[0].times.window_s), default=None)
    return found, [] if main is None else main[1]


def _predict(schedule: Any, rank: int, job: Any, before_s: float) -> tuple[Predicted, list[Span]]:
    assert isinstance(schedule, Schedule)
    members = schedule.members(rank)[1]
    attention = isinstance(schedule.site, AttentionSite)
    topology, lead = job.subset(members), before_s if attention else 0.0
    parts = schedule.site.parts if isinstance(schedule.site, AttentionSite) else 1
    if parts > 1:
        # Calls overlap: two of them, of which each is half; a window is that of one by itself.
        line = simulate(pipelined(schedule, 2, lead), topology, record=True)
        one = simulate(pipelined(schedule, 1, lead), topology)
        calls, window_s = 2, _ends(one) - lead / parts
    else:
        line = simulate(layer(schedule, 1, lead), topology, record=True)
        calls, window_s = 1, _ends(line) - lead
    times = Times(float(line.exposed_s.mean()) / calls, float(line.compute_s.mean()) / calls - lead, window_s)
    spans = [
        Span(
            members[s.rank], s.lane, s.name, s.start_s, s.stop_s, s.nbytes, None if s.peer is None else members[s.peer]
        )
        for s in line.spans
    ]
    return Predicted(schedule.site.name, attention, times), spans


def _ends(line: Timeline) -> float:
    """When the ranks end, on average."""
    return float((line.compute_s + line.exposed_s + line.busy_s).mean())
