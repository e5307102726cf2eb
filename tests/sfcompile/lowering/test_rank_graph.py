"""The user's options reach the passes; what the passes do with them is tested in tests/passes."""

from __future__ import annotations

import pytest
import torch
from helpers import captured
from models import build

from sfcompile.errors import InternalError
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
    with pytest.raises(InternalError, match="in different orders") as caught:
        compile_alike(compile, lambda made: [["put"], ["attend"]])
    assert caught.value.on_every_rank


def test_weights_in_shares_are_inputs_of_their_own() -> None:
    model, inputs = build("joint")
    got, topology = captured(model, *inputs), Topology.grid(2, 1)
    asked = Options.from_dict({"placement": "shard"})
    (large, *_) = got.parameters
    made = run_passes(got, topology, 1, asked, lambda plan: plan(), split_batch=False, weights=[large])
    node = [n for n in made.gm.graph.nodes if n.op == "placeholder"][got.tensor_inputs.index(large)]
    (captured_node,) = [n for n in got.gm.graph.nodes if n.name == node.name]
    assert node.meta["val"].shape[0] * 2 == captured_node.meta["val"].shape[0]
    assert len(made.programs) == 2


def test_what_crosses_a_break_is_cut_over_all_ranks() -> None:
    """Machines behind slow links would compute the same each, and a rank would own nothing of the others' rows."""
    torch.manual_seed(0)
    weights = [torch.randn(32, 32) for _ in range(3)]

    def block(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        q, k, v = ((x @ weight).unflatten(2, (4, 8)).transpose(1, 2) for weight in weights)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    got, slow = captured(block, torch.randn(1, 1024, 32), *weights), Topology.grid(2, 2, network_bytes_per_s=1e6)
    plain = run_passes(got, slow, 3, Options(), lambda plan: plan(), split_batch=True)
    assert plain.report.copies == 2
    made = run_passes(got, slow, 3, Options(), lambda plan: plan(), split_batch=True, crossing=[0])
    assert made.report.copies == 1
    assert all(len(cut.owned) == 4 for cut in made.crossing.values())
