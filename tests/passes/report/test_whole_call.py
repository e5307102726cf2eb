"""The line for a model of several graphs names every break with a cure, and what is in no graph."""

from __future__ import annotations

from sfcompile.passes.report.report import GraphReport, Left
from sfcompile.passes.report.whole_call import Skipped, whole_call


def report(flops: float, per_rank: tuple[float, ...], reason: str = "", sites: int = 0) -> GraphReport:
    made = GraphReport(2, 1, 1, 2, total_flops=flops, rank_flops=per_rank, break_reason=reason, sharded_sites=sites)
    made.gathered = [Left("x", "linear", "", "model output", 0.0, 4)]
    return made


def test_one_graph_needs_no_line() -> None:
    assert whole_call([report(2.0, (1.0, 1.0))], []) == ""
    assert whole_call([report(2.0, (1.0, 1.0)), report(2.0, (1.0, 1.0))], []) == "", "two models, no break"


def test_breaks_come_once_with_their_cure_and_the_share_is_of_all_graphs() -> None:
    item = "Unsupported Tensor.item() call with capture_scalar_outputs=False at /a/b/model.py:7"
    graphs = [report(2.0, (1.0, 1.0), item, 1), report(2.0, (2.0, 2.0), item), report(4.0, (2.0, 2.0))]
    line = whole_call(graphs, [])
    assert "the whole call is 3 graphs, 1 sharded attention, 3 gathers, busiest rank 1.25 x FLOPs/2" in line
    assert line.count("Unsupported Tensor.item()") == 1
    assert "at model.py:7 (2 x): compute the number from shapes" in line
    assert line.endswith("2 gathers of these in graphs that end at a break: options={'boundaries': 'shards'} hands "
                         "values on in shards")  # fmt: skip
    for graph in graphs:
        graph.boundary = "0 inputs in shards; 2 outputs in shards"
    assert "boundaries" not in whole_call(graphs, []), "they do"


def test_what_python_runs_is_named() -> None:
    skipped = Skipped("Model.forward", "model.py:3", "something new at model.py:9")
    line = whole_call([report(0.0, (0.0, 0.0))], [skipped])
    assert "Model.forward (model.py:3) is left to Python" in line
    assert "something new at model.py:9: TORCH_LOGS=graph_breaks tells more" in line
