"""One prediction: simulate, explain, its lines, both drawn timelines and the trace report say the same of a step.

Beneath it: a step is one sweep over the graph's own order, and the planner's price is a sweep over the expected one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import structures
from models import build as build_model
from random_sites import attention_site, gather_site
from threads import run_threads

from sfcompile.codegen.plan.simulator import Compute, Phase, simulate
from sfcompile.codegen.plan.step import Step, in_order, layer, pipelined, price
from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.prediction.explain import explain
from sfcompile.prediction.explained import ExplainedGraph
from sfcompile.prediction.predict import simulate as predict
from sfcompile.runtime.program.stages import GraphStages, Stage
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import current_session
from sfcompile.tracing.report import Expected, predict_layers

# ---------------------------------------------------------------------- five callers, one step

TOKENS = {"mesh": {"batch": 1, "ulysses": 2, "ring": 1}}
SLOW = Topology.grid(2, 2, network_bytes_per_s=1e6)


@dataclass(frozen=True)
class Case:
    """A model by name, where it runs, and what its step holds: checked, so that a case stays what it is named for."""

    model: str
    topology: Topology
    options: dict[str, Any] = field(default_factory=dict)
    samples: int = 1
    parts: int = 1
    groups: int = 1
    kinds: int = 1
    exchanges: bool = False


CASES = {
    "whole tokens, one machine": Case("joint", Topology.grid(1, 4)),
    "tokens in parts, between machines": Case("joint", SLOW, parts=2),
    "batch split": Case("self", SLOW, {"mesh": {"batch": 2, "ulysses": 2, "ring": 1}}, samples=2, groups=2),
    "two kinds of attention": Case("merged_and_split_tokens", Topology.grid(1, 2), TOKENS, samples=2, kinds=2),
    "exchanges": Case("depthwise_in_the_mlp", Topology.grid(1, 2), TOKENS, samples=2, exchanges=True),
}


def traced(graph: ExplainedGraph, topology: Topology) -> Expected:
    """What the trace report of rank 0 predicts, in a session that has the graph's programs."""
    assert graph.step is not None and graph.report is not None
    step, report = graph.step, graph.report

    def work(rank: int) -> Expected:
        session = current_session()
        for program, schedules in step.schedules.items():
            session.load(program, list(schedules))
        return predict_layers(session, [report])

    return run_threads(topology.num_ranks, work, topology.machine_of)[0]


@pytest.mark.parametrize("name", CASES)
def test_everybody_predicts_the_same_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    if case.parts > 1:
        monkeypatch.setattr("sfcompile.passes.choose_schedules._WORTH", float("inf"))
    make = structures.STRUCTURES.get(case.model, lambda: build_model(case.model))
    model, inputs = make()
    inputs = [x[: case.samples] for x in inputs]
    options = {"topology": case.topology, "placement": "shard", **case.options}
    simulated, explained = predict(model, *inputs, **options), explain(model, *inputs, **options)
    (graph,) = explained.graphs
    assert graph.step is not None and graph.choices is not None

    # What the case is about.
    stages = graph.step.graph.stages
    assert graph.choices.parts >= case.parts and (case.parts == 1) == all(stage.part < 0 for stage in stages)
    assert graph.groups == simulated.choices.batch == case.groups
    lines = [(block.alike, line) for block in graph.blocks for line in block.lines]
    assert len(graph.step.attention_s) >= case.kinds and len(graph.attentions) >= case.kinds
    assert case.exchanges == any(line.kind == "exchange" for _, line in lines)
    assert any(line.kind == "gather" for _, line in lines), "the output is gathered"

    # One number: of simulate, of explain, of its lines, of its rows, and beside a trace.
    step_s = simulated.step_s
    assert step_s > 0.0 and explained.step_s == step_s
    assert sum(n * line.seconds for n, line in lines) == pytest.approx(step_s)
    assert sum(n * line.waits_s for n, line in lines) == pytest.approx(explained.exposed_s) == simulated.exposed_s
    assert explained.limit_s == simulated.limit_s <= step_s
    beside = traced(graph, case.topology)
    assert sum(seconds for _, seconds in beside.steps) == pytest.approx(step_s)
    assert len(beside.layers) == len({(stage.program, stage.site) for stage in stages})

    # The same events: both pictures, the trace's, and the sweep that the number is read from.
    drawn = simulated.timeline()
    shown = explained.timeline()
    assert shown is not None and shown[0] == drawn and drawn.spans
    assert [replace(s, rank=drawn.members[s.rank], peer=None) for s in drawn.spans] == [
        replace(s, peer=None) for s in beside.spans
    ]
    everything = simulate(graph.step.line, case.topology, record=True).spans
    assert max(span.stop_s for span in everything if span.rank == 0) <= step_s
    waits = [s for s in drawn.spans if s.lane == "wait"]
    known = {(s.name, round(s.stop_s - s.start_s, 12)) for s in everything if s.lane == "wait"}
    assert all((s.name, round(s.stop_s - s.start_s, 12)) in known for s in waits)


# ---------------------------------------------------------------------- steps


def stage(phase: str, before_s: float = 0.0) -> Stage:
    return Stage("p", 0, phase, -1, before_s)


def test_a_step_without_ranks_to_talk_to_is_its_compute() -> None:
    step = Step(GraphStages((), 2.0), {}, 1, Topology.grid(1, 2))
    assert (step.seconds, step.exposed_s, step.limit_s) == (2.0, 0.0, 2.0)
    assert step.stages == () and step.draw() is None
    assert Step(GraphStages(), {}, 0, Topology.grid(1, 2)).seconds == 0.0


def test_what_is_computed_between_puts_hides_their_traffic() -> None:
    """The order of the graph counts, not only how much lies between two attentions."""
    top = Topology.grid(2, 1, network_bytes_per_s=1e5)
    schedule = build("torus", attention_site(2, tokens=64), Mesh.of(top, 2, 1))
    early = [stage("put_k"), stage("put_v"), stage("put_q", 1e-3), stage("attend"), stage("collect")]
    late = [stage("put_k", 1e-3), *map(stage, ("put_v", "put_q", "attend", "collect"))]
    steps = [Step(GraphStages(tuple(order)), {"p": [schedule]}, 0, top) for order in (early, late)]
    assert steps[0].seconds < steps[1].seconds and steps[0].graph.compute_s == steps[1].graph.compute_s
    assert steps[1].seconds == pytest.approx(simulate(layer(schedule, 1, 1e-3), top).seconds, rel=0.05)


def test_stages_meet_each_other_without_gaps() -> None:
    top = Topology.grid(2, 2)
    mesh = Mesh.of(top, 2, 2)
    schedules = [build("torus", attention_site(4), mesh)] * 3 + [build("exchange", gather_site(4), Mesh.of(top, 1, 4))]
    graph = replace(in_order("p", schedules, 1e-3), after_s=5e-4)
    step = Step(graph, {"p": schedules}, 2, top)
    clock = 0.0
    for times in step.stages:
        assert times.start_s[2] == pytest.approx(clock + times.stage.before_s)
        clock = float(times.stop_s[2])
    assert step.seconds == pytest.approx(clock + 5e-4)
    drawn = step.draw()
    assert drawn is not None and drawn.layers == 2 and drawn.schedule is schedules[0]
    first, last = step.stages[5], step.stages[14]  # put_q of the second layer to the collect of the third
    window = float(last.stop_s.max()) - float((first.start_s - 1e-3).min())
    assert drawn.seconds == pytest.approx(window, rel=0.05)


def test_groups_run_beside_each_other() -> None:
    """Two groups of two ranks, each on its own machine: what one group does alone, both do at the same time."""
    top, group = Topology.grid(2, 2), Topology.grid(1, 2)
    schedule = build("ulysses", attention_site(2), Mesh.of(group, 2, 1))
    alone = simulate(layer(schedule, 1, 1e-3), group)
    for groups in (((0, 1), (2, 3)), ((0, 2), (3, 1))):
        both = simulate(layer(replace(schedule, groups=groups), 1, 1e-3), top)
        if groups == ((0, 1), (2, 3)):
            assert both.compute_s.tolist() == [*alone.compute_s, *alone.compute_s] and both.seconds == alone.seconds
            assert both.inside_bytes == 2 * alone.inside_bytes and both.across_bytes == 0
        else:
            assert both.across_bytes == 2 * alone.inside_bytes and both.inside_bytes == 0
            assert both.compute_s[[0, 2, 3, 1]].tolist() == [*alone.compute_s, *alone.compute_s]


# ---------------------------------------------------------------------- before there is a graph


def test_the_expected_order_of_parts() -> None:
    top = Topology.grid(2, 2)
    site = replace(attention_site(4, tokens=64), parts=2)
    schedule = build("torus", site, Mesh.of(top, 4, 1), 2, 2)
    order = [(stage.site, stage.phase, stage.part) for stage in in_order("p", [schedule] * 2, 1.0).stages]
    puts = [[(i, phase, graph) for phase in ("put_k", "put_v", "put_q")] for i in (0, 1) for graph in (0, 1)]
    assert order == [
        *puts[0], *puts[1], (0, "attend", -1), (0, "collect", 0), *puts[2], (0, "collect", 1), *puts[3],
        (1, "attend", -1), (1, "collect", 0), (1, "collect", 1),
    ]  # fmt: skip
    line = pipelined(schedule, 2, 1.0)
    assert sum(work.seconds for work in line if isinstance(work, Compute)) == 2.0
    assert {work.epoch for work in line if isinstance(work, Phase)} == {1, 2}


PLAIN: dict[str, Any] = {
    "flops_per_s": 1e18, "memory_bytes_per_s": 1e18, "local_bytes_per_s": 1.0, "local_latency_s": 0.0,
    "network_bytes_per_s": 1.0, "network_latency_s": 0.0, "launch_s": 0.0, "message_s": 0.0,
    "copy_bytes_per_s": None, "wait_s": 0.0, "pairing_s": 0.0,
}  # fmt: skip


def test_parts_hide_the_compute_between_attentions() -> None:
    """Two machines, free attention: whole, a layer is compute and then traffic; in graphs, they overlap."""
    top = Topology.grid(2, 1, **PLAIN)
    site = attention_site(2, 4, 24, head_dim=8)
    whole = build("torus", site, Mesh.of(top, 2, 1))
    cut = build("torus", replace(site, parts=2), Mesh.of(top, 2, 1), 2, 2)
    sent = whole.bytes_by_link(top)[1] / 2
    assert cut.bytes_by_link(top) == whole.bytes_by_link(top)
    assert price(whole, top, sent).seconds == pytest.approx(2 * sent)
    line, alone = price(cut, top, sent, layers=1000), price(cut, top, sent, layers=1)
    assert sent <= line.seconds <= 1.51 * sent
    assert line.seconds < alone.seconds <= 2 * sent, "a single layer fills and drains"
    assert line.across_bytes == 2 * sent and line.compute_s[0] == pytest.approx(sent)
    both = simulate(pipelined(cut, 3, sent), top)
    assert both.across_bytes == 3 * 2 * sent, "every graph of every layer is sent once"
