"""The user's options reach the passes; what the passes do with them is tested in tests/passes."""

from __future__ import annotations

import torch
from helpers import captured
from models import build

from sfcompile.lowering.rank_graph import compile_alike, run_passes
from sfcompile.options import Options
from sfcompile.runtime.program.topology import Topology


def compiled(**options: object) -> str:
    model, inputs = build("joint")
    with torch.no_grad():
        got = captured(model, *inputs)
    asked = Options.from_dict({"placement": "shard", **options})
    made = run_passes(got, Topology.grid(1, 4), 0, asked, lambda plan: plan(), split_batch=False)
    return f"{made.report.schedule} {made.kernel_attention}"


def test_mesh_schedule_and_attention_are_those_asked_for() -> None:
    assert "2x2" in compiled(mesh={"ulysses": 2, "ring": 2})
    assert compiled(schedule="ring").startswith("ring")
    assert compiled(attention="aten").endswith("False") and compiled(attention="triton").endswith("True")


def test_where_groups_come_to_different_graphs_all_compile_once_more_without_groups() -> None:
    asked: list[bool] = []

    def compile(split_batch: bool) -> str:
        asked.append(split_batch)
        return "groups" if split_batch else "tokens"

    assert compile_alike(compile, lambda made: [["put", "attend"], ["put", "attend"]]) == "groups"
    assert compile_alike(compile, lambda made: [["put"], ["attend"] if made == "groups" else ["put"]]) == "tokens"
    assert asked == [True, True, False]
