"""Tables of traces: windows, overlap, steps, and predictions that follow the same definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from random_sites import attention_site, gather_site
from threads import run_threads

from sfcompile.codegen.plan.simulator import layer, pipelined, simulate
from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.passes.report.report import GraphReport
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.recorder import Event
from sfcompile.runtime.rank.session import Session, current_session
from sfcompile.tracing.report import (
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
KNOWN = {(0, site): Predicted(f"sdpa_{site}", True, Times(0.5, 4.0, 10.0)) for site in range(2)}


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


def test_predictions_in_parts_overlap_layers() -> None:
    top = Topology.grid(2, 2, network_bytes_per_s=1e6)
    site = replace(attention_site(4, tokens=64), parts=2)
    schedule = build("torus", site, Mesh.of(top, 4, 1), 2, 2)
    plan = GraphReport(4, 1, 1, 1, programs={"p": ["first"]}, topology=top, other_s=1e-3)

    def work(rank: int) -> dict[tuple[int, int], Predicted]:
        session = current_session()
        session.load("p", [schedule])
        return predict_layers(session, [plan])[0]

    times = run_threads(4, work, top.machine_of)[0][0, 0].times
    line = simulate(pipelined(schedule, 2, 1e-3), top)
    assert times.blocked_s == pytest.approx(float(line.exposed_s.mean()) / 2)
    assert times.attend_s == pytest.approx(float(line.compute_s.mean()) / 2 - 1e-3)
    assert times.blocked_s < times.window_s < line.seconds


def test_predictions_are_the_simulators() -> None:
    top = Topology.grid(2, 2, network_bytes_per_s=1e6)
    mesh = Mesh.of(top, 2, 2)
    attention, gather = build("torus", attention_site(4), mesh), build("gather", gather_site(4), Mesh.of(top, 1, 4))
    plan = GraphReport(4, 2, 2, 2, programs={"p": ["first", "second", "out"]}, topology=top, other_s=1e-3)

    def work(rank: int) -> tuple[dict[tuple[int, int], Predicted], int]:
        session: Session = current_session()
        session.load("p", [attention, attention, gather])
        found, spans = predict_layers(session, [plan])
        return found, len(spans)

    found, spans = run_threads(4, work, top.machine_of)[0]
    assert [value.name for value in found.values()] == ["first", "second", "out"] and spans > 0
    line = simulate(layer(attention, 1, 1e-3), top)
    assert found[0, 0].times.blocked_s == pytest.approx(float(line.exposed_s.mean()))
    assert found[0, 0].times.attend_s == pytest.approx(float(line.compute_s.mean()) - 1e-3)
    assert 0.0 < found[0, 0].times.window_s <= line.seconds - 1e-3 + 1e-12
    assert not found[0, 2].attention and found[0, 2].times.attend_s == 0.0
