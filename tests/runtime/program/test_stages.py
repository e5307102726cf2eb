"""A step as plain data."""

from __future__ import annotations

from sfcompile.runtime.program.stages import GraphStages, Stage


def test_a_rank_computes_before_its_stages_and_after_the_last() -> None:
    graph = GraphStages((Stage("p", 0, "put_q", before_s=1.0), Stage("p", 0, "attend"), Stage("p", 0, "collect")), 0.5)
    assert graph.compute_s == 1.5 and graph.stages[1].part == -1
    assert GraphStages().compute_s == 0.0
