"""Tables of traces: windows, overlap, steps, and predictions that follow the same definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from random_sites import attention_site, gather_site
from threads import run_threads

from sfcompile.codegen.plan.simulator import simulate
from sfcompile.codegen.plan.step import in_order, layer, pipelined
from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.passes.report.report import GraphReport
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.recorder import Event
from sfcompile.runtime.rank.session import Session, current_session
from sfcompile.tracing.report import (
    Expected,
    Predicted,
    Times,
    last_layers,
    predict_layers,
    report_of,
    spans_of,
    steps_of,
)


def call(rank: int, site: int, epoch: int, start: float, waits: float) -> list[Event]:
    """A call of ten seconds: puts of one, attend of six with one wait and four of compute, collect of one."""

    def event(lane: str, name: str, begin: float, stop: float, nbytes: int = 0) -> Event:
        return Event(rank, lane, name, start + begin, start + stop, nbytes, None, 0, site, epoch)

    return [
        event("send", "k", 0.0, 1.0, 64), event("stage", "put_k", 0.0, 1.0), event("wait", "k", 2.0, 2.0 + waits),
        event("compute", "attend", 4.0, 8.0), event("stage", "attend", 2.0, 8.0), event("stage", "collect", 9.0, 10.0),
    ]  # fmt: skip


EVENTS = [
    event
    for step in range(3)
    for site in range(2)
    for rank in range(2)
    for event in call(rank, site, 2 * step + site + 1, 100.0 * step + 20.0 * site, 1.0 + rank)
]
KNOWN = {(0, site): Predicted(f"sdpa_{site}", "attention", Times(0.5, 4.0, 10.0)) for site in range(2)}


def test_layers_add_up() -> None:
    report = report_of(EVENTS, KNOWN)
    assert (report.ranks, report.steps, report.step_s) == (2, 3, 100.0)
    for site, row in enumerate(report.rows):
        assert row.title == f"attention sdpa_{site}" and row.calls == 3 and row.slowest_s == 2.0
        assert row.measured == Times(1.5, 4.0, 10.0) and row.measured.overlap == pytest.approx(0.85)
    assert report.total() == Times(3.0, 8.0, 20.0) and report.total(predicted=True) == Times(1.0, 8.0, 20.0)
    text = str(report)
    assert "3 steps of 2 ranks: 3.00 s a step blocked in waits, 85%" in text and "(predicted 1.00 s, 95%)" in text
    assert "attention sdpa_1" in text and text.splitlines()[-1].startswith("a step")


def test_without_predictions_and_without_events() -> None:
    report = report_of(EVENTS, {})
    assert report.total(predicted=True) is None and "program 0 site 1" in str(report)
    assert "predicted 1" not in report.headline
    assert "nothing was recorded" in str(report_of([], {}))


def test_calls_that_a_trace_cuts_are_left_out() -> None:
    report = report_of([event for event in EVENTS if event.name != "collect" or event.epoch > 1], KNOWN)
    assert [row.calls for row in report.rows] == [2, 3]


def test_a_call_in_parts_ends_with_its_last_part() -> None:
    def stages(epoch: int, names: list[str]) -> list[Event]:
        return [
            Event(0, "stage", name, 100.0 * epoch + i, 100.0 * epoch + i + 1, 0, None, 0, 0, epoch)
            for i, name in enumerate(names)
        ]

    whole = ["put_q part 0", "put_q part 1", "attend", "collect part 0", "collect part 1"]
    (row,) = report_of(stages(1, whole) + stages(2, whole[:-1]), KNOWN).rows
    assert row.calls == 1 and row.measured.window_s == 5.0


def test_a_kernel_that_waits_inside_counts_as_attention() -> None:
    (first, *_) = report_of([event for event in EVENTS if event.lane == "stage"], KNOWN).rows
    assert first.measured == Times(0.0, 6.0, 10.0)


def test_steps_and_the_graph_between_stages() -> None:
    assert steps_of(EVENTS) == {rank: [0.0, 100.0, 200.0] for rank in range(2)}
    graph = [(s.start_s, s.stop_s) for s in spans_of(EVENTS) if s.name == "graph" and s.rank == 0 and s.start_s < 100]
    assert graph == [(1.0, 2.0), (8.0, 9.0), (10.0, 20.0), (21.0, 22.0), (28.0, 29.0)]


def test_the_last_layers_are_drawn() -> None:
    shown = last_layers(EVENTS, report_of(EVENTS, KNOWN))
    assert min(event.start_s for event in shown) == 200.0 and max(event.stop_s for event in shown) == 230.0


def predicted(schedules: list[Schedule], plan: GraphReport | None, top: Topology) -> Expected:
    """What rank 0 of a session with these schedules says; ``plan`` is the report of their program "p"."""

    def work(rank: int) -> Expected:
        session: Session = current_session()
        session.load("p", schedules)
        return predict_layers(session, [] if plan is None else [plan])

    return run_threads(top.num_ranks, work, top.machine_of)[0]


def test_predictions_in_parts_overlap_layers() -> None:
    top = Topology.grid(2, 2, network_bytes_per_s=1e6)
    site = replace(attention_site(4, tokens=64), parts=2)
    schedule = build("torus", site, Mesh.of(top, 4, 1), 2, 2)
    plan = GraphReport(4, 1, 1, 1, programs={"p": ["first", "second"]}, topology=top, other_s=1e-3)
    found = predicted([schedule] * 2, plan, top)
    times = [found.layers[0, site].times for site in range(2)]
    line = simulate(pipelined(schedule, 2, 1e-3), top)
    assert sum(t.blocked_s for t in times) == pytest.approx(float(line.exposed_s.mean()))
    assert sum(t.attend_s for t in times) == pytest.approx(float(line.compute_s.mean()) - 2e-3)
    assert all(t.blocked_s < t.window_s < line.seconds for t in times)
    assert sum(t.window_s for t in times) > line.seconds - 1e-3  # windows of layers overlap
    assert found.steps == [((0,), pytest.approx(float(line.marks[-1].clock[0])))]


def test_predictions_are_the_simulators() -> None:
    top = Topology.grid(2, 2, network_bytes_per_s=1e6)
    mesh = Mesh.of(top, 2, 2)
    attention, gather = build("torus", attention_site(4), mesh), build("exchange", gather_site(4), Mesh.of(top, 1, 4))
    plan = GraphReport(4, 2, 2, 2, programs={"p": ["first", "second", "out"]}, topology=top, other_s=1e-3)
    found = predicted([attention, attention, gather], plan, top)
    assert [value.name for value in found.layers.values()] == ["first", "second", "out"] and found.spans
    line = simulate(layer(attention, 1, 1e-3), top)
    first = found.layers[0, 0].times
    assert first.blocked_s == pytest.approx(float(line.exposed_s.mean()))
    assert first.attend_s == pytest.approx(float(line.compute_s.mean()) - 1e-3)
    assert 0.0 < first.window_s <= line.seconds - 1e-3 + 1e-12
    assert found.layers[0, 2].kind == "gather" and found.layers[0, 2].times.attend_s == 0.0
    every = [*layer(attention, 1, 1e-3), *layer(attention, 2, 1e-3), *layer(gather, 3)]
    assert found.steps == [((0,), pytest.approx(float(simulate(every, top).marks[-1].clock[0])))]


def test_what_a_graph_computes_between_stages_counts() -> None:
    top = Topology.grid(1, 2)
    attention = build("ulysses", attention_site(2), Mesh.of(top, 2, 1))
    stages = in_order("p", [attention], 1e-3)
    plan = GraphReport(2, 1, 2, 1, programs={"p": ["first"]}, topology=top, stages=replace(stages, after_s=2e-3))
    ((_, seconds),) = predicted([attention], plan, top).steps
    ((_, alone),) = predicted([attention], None, top).steps
    assert seconds == pytest.approx(alone + 3e-3)


def test_the_predicted_step_is_of_the_graphs_that_ran() -> None:
    report = report_of(EVENTS, KNOWN, [((0, 3), 90.0), ((1,), 5.0)])
    assert report.predicted_step_s == 90.0 and "predicted to take 90.00 s" in str(report)
    assert report_of(EVENTS, KNOWN).predicted_step_s is None
