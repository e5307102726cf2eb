"""The page of a dump."""

from __future__ import annotations

from sfcompile.passes.report.dump_index import DumpedPass, index_page


def test_every_pass_has_a_row_with_its_file_and_its_changes() -> None:
    look = DumpedPass("01_look.txt", "reads <only>", 0.0015, 7, ())
    change = DumpedPass("02_change.txt", "why not", 0.002, 8, ("calls: 7 -> 8 (+1)", "aten.mul: 1 -> 2 (+1)"))
    text = index_page("graph-1f0c9a2b", "00_captured.txt", [look, change], ["plan.txt"])
    assert "<h1>graph-1f0c9a2b</h1>" in text and "reads &lt;only&gt;" in text
    assert ">01_look</a>" in text and "the graph is as it was" in text and ">1.5</td>" in text
    assert "2 kinds" in text and "aten.mul: 1 -&gt; 2 (+1)" in text
    assert 'href="plan.txt"' in text and "http" not in text


def test_before_the_passes_have_ended_nothing_is_listed_after_them() -> None:
    assert "After the passes" not in index_page("graph", "00_captured.txt", [], [])
