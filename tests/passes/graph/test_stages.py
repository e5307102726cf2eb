"""A finished graph as a step: every node that talks, in order, and what lies between in seconds."""

from __future__ import annotations

import pytest
from helpers import captured
from models import build

from sfcompile.passes.graph.cost import seconds
from sfcompile.passes.graph.local_graph import COMMUNICATION
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.graph.stages import stages_of, without
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.stages import GraphStages, Stage
from sfcompile.runtime.program.topology import Topology


@pytest.mark.parametrize("kernels", [False, True])
def test_stages_are_the_nodes_that_talk(kernels: bool) -> None:
    model, inputs = build("joint")
    got, top = captured(model, *inputs), Topology.grid(1, 2)
    asked = Asked(shard_everything=True, split_batch=False, kernels=kernels, fuse_puts=kernels)
    compiled = run_pipeline(State(got.gm, got.mode, top, 0, asked))
    nodes = [node for node in compiled.gm.graph.nodes if node.target in COMMUNICATION]
    graph = stages_of(compiled.gm.graph, top)
    assert len(graph.stages) == len(nodes) > 0 and graph == compiled.report.stages
    for stage in graph.stages:
        assert stage.phase in compiled.programs[stage.program][stage.site].origin.phases
    ops = [OpView.of(node) for node in compiled.gm.graph.nodes if node.target not in COMMUNICATION]
    assert graph.compute_s == pytest.approx(sum(seconds(op, top) for op in ops if op is not None), rel=1e-3)


def test_a_step_without_one_program_computes_as_much() -> None:
    graph = GraphStages(
        (Stage("a", 0, "x", before_s=1.0), Stage("b", 0, "x", before_s=2.0), Stage("a", 0, "y", before_s=4.0),
         Stage("b", 0, "y", before_s=8.0)), 16.0,
    )  # fmt: skip
    left = without(graph, "b")
    assert [(stage.phase, stage.before_s) for stage in left.stages] == [("x", 1.0), ("y", 6.0)]
    assert left.after_s == 24.0 and left.compute_s == graph.compute_s
