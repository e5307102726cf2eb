"""Readable code: names, calls, layers, and what the phases of a schedule cost a rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import captured
from random_sites import attention_site, gather_site
from torch import fx

from sfcompile.codegen.plan.simulator import simulate
from sfcompile.codegen.plan.step import Step, in_order, layer
from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.prediction.code import Block, Facts, blocks_of, costs_of, input_names, module_of
from sfcompile.runtime.program.topology import Topology


def listed(graph: fx.Graph, names: list[str], sharded: frozenset[str] = frozenset()) -> tuple[Block, ...]:
    return blocks_of(graph, Facts(Topology((0, 0)), names, sharded, {"cumsum": "no rule for this op"}))


def test_calls_read_like_code() -> None:
    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        a, b = torch.nn.functional.linear(x, weight).chunk(2, -1)
        return (a.to(torch.bfloat16) * 2.5).cumsum(1, dtype=torch.float32) + b

    found = captured(run, torch.randn(3, 8, 4), torch.randn(6, 4))
    (block,) = listed(found.gm.graph, ["x", "blocks.0.proj.weight"], frozenset({"linear"}))
    texts = [line.text for line in block.lines]
    assert texts[0] == "linear = linear(x, proj.weight)"
    assert "to_copy = to_copy(split[0], dtype=bf16)" in texts or "to_copy = to_copy(chunk[0], dtype=bf16)" in texts
    assert any(text.startswith("mul = mul(to_copy, 2.5)") for text in texts)
    assert [line.placement for line in block.lines][:1] == ["sharded"] and block.lines[0].flops == 2 * 3 * 8 * 4 * 6
    (cumsum,) = [line for line in block.lines if line.text.startswith("cumsum")]
    assert cumsum.placement == "whole" and cumsum.reason == "no rule for this op" and cumsum.value == "f32[3, 8, 3]"
    views = [line for line in block.lines if line.kind == "view"]
    assert views and not any(line.matters or line.seconds for line in views)
    assert block.seconds == pytest.approx(sum(line.seconds for line in block.lines))


def test_names_are_told_apart() -> None:
    found = captured(lambda x: (x * 2) * 3 * 4, torch.randn(4))
    (block,) = listed(found.gm.graph, ["x"])
    assert [line.text for line in block.lines] == ["mul = mul(x, 2)", "mul_1 = mul(mul, 3)", "mul_2 = mul(mul_1, 4)"]


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("l_self_modules_blocks_modules_0_modules_attn_modules_to_q_parameters_weight_", "blocks.0.attn.to_q.weight"),
        ("l_self_dict_modules_x_embedder_parameters_bias_", "x_embedder.bias"),
        ("l_kwargs_hidden_states_", "hidden_states"),
        ("l_image_", "image"),
        ("l_args_0_", "0"),
    ],
)
def test_inputs_are_named_as_a_user_does(raw: str, name: str) -> None:
    assert input_names([raw]) == [name]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].__dict__['_modules']['transformer_blocks'].0.attn", "transformer_blocks.0.attn"),
        ("L['self']._modules['blocks']._modules['3']", "blocks.3"),
        ("L['self'].blocks[2].mlp", "blocks.2.mlp"),
        ("", ""),
    ],
)
def test_modules_are_named_as_a_user_does(path: str, name: str) -> None:
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"key": (path, torch.nn.Module)}
    assert module_of(node) == name


def listed_step(schedule: Schedule, rank: int, top: Topology, before_s: float) -> Step:
    return Step(in_order("p", [schedule], before_s), {"p": [schedule]}, rank, top)


@pytest.mark.parametrize("across", ["ulysses", "ring"])
def test_stages_add_up_to_the_layer(across: str) -> None:
    top = Topology.grid(2, 2)
    schedule = build("torus", attention_site(4), Mesh.of(top, 2, 2, across))
    whole = simulate(layer(schedule, 1, 1e-3), top)
    costs = [costs_of(listed_step(schedule, rank, top, 1e-3)) for rank in range(4)]
    slowest = max(sum(cost.times.seconds for cost in of_rank) for of_rank in costs)
    assert slowest == pytest.approx(whole.seconds - 1e-3)
    for rank, of_rank in enumerate(costs):
        assert sum(cost.times.waits_s for cost in of_rank) == pytest.approx(float(whole.exposed_s[rank]))
    sent = sum(cost.nbytes for of_rank in costs for cost in of_rank)
    across_sent = sum(cost.across for of_rank in costs for cost in of_rank)
    assert (sent - across_sent, across_sent) == schedule.bytes_by_link(top) and across_sent > 0


def test_parts_send_together_what_the_whole_sends() -> None:
    top = Topology.grid(2, 2)
    site = replace(attention_site(4, tokens=64), parts=2)
    schedule = build("torus", site, Mesh.of(top, 4, 1), 2, 2)
    costs = [costs_of(listed_step(schedule, rank, top, 0.0)) for rank in range(4)]
    assert [cost.times.stage.part for cost in costs[0] if cost.kind == "put"] == [0, 0, 0, 1, 1, 1]
    assert sum(cost.nbytes for of_rank in costs for cost in of_rank) == sum(schedule.bytes_by_link(top))


def test_a_gather_costs_what_it_sends() -> None:
    top = Topology.grid(1, 2)
    schedule = build("", gather_site(2), Mesh.of(top, 1, 2))
    start, finish = costs_of(listed_step(schedule, 0, top, 0.0))
    assert (start.kind, start.nbytes, start.across) == ("gather", 2 * 5 * 3 * 4, 0)
    assert finish.times.waits_s > 0.0 and finish.nbytes == 0
