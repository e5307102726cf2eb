from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from helpers import captured

from sfcompile.passes.report.dump import Dump, count_ops, difference, graph_text


def test_each_pass_has_a_file_that_says_what_changed(tmp_path: Path) -> None:
    graph = captured(lambda x: (x * 2).relu(), torch.randn(3)).gm.graph
    other = captured(lambda x: x * 2 * 3, torch.randn(3)).gm.graph
    dump = Dump(tmp_path, graph)
    dump.after("look", "reads only", 0.001, graph, {"sites": "none", "empty": ""})
    dump.after("change", "why not", 0.002, other, {"sites": "none", "made": "x\ny"})
    (folder,) = tmp_path.iterdir()
    assert (folder / "00_captured.txt").read_text() == graph_text(graph)
    first, second = ((folder / name).read_text() for name in ("01_look.txt", "02_change.txt"))
    assert first.startswith("# pass 1 look, 1.0 ms: reads only\n\n# sites\nnone\n") and "empty" not in first
    assert first.endswith("# graph as in 00_captured.txt\n")
    assert "# sites" not in second and "# made\nx\ny" in second and "aten.mul.Tensor: 1 -> 2 (+1)" in second
    assert second.rstrip().endswith(graph_text(other).rstrip())


def test_a_graph_is_one_line_a_node_with_shapes() -> None:
    lines = graph_text(captured(lambda x: x * 2, torch.randn(3)).gm.graph).splitlines()
    assert len(lines) == 3 and lines[1].startswith("float32[3]") and "aten.mul.Tensor" in lines[1]


def test_counts_are_compared_largest_change_first() -> None:
    before, after = Counter({"a": 3, "b": 1, "same": 4}), Counter({"b": 2, "same": 4, "c": 5})
    assert difference(before, after) == [
        "# calls: 8 -> 11 (+3)", "#   c: 0 -> 5 (+5)", "#   a: 3 -> 0 (-3)", "#   b: 1 -> 2 (+1)",
    ]  # fmt: skip
    assert count_ops(captured(lambda x: x.relu().relu(), torch.randn(3)).gm.graph) == {"aten.relu.default": 2}
