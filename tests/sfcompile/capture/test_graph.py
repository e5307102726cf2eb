from __future__ import annotations

import pytest
import torch
from helpers import captured
from torch import nn

from sfcompile.capture.graph import break_reason, capture, refuse_training
from sfcompile.errors import TrainingGraphError


def ops(gm: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def test_high_level_ops_stay_whole() -> None:
    def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        q = nn.functional.layer_norm(nn.functional.linear(x, w), (8,)).unflatten(-1, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, nn.functional.rms_norm(q, (4,)))

    x, w = torch.randn(2, 5, 8), torch.randn(8, 8)
    got = captured(block, x, w)
    for name in ("linear", "layer_norm", "rms_norm", "scaled_dot_product_attention"):
        assert any(f"aten.{name}." in op for op in ops(got.gm)), ops(got.gm)
    assert torch.equal(got.gm(x, w)[0], block(x, w))


def test_in_place_writes_become_functional() -> None:
    def write(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[:, 1:3] += 1.0
        return y

    x = torch.randn(2, 5)
    got = captured(write, x)
    assert not any(node.target._schema.is_mutable for node in got.gm.graph.nodes if hasattr(node.target, "_schema"))
    assert torch.equal(got.gm(x)[0], write(x))


def test_type_as_reads_only_a_dtype() -> None:
    got = captured(lambda x, y: x.double().type_as(y), torch.randn(3), torch.randn(5))
    assert not any("type_as" in op for op in ops(got.gm))


def test_every_value_has_static_sizes_and_the_users_source_line() -> None:
    got = captured(lambda x: x.cos() + 1, torch.randn(4, 3))
    calls = [node for node in got.gm.graph.nodes if node.op == "call_function"]
    assert all(type(size) is int for node in calls for size in node.meta["val"].shape)
    assert all("test_graph.py" in (node.stack_trace or "") for node in calls)


def test_symbolic_sizes_are_fixed_and_dropped_from_the_inputs() -> None:
    seen, sizes = [], []

    def backend(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        seen.append(capture(gm, inputs))
        sizes.append(len(inputs) - len(seen[-1].tensor_inputs))
        return lambda *args: seen[-1].gm(*(args[i] for i in seen[-1].tensor_inputs))

    torch._dynamo.reset()
    run = torch.compile(lambda x: x.reshape(-1) * x.shape[0], backend=backend, dynamic=True)
    x = torch.randn(4, 3)
    assert torch.equal(run(x), x.reshape(-1) * 4)
    assert len(seen) == 1 and sizes[0] >= 1
    run(torch.randn(6, 3))
    assert len(seen) == 1, "reading the present size put no guard on Dynamo's graph"


def test_meta_models_are_read_as_cpu() -> None:
    seen = []

    def backend(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        seen.append(capture(gm, inputs))
        return lambda *args: (torch.empty(4, 8, device="meta"),)

    torch._dynamo.reset()
    model = nn.Linear(3, 8, device="meta")
    with torch.no_grad():
        torch.compile(lambda x: model(x) + torch.arange(8, device="meta"), backend=backend)(
            torch.empty(4, 3, device="meta")
        )
    devices = {node.meta["val"].device.type for node in seen[0].gm.graph.nodes if "val" in node.meta}
    assert devices == {"cpu"}


def test_training_is_refused() -> None:
    with pytest.raises(TrainingGraphError, match="1 of 2 graph inputs require gradients"):
        refuse_training([torch.zeros(1), torch.zeros(1, requires_grad=True)])
    with torch.no_grad():
        refuse_training([torch.zeros(1, requires_grad=True)])


def test_inputs_that_are_written_to_come_back_as_outputs() -> None:
    def write(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache[:, 1:3] = x[:, 1:3] * 2
        return x + cache

    x, cache = torch.randn(2, 5), torch.zeros(2, 5)
    got = captured(write, x, cache)
    assert got.written == (1,)
    out, new = got.gm(x, torch.zeros(2, 5))
    want = write(x, cache)
    assert torch.equal(out, want) and torch.equal(new, cache)
    assert captured(lambda x: (x * 2).add_(1), x).written == ()


def test_what_ended_a_graph_is_named() -> None:
    seen: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: object) -> object:
        seen.append(break_reason(gm))
        return gm.forward

    def two(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1

    torch._dynamo.reset()
    torch.compile(two, backend=backend)(torch.zeros(3))
    assert len(seen) == 2 and "test_graph.py:" in seen[0] and seen[1] == ""


def test_rows_behind_the_last_one_are_no_part_of_a_cat() -> None:
    def padded(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.double() * 2, x[:, x.shape[1] :], x.new_zeros(2, 0)], dim=1)

    def widened_by_nothing(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x[:, :0].double()], dim=1)

    x = torch.randn(2, 5)
    for function, operands in ((padded, 1), (widened_by_nothing, 2)):
        got = captured(function, x)
        (cat,) = got.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
        assert len(cat.args[0]) == operands
        result, want = got.gm(x)[0], function(x)
        assert result.dtype == want.dtype and torch.equal(result, want)
