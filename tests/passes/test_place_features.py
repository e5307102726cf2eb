"""Products of the time and the text: by features where their weights cost more to read than an exchange, and exact."""

from __future__ import annotations

import pytest
import torch
from helpers import captured, placeholder_values, run_compiled
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.functional import silu

from sfcompile.passes import place_features
from sfcompile.passes.runner import Compiled, run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.topology import Topology

WIDTH, TEXT, LAYERS = 32, 256, 3


class Layer(nn.Module):
    """Modulated by the time, which every layer activates anew; attends to itself and to a text."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.qkv = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(TEXT, WIDTH, bias=False), nn.Linear(TEXT, WIDTH)

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(silu(time)).unsqueeze(1).chunk(2, -1)
        q, k, v = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in self.qkv(x * (1 + scale) + shift).chunk(3, -1))
        x = x + sdpa(q, k, v).transpose(1, 2).flatten(2)
        q, k, v = (y.unflatten(2, (4, 8)).transpose(1, 2) for y in (self.q(x), self.k(text), self.v(text)))
        return x + sdpa(q, k, v).transpose(1, 2).flatten(2)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, time, text)
        return x


def planned(ranks: int, memory: float, machines: int = 1) -> tuple[list[Compiled], Topology, list[torch.Tensor]]:
    """On ranks whose memory is so fast, and the inputs."""
    torch.manual_seed(1)
    got = captured(Layers(), torch.randn(1, 24, WIDTH), torch.randn(1, WIDTH), torch.randn(1, 5, TEXT))
    topology = Topology.grid(machines, ranks // machines, memory_bytes_per_s=memory)
    asked = Asked(shard_everything=True, parts=())
    compiled = [run_pipeline(State(got.gm, got.mode, topology, rank, asked)) for rank in range(ranks)]
    values = placeholder_values(got)
    with torch.no_grad():
        want = got.gm(*values)[0]
    for (out,) in run_compiled(compiled, topology, values):
        # The contract: fp32 sums in another order, by the scale of the output.
        assert float((out - want).abs().max() / want.abs().max()) <= 1e-5
    return compiled, topology, values


def exchanged(compiled: Compiled) -> list[str]:
    return [row.reason for row in compiled.report.gathered if "by features" in row.reason]


@pytest.mark.parametrize(("ranks", "machines"), [(2, 1), (4, 1), (4, 2)])
def test_weights_are_read_once_by_all_ranks_together(ranks: int, machines: int) -> None:
    compiled, _, _ = planned(ranks, 1e6, machines)
    assert len({tuple(one.order) for one in compiled}) == 1, "all ranks talk in one order"
    text, time = exchanged(compiled[0])
    assert time.startswith(f"{LAYERS} products of silu"), "each layer's own activation of one value is one value"
    assert text.startswith(f"{2 * LAYERS} products of ")
    assert not compiled[0].report.left_behind and compiled[0].report.share < 1.05
    weights = [node.args[1].meta["val"].shape for node in compiled[0].gm.graph.nodes if "linear" in str(node.target)]
    assert len(weights) == 5 * LAYERS
    assert weights.count((3 * WIDTH, WIDTH)) == LAYERS, "those of tokens read their weights whole"
    assert weights.count((WIDTH // ranks, TEXT)) == 2 * LAYERS


def test_where_memory_is_fast_only_gathers_are_joined() -> None:
    """Keys and values of a text were gathered one by one: as products of one input they are put together at once."""
    compiled = planned(2, 1e12)[0][0]
    assert [reason[:10] for reason in exchanged(compiled)] == [f"{2 * LAYERS} products"]
    assert len(compiled.report.gathered) == 2, "these, and the output"


def test_features_that_ranks_do_not_divide_stay_whole() -> None:
    assert not exchanged(planned(3, 1e6)[0][0])


def test_one_exchange_carries_only_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place_features, "_MOST_BYTES", 2 * 5 * WIDTH * 4)
    texts = [reason for reason in exchanged(planned(2, 1e6)[0][0]) if "silu" not in reason]
    assert [reason[:10] for reason in texts] == ["2 products"] * LAYERS


def test_random_calls_are_not_taken_for_one() -> None:
    def noisy(x: torch.Tensor, w: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        a, b = torch.rand_like(x), torch.rand_like(x)
        return torch.nn.functional.linear(a, w) + torch.nn.functional.linear(b, u)

    got = captured(noisy, torch.randn(1, 8), torch.randn(16, 8), torch.randn(16, 8))
    same = place_features._first_of_equals(got.gm.graph)
    drawn = [node for node in got.gm.graph.nodes if "rand" in str(node.target)]
    assert len(drawn) == 2 and len({same[node] for node in drawn}) == 2
