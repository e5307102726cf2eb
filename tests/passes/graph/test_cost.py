from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import captured

from sfcompile.codegen.plan.simulator import simulate
from sfcompile.codegen.plan.step import layer
from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.passes.graph.cost import flops, gather_seconds, is_view, seconds, spread_seconds, unpriced, value_bytes
from sfcompile.passes.graph.op_view import OpView
from sfcompile.runtime.program.sites import ExchangeSite
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


def test_flops_of_convolutions_both_ways() -> None:
    x, w = torch.zeros(2, 4, 5, 6), torch.zeros(4, 3, 2, 2)
    found = ops(lambda x, w: torch.nn.functional.conv_transpose2d(x, w, stride=2), x, w)
    assert flops(found["conv_transpose2d"]) == 2 * 2 * 4 * 5 * 6 * 3 * 2 * 2
    back = ops(lambda x, w: torch.nn.functional.conv2d(x, w, stride=2), torch.zeros(2, 3, 10, 12), w)
    assert flops(back["conv2d"]) == flops(found["conv_transpose2d"])


@torch.library.custom_op("test_cost::kernel", mutates_args=())
def kernel(x: torch.Tensor) -> torch.Tensor:
    return x @ x


@kernel.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_what_nobody_has_a_price_for_is_said() -> None:
    found = ops(lambda x: torch.cdist(kernel(x) * 2, x) @ x, torch.zeros(4, 4))
    assert {name for name, op in found.items() if unpriced(op)} == {"kernel", "cdist"}
    assert all(flops(op) == 0.0 for op in found.values() if unpriced(op))
    whole = (torch.zeros(20, 16, dtype=torch.int8), torch.zeros(16, 8, dtype=torch.int8))
    (product,) = ops(lambda a, b: torch._int_mm(a, b), *whole).values()
    assert flops(product) == 2 * 20 * 16 * 8 and not unpriced(product)


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


@pytest.mark.parametrize("shares", ["even", "uneven", "few"])
@pytest.mark.parametrize("topology", ["1x8:a100-efa", "4x8:a100-efa", "3x4:a100-efa", "4x2"])
def test_a_gather_is_priced_as_it_is_simulated(topology: str, shares: str) -> None:
    """Without software: no run is faster than the busiest link, and ranks that start at once are not much slower."""
    given = {"message_s": 0.0, "wait_s": 0.0, "copy_bytes_per_s": None, "local_latency_s": 0.0}
    where = Topology.parse(topology).with_constants({**given, "network_latency_s": 0.0})
    ranks = where.num_ranks
    rows = np.full(ranks, 64)
    if shares == "uneven":
        rows = np.random.default_rng(ranks).integers(1, 128, ranks)
    elif shares == "few":
        rows = np.where(np.arange(ranks) < max(2, ranks // 8), 512, 0)
    edges = np.concatenate([[0], np.cumsum(rows)])
    held = tuple(((int(first), int(n)),) if n else () for first, n in zip(edges, rows, strict=False))
    site = ExchangeSite.gather("x", (int(edges[-1]), 2**16), torch.float32, 0, held)
    played = simulate(layer(build("exchange", site, Mesh.of(where, 1, ranks)), 1), where).seconds
    priced = spread_seconds(float(edges[-1]) * 2**18, where, rows / edges[-1])
    assert 0.5 * played <= priced <= 1.05 * played
