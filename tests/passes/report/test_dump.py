from __future__ import annotations

import re
import resource
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import captured

from sfcompile.errors import OptionError
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
    dump.add("plan.txt", "a plan")
    index = (folder / "index.html").read_text()
    links = re.findall(r'href="([^"]+)"', index)
    assert links == ["00_captured.txt", "01_look.txt", "02_change.txt", "plan.txt"]
    assert all((folder / link).is_file() for link in links)


def test_a_full_disk_is_an_error_of_ours_and_leaves_no_half_file(tmp_path: Path) -> None:
    graph = captured(lambda x: x * 2, torch.randn(3)).gm.graph
    dump = Dump(tmp_path, graph)
    (folder,) = tmp_path.iterdir()
    before = {path.name: path.read_text() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ, so a write beyond the limit is an OSError, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OptionError, match="dump=.*cannot be written"):
            dump.write("00_captured.txt", "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be written"):
        Dump(tmp_path / "file", captured(lambda x: x * 2, torch.randn(3)).gm.graph)


def test_a_graph_is_one_line_a_node_with_shapes() -> None:
    lines = graph_text(captured(lambda x: x * 2, torch.randn(3)).gm.graph).splitlines()
    assert len(lines) == 3 and lines[1].startswith("float32[3]") and "aten.mul.Tensor" in lines[1]


def test_counts_are_compared_largest_change_first() -> None:
    before, after = Counter({"a": 3, "b": 1, "same": 4}), Counter({"b": 2, "same": 4, "c": 5})
    assert difference(before, after) == [
        "# calls: 8 -> 11 (+3)", "#   c: 0 -> 5 (+5)", "#   a: 3 -> 0 (-3)", "#   b: 1 -> 2 (+1)",
    ]  # fmt: skip
    assert count_ops(captured(lambda x: x.relu().relu(), torch.randn(3)).gm.graph) == {"aten.relu.default": 2}
