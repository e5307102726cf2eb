"""Readable code: names, calls, layers, and what the phases of a schedule cost a rank."""

from __future__ import annotations

import pytest
import torch
from helpers import captured
from random_sites import attention_site, gather_site
from torch import fx

from sfcompile.codegen.plan.simulator import layer, simulate
from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.prediction.code import Block, Exchange, Facts, blocks_of, input_names, module_of
from sfcompile.runtime.program.topology import Topology


def no_exchange(program: str, site: int) -> Exchange:
    raise AssertionError("there is no communication here")


def listed(graph: fx.Graph, names: list[str], sharded: frozenset[str] = frozenset()) -> tuple[Block, ...]:
    return blocks_of(graph, Facts(Topology((0, 0)), names, sharded, {"cumsum": "no rule for this op"}, no_exchange))


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


@pytest.mark.parametrize("across", ["ulysses", "ring"])
def test_phases_add_up_to_the_layer(across: str) -> None:
    top = Topology.grid(2, 2)
    schedule = build("torus", attention_site(4), Mesh.of(top, 2, 2, across))
    whole = simulate(layer(schedule, 1, 1e-3), top)
    costs = [Exchange.of(schedule, rank, top, 1e-3).phases for rank in range(4)]
    assert max(sum(cost[0] for cost in phases.values()) for phases in costs) == pytest.approx(whole.seconds - 1e-3)
    for rank, phases in enumerate(costs):
        assert sum(cost[1] for cost in phases.values()) == pytest.approx(float(whole.exposed_s[rank]))
    sent = sum(cost[2] for phases in costs for cost in phases.values())
    across_sent = sum(cost[3] for phases in costs for cost in phases.values())
    assert (sent - across_sent, across_sent) == schedule.bytes_by_link(top) and across_sent > 0


def test_a_gather_costs_what_it_sends() -> None:
    top = Topology.grid(1, 2)
    schedule = build("", gather_site(2), Mesh.of(top, 1, 2))
    found = Exchange.of(schedule, 0, top, 0.0)
    assert found.what == "gather" and found.phases["gather_start"][2:] == (2 * 5 * 3 * 4, 0)
    assert found.phases["gather_finish"][1] > 0.0 and found.phases["gather_finish"][2] == 0
