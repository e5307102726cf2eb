"""Weights that ranks hold in shares: exact, whole for as long as they are read, in one order on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers import captured, placeholder_values
from models import build
from threads import run_threads
from torch import fx, nn
from torch.nn import functional as F

from sfcompile.capture.graph import Captured
from sfcompile.errors import OptionError
from sfcompile.passes.graph.cost import flops
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.order_puts import EARLY
from sfcompile.passes.rewrite_weights import KEPT
from sfcompile.passes.runner import Compiled, run_pipeline
from sfcompile.passes.state import Asked, ShardedWeights, State
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.weight_rows import WeightRows
from sfcompile.runtime.rank.session import current_session


def matrices(got: Captured, least_rows: int) -> tuple[int, ...]:
    """The graph's inputs that are weights of so many rows."""
    inputs = [node.meta["val"] for node in got.gm.graph.nodes if node.op == "placeholder"]
    return tuple(i for i, value in enumerate(inputs) if value.dim() == 2 and value.shape[0] >= least_rows)


def states(got: Captured, topology: Topology, places: tuple[int, ...], asked: Asked) -> list[State]:
    return [
        State(
            got.gm, got.mode, topology, rank, replace(asked, parts=(), weights=ShardedWeights(places, topology, rank))
        )
        for rank in range(topology.num_ranks)
    ]


def run_ranks(
    compiled: Sequence[Compiled], topology: Topology, places: tuple[int, ...], inputs: Sequence[torch.Tensor]
) -> list[list[torch.Tensor]]:
    """Every rank's outputs; of the inputs at ``places`` each is given its rows."""

    def work(rank: int) -> list[torch.Tensor]:
        own = list(inputs)
        for i in places:
            start, stop = WeightRows(tuple(own[i].shape), ShardedWeights((), topology, rank).cut).rows(rank)
            own[i] = own[i][start:stop].clone()
        for program, schedules in compiled[rank].programs.items():
            current_session().load(program, schedules)
        with torch.no_grad():
            for _ in range(2):
                out = compiled[rank].gm(*own)
        return list(out)

    return run_threads(topology.num_ranks, work, topology.machine_of)


@pytest.mark.parametrize(("name", "machine_of"), [("self", (0, 1)), ("joint", (0, 0, 1, 1)), ("cross", (0, 0, 1))])
def test_results_are_those_of_whole_weights(name: str, machine_of: tuple[int, ...]) -> None:
    """To the last bit: every rank computes with the same values as before."""
    model, inputs = build(name)
    got, topology = captured(model, *inputs), Topology(machine_of)
    places, values = matrices(got, 12), placeholder_values(got)
    asked = Asked(shard_everything=True, split_batch=False)
    assert len(places) >= 3
    cut = states(got, topology, places, asked)
    compiled = [run_pipeline(state) for state in cut]
    assert len({tuple(mine.order) for mine in compiled}) == 1
    plain = [
        run_pipeline(State(got.gm, got.mode, topology, rank, replace(asked, parts=()))) for rank in range(len(cut))
    ]
    for mine, whole in zip(
        run_ranks(compiled, topology, places, values), run_ranks(plain, topology, (), values), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine, whole, strict=True))
    weights = cut[0].weights
    assert weights is not None and weights.count == len(places) and weights.early in EARLY
    assert weights.own_bytes < weights.whole_bytes
    assert "in shares" in compiled[0].report.weights and "gatherings a step" in compiled[0].report.weights


def test_groups_of_the_batch_hold_one_model_together() -> None:
    model, inputs = build("self")
    got, topology = captured(model, *inputs), Topology((0, 0, 1, 1))
    places, values = matrices(got, 12), placeholder_values(got)
    asked = Asked({"batch": 2, "ulysses": 2, "ring": 1}, shard_everything=True)
    cut = states(got, topology, places, asked)
    compiled = [run_pipeline(state) for state in cut]
    assert cut[0].num_groups == 2
    with torch.no_grad():
        want = got.gm(*values)
    for mine in run_ranks(compiled, topology, places, values):
        torch.testing.assert_close(mine, list(want), rtol=2e-5, atol=2e-5)


class Shared(nn.Module):
    """One weight at the start and at the end, and one that several ops read in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.layers[0].weight
        x = F.linear(F.linear(x, first), first)
        for layer in self.layers[1:]:
            x = layer(x).relu()
        return F.linear(x, first)


def test_a_weight_that_is_read_again_much_later_is_gathered_again() -> None:
    got, topology = captured(Shared(), torch.zeros(2, 8, 16)), Topology((0, 1))
    places = tuple(
        i
        for i, node in enumerate(n for n in got.gm.graph.nodes if n.op == "placeholder")
        if node.meta["val"].dim() == 2
    )
    (state, other) = states(got, topology, places, Asked())
    compiled = [run_pipeline(state), run_pipeline(other)]
    assert state.weights is not None and (state.weights.count, state.weights.gathers) == (5, 6)
    assert most_alive(compiled[0].gm.graph, (16, 16)) <= KEPT + 1
    values = placeholder_values(got)
    with torch.no_grad():
        want = got.gm(*values)
    for mine in run_ranks(compiled, topology, places, values):
        torch.testing.assert_close(mine, list(want))


def most_alive(graph: fx.Graph, shape: tuple[int, ...]) -> int:
    """Most gathered weights of a shape that some later node reads, at any time."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    spans = []
    for node in graph.nodes:
        value = node.meta.get("val")
        gathered = node.op == "call_function" and "getitem" in str(node.target)
        if gathered and isinstance(value, torch.Tensor) and tuple(value.shape) == shape:
            spans.append((order[node], max((order[user] for user in node.users), default=order[node])))
    return max(sum(first <= at <= last for first, last in spans) for at in order.values())


def test_one_travels_while_the_rank_computes_with_the_one_before_it() -> None:
    """Where the price says so; where links are so slow that all waits, no order is better than another."""
    model, inputs = build("joint")
    got = captured(model, *inputs)
    places = matrices(got, 12)
    fast = Topology((0, 1), network_bytes_per_s=1e9, network_latency_s=1e-6, local_latency_s=1e-6, flops_per_s=1e7)
    state = states(got, fast, places, Asked(shard_everything=True, split_batch=False))[0]
    run_pipeline(state)
    assert state.weights is not None and state.weights.early != EARLY[0]


def test_an_order_without_it_is_refused() -> None:
    model, inputs = build("self")
    got = captured(model, *inputs)
    from sfcompile.passes import pipeline

    order = tuple(entry.name for entry in pipeline.PIPELINE if entry.name != "rewrite_weights")
    state = states(got, Topology((0, 1)), matrices(got, 12), Asked(shard_everything=True, order=order))[0]
    with pytest.raises(OptionError, match="rewrite_weights makes it"):
        run_pipeline(state)


def test_a_graph_with_weights_in_shares_has_a_key_of_its_own() -> None:
    """Its sites are others, and a process may compile one model both ways: the second would take the first's place."""
    model, inputs = build("self")
    got, topology = captured(model, *inputs), Topology((0, 1))
    shares = states(got, topology, matrices(got, 12), Asked(split_batch=False))[0]
    whole = State(got.gm, got.mode, topology, 0, Asked(split_batch=False, parts=()))
    keys = [set(run_pipeline(state).programs) for state in (shares, whole)]
    assert not keys[0] & keys[1]


class Modulated(nn.Module):
    """A product for one row, which every rank would compute alike, and one for tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.qkv = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(time).unsqueeze(1).chunk(2, -1)
        q, k, v = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in self.qkv(x * (1 + scale) + shift).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


WIDTH = 32


def test_a_product_by_features_reads_the_share_and_nobody_gathers_it() -> None:
    """On ranks whose places are not their numbers: 0, 2, 1 and 3 hold the stretches in their order."""
    got = captured(Modulated(), torch.randn(1, 24, WIDTH), torch.randn(1, WIDTH))
    topology, places = Topology.grid(2, 2, memory_bytes_per_s=1e6), matrices(got, 2 * WIDTH)
    asked = Asked(shard_everything=True, split_batch=False, copies=False)
    cut = states(got, topology, places, asked)
    compiled = [run_pipeline(state) for state in cut]
    assert len({tuple(mine.order) for mine in compiled}) == 1
    weights = cut[1].weights
    assert weights is not None and (weights.count, weights.gathers) == (2, 1)
    assert any("by features" in row.reason for row in compiled[0].report.gathered)
    whole = run_pipeline(State(got.gm, got.mode, topology, 0, replace(asked, parts=())))
    assert not set(whole.programs) & set(compiled[0].programs), "other sites have other keys"
    values = placeholder_values(got)
    with torch.no_grad():
        want = got.gm(*values)
    for mine in run_ranks(compiled, topology, places, values):
        torch.testing.assert_close(mine, list(want), rtol=1e-5, atol=1e-5)


def test_a_product_reads_the_bank_and_other_readers_a_copy() -> None:
    """Two readers of one weight, a reader that is no product, and a bias that is gathered, too."""

    def forward(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = F.linear(F.linear(F.linear(x, a), b), b)
        return F.linear(y * c.sum(), c, bias) + F.linear(x, a)

    got = captured(forward, torch.randn(2, 3, 8), *(torch.randn(8, 8) for _ in range(3)), torch.randn(8))
    topology, places = Topology((0, 0, 1, 1)), (1, 2, 3, 4)
    cut = states(got, topology, places, Asked())
    compiled = [run_pipeline(state) for state in cut]
    for mine in compiled:
        names = [str(node.target).split(".")[1] for node in mine.gm.graph.nodes if "exchange" in str(node.target)]
        assert (names.count("exchange_linear"), names.count("exchange_finish")) == (2, 3)
        ends = [OpView.of(node) for node in mine.gm.graph.nodes if "exchange_linear" in str(node.target)]
        assert [flops(end) for end in ends if end is not None] == [2 * 6 * 8 * 8] * 2, "counted as the products"
    values = placeholder_values(got)
    with torch.no_grad():
        want = got.gm(*values)
    for seen in run_ranks(compiled, topology, places, values):
        assert all(torch.equal(a, b) for a, b in zip(seen, want, strict=True))
