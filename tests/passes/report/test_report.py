from __future__ import annotations

from sfcompile.passes.report.report import GraphReport, Left


def test_the_plan_as_a_table() -> None:
    report = GraphReport(4, 2, 2, 2, axes=((4608, 2, 1e9),), sharded_sites=3, total_flops=4e9, rank_flops=(1e9, 1.1e9))
    report.gathered = [Left("linear_3", "linear.default", "dit.py:88", "model output", 0.0, 2048)]
    report.replicated = [Left(f"sort_{i}", "sort", "dit.py:9", "it mixes tokens", 2e6, 0) for i in range(14)]
    text = str(report)
    assert "4 on 2 machines" in text and "batch 1 x ulysses 2 x ring 2" in text
    assert "4608 tokens in 2 segments" in text and "busiest rank 1.100 x total/4" in text
    assert "2.0 KiB" in text and "2.0 MFLOP" in text and "... and 2 more" in text
    assert "14 token ops not sharded" in report.headline


def test_the_headline_says_what_no_flops_count() -> None:
    report = GraphReport(2, 1, 1, 2)
    assert "unknown" not in report.headline
    report.unpriced = ["mylib.fused", "aten.lstm", "mylib.fused"]
    assert "FLOPs of 3 ops unknown and not counted (aten.lstm, mylib.fused)" in report.headline
    assert "FLOPs of 3 ops unknown" in str(report)


def test_a_long_plan_is_cut_in_print_only() -> None:
    report = GraphReport(2, 1, 1, 2, plans=["\n".join(f"row {i}" for i in range(30))])
    assert "row 9" in str(report) and "row 10" not in str(report) and "and 20 more candidates" in str(report)


def test_views_are_not_what_strict_objects_to() -> None:
    report = GraphReport(2, 1, 1, 2)
    report.replicated = [Left("view_1", "view", "", "", 0.0, 8, is_view=True), Left("sort", "sort", "", "", 0.0, 8)]
    assert [row.node for row in report.left_behind] == ["sort"]


def test_an_empty_graph_has_a_report() -> None:
    assert "none" in str(GraphReport(2, 1, 1, 2)) and GraphReport(2, 1, 1, 2).share == 0.0
