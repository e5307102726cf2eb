from __future__ import annotations

import torch
from helpers import captured

from sfcompile.passes.graph.cost import flops, gather_seconds, is_view, seconds, value_bytes
from sfcompile.passes.graph.op_view import OpView
from sfcompile.runtime.program.topology import Topology


def ops(fn: object, *args: torch.Tensor) -> dict[str, OpView]:
    found = (OpView.of(node) for node in captured(fn, *args).gm.graph.nodes)  # type: ignore[arg-type]
    return {op.name: op for op in found if op is not None}


def test_flops_of_products() -> None:
    def products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, w)
        z = y @ w
        return torch.bmm(z, z.transpose(1, 2)) + torch.einsum("bsd,btd->bst", z, z)

    found = ops(products, torch.zeros(2, 5, 4), torch.zeros(4, 4))
    assert flops(found["linear"]) == flops(found["matmul"]) == 2 * 2 * 5 * 4 * 4
    assert flops(found["bmm"]) == flops(found["einsum"]) == 2 * 2 * 5 * 5 * 4
    assert flops(found["add"]) == 0


def test_seconds_are_the_larger_of_arithmetic_and_memory() -> None:
    topology = Topology((0, 0), flops_per_s=1e3, memory_bytes_per_s=1e3)
    found = ops(lambda x, w: torch.nn.functional.linear(x, w).transpose(0, 1) * 2, torch.zeros(8, 4), torch.zeros(4, 4))
    assert seconds(found["linear"], topology) == max(2 * 8 * 4 * 4, 4 * (32 + 16 + 32)) / 1e3
    assert seconds(found["transpose"], topology) == 0.0 and is_view(found["transpose"])
    assert seconds(found["mul"], topology) == 2 * 4 * 32 / 1e3


def test_attention_has_a_rate_of_its_own() -> None:
    q = torch.zeros(1, 2, 8, 4)
    (op,) = ops(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q), q).values()
    assert flops(op) == 4 * 2 * 8 * 8 * 4
    assert seconds(op, Topology((0, 0), flops_per_s=4.0, memory_bytes_per_s=1e9)) == 512
    assert seconds(op, Topology((0, 0), flops_per_s=4.0, attention_flops_per_s=2.0, memory_bytes_per_s=1e9)) == 1024


def test_a_gather_costs_what_crosses_the_slower_link() -> None:
    node = ops(lambda x: x * 2, torch.zeros(8, 4))["mul"].node
    assert value_bytes(node) == 128
    one = Topology((0, 0, 0, 0), local_bytes_per_s=1.0, local_latency_s=0.0)
    assert gather_seconds(node, one) == 96
    two = Topology((0, 0, 1, 1), local_bytes_per_s=1e9, network_bytes_per_s=1.0, network_latency_s=0.0)
    assert gather_seconds(node, two) == 128, "each of a machine's two ranks fetches the other machine's half"
    assert gather_seconds(node, Topology((0,))) == 0.0
