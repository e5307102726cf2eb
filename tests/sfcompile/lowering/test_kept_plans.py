"""What is kept on disk is taken where all that decides it is the same on all ranks, and nowhere else."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kept_ranks
import pytest
import torch
from helpers import captured
from processes import preload, run_processes
from torch import fx

from sfcompile.lowering import kept_plans
from sfcompile.lowering.kept_plans import KeptPlans, agreed
from sfcompile.lowering.rank_graph import run_passes
from sfcompile.options import Options
from sfcompile.passes.runner import Compiled
from sfcompile.runtime.program.topology import Topology

preload("kept_ranks")


def attend(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (x @ w).chunk(3, -1))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v) + 1


def planned(rank: int = 0, tokens: int = 32) -> Compiled:
    graph = captured(attend, torch.randn(1, tokens, 16), torch.randn(16, 48))
    return run_passes(graph, Topology.grid(1, 2), rank, Options(placement="shard"), lambda plan: plan(), False)


def kept(folder: Path, text: str = "a graph") -> KeptPlans:
    return KeptPlans(folder, text)


def test_a_graph_comes_back_as_it_was(tmp_path: Path) -> None:
    mine = planned()
    kept(tmp_path).keep_graph("all", mine, "mark")
    again = kept(tmp_path).graph("all")
    assert again is not None and again.mark == "mark"
    assert again.compiled.gm.code == mine.gm.code and again.compiled.report == mine.report
    assert again.compiled.programs == mine.programs and again.compiled.order == mine.order
    for old, new in zip(mine.gm.graph.nodes, again.compiled.gm.graph.nodes, strict=True):
        want, got = old.meta.get("val"), new.meta.get("val")
        if isinstance(want, torch.Tensor):
            assert got.fake_mode is again.mode
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype), old
    inputs = [node.meta["val"] for node in again.compiled.gm.graph.nodes if node.op == "placeholder"]
    assert len({value.untyped_storage()._cdata for value in inputs}) == len(inputs)


def test_what_a_capture_found_comes_back(tmp_path: Path) -> None:
    facts = captured(attend, torch.randn(1, 32, 16), torch.randn(16, 48)).facts
    assert kept(tmp_path).facts() is None
    kept(tmp_path).keep_facts(facts)
    assert kept(tmp_path).facts() == facts and facts.mark and not facts.draws


def test_another_start_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path).keep_graph("rank 0", planned(), "mark")
    assert kept(tmp_path).graph("rank 0") is not None
    assert kept(tmp_path).graph("rank 1") is None
    assert kept(tmp_path, "another graph").graph("rank 0") is None
    monkeypatch.setattr(kept_plans, "versions", lambda: "sources of another day")
    assert kept(tmp_path).graph("rank 0") is None


def test_versions_hold_every_source_byte_by_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(kept_plans, "_folders", lambda: [tmp_path])
    seen = set()
    for change in ("x = 1\n", "x = 2\n", "x = 2 \n"):
        (tmp_path / "room" / "a.py").write_text(change)
        seen.add(kept_plans.versions.__wrapped__())
    (tmp_path / "room" / "b.py").write_text("")
    assert len(seen | {kept_plans.versions.__wrapped__()}) == 4
    monkeypatch.setattr(torch, "__version__", "2.13.0+mine")
    assert kept_plans.versions.__wrapped__() not in seen
    monkeypatch.undo()
    folders = kept_plans._folders()
    assert {folder.name for folder in folders} >= {"sfcompile", "passes", "codegen", "runtime"}


@pytest.mark.parametrize("damage", ["cut short", "a byte", "no text of ours", "a foreign call", "a wrong schedule"])
def test_a_damaged_file_is_none_and_the_log_says_so(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = kept(tmp_path)
    book.keep_graph("all", planned(), "mark")
    (path,) = tmp_path.glob("graph-*.json")
    text = path.read_text()
    body = text.partition("\n")[2]
    if damage == "cut short":
        path.write_text(text[: len(text) // 2])
    elif damage == "a byte":
        path.write_text(text.replace("mark", "mork", 1))
    else:
        changed = {
            "no text of ours": "[1, 2]",
            "a foreign call": body.replace("aten.add.Tensor", "os.system.now"),
            "a wrong schedule": body.replace('\\"offset\\":0', '\\"offset\\":1', 1),
        }[damage]
        assert changed != body
        book._save("graph", "all", lambda: changed)
    with caplog.at_level(logging.INFO, "sfcompile"):
        assert book.graph("all") is None
    assert str(path) in caplog.text and "made anew" in caplog.text


def test_a_file_under_another_name_is_none(tmp_path: Path) -> None:
    one, other = kept(tmp_path), kept(tmp_path, "another graph")
    for book in (one, other):
        book.keep_graph("all", planned(), "mark")
    first, second = (book._place("graph", "all") for book in (one, other))
    second.write_bytes(first.read_bytes())
    assert one.graph("all") is not None and other.graph("all") is None


def test_a_full_disk_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.INFO, "sfcompile"):
        kept(tmp_path / "file" / "plans").keep_graph("all", planned(), "mark")
    assert "not kept for the next start" in caplog.text
    assert kept(tmp_path / "file" / "plans").graph("all") is None


def test_files_not_used_for_longest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_plans, "MOST_FILES", 2)
    book = kept(tmp_path)
    for name, age in (("killed.new", 7200), ("written.new", 0)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    for name in "abcd":
        book._save("capture", name, lambda: "1")
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert [path.name for path in tmp_path.glob("*.new")] == ["written.new"]
    assert book._load("capture", "d", lambda text: text) == "1"
    monkeypatch.setattr(kept_plans, "MOST_BYTES", 100)  # a digest and a line end are 65
    book._save("capture", "e", lambda: "1")
    assert (
        book._load("capture", "d", lambda text: text) is None and book._load("capture", "e", lambda text: text) == "1"
    )


@pytest.mark.parametrize(
    ("everyone", "take"),
    [
        ([["x", "n0"], ["x", "n1"]], True),
        ([["x", "n0"], ["", "n1"]], False),
        ([["", "n0"], ["x", "n1"]], False),
        ([["", "n0"], ["", "n1"]], False),
        ([["x", "n0"], ["y", "n1"]], False),
    ],
)
def test_all_ranks_take_what_they_have_or_none_does(everyone: list[list[str]], take: bool) -> None:
    assert agreed(everyone) == (take, "n0")


@pytest.mark.parametrize(
    ("why", "asked", "registered"),
    [
        ("off", Options(), ""),
        ("from outside", Options(), "my_pass"),
        ("from outside", Options(passes=("analyse_attention",)), ""),
        ("a dump", Options(dump=Path("somewhere")), ""),
        ("a comparison", Options(verify=1), ""),
    ],
)
def test_what_is_not_kept(
    why: str, asked: Options, registered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv(kept_plans.VARIABLE, "off" if why == "off" else "")
    seen: list[KeptPlans | None] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(KeptPlans.of(gm, inputs, asked, tmp_path, registered))
        seen.append(KeptPlans.of(gm, inputs, Options(), tmp_path, ""))
        return gm

    torch._dynamo.reset()
    with torch.no_grad(), caplog.at_level(logging.DEBUG, "sfcompile"):
        torch.compile(attend, backend=backend)(torch.randn(1, 32, 16), torch.randn(16, 48))
    assert seen[0] is None and why in caplog.text
    assert (seen[1] is None) == (why == "off")


@pytest.mark.ranks
def test_ranks_that_start_again_take_their_graphs_from_the_disk(tmp_path: Path) -> None:
    run_processes(2, kept_ranks.starts, (str(tmp_path),), timeout_s=240.0)
