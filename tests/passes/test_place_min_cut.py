"""The cut against brute force over every assignment of the cost formula."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from graph_text import parse
from helpers import captured
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import fx

from sfcompile.passes.analyse_tokens import analyse_tokens
from sfcompile.passes.choose_layouts import choose_layouts
from sfcompile.passes.graph.cost import gather_seconds, seconds, shard_seconds
from sfcompile.passes.graph.layout import Ownership
from sfcompile.passes.graph.op_view import is_tensor
from sfcompile.passes.place_min_cut import place_min_cut
from sfcompile.passes.state import Layouts, Placement, Tokens
from sfcompile.runtime.program.topology import Topology


def placed(fn: object, topology: Topology, *args: torch.Tensor, shard_everything: bool = False) -> tuple[
    fx.Graph, Tokens, Layouts, Placement
]:  # fmt: skip
    got = captured(fn, *args)  # type: ignore[arg-type]
    graph = got.gm.graph
    first = next(node for node in graph.nodes if node.op == "placeholder")
    tokens = analyse_tokens(graph, [(first, 1)])
    layouts = choose_layouts(tokens, [], topology.num_ranks)
    return graph, tokens, layouts, place_min_cut(graph, tokens, layouts, topology, shard_everything)


def cost(graph: fx.Graph, tokens: Tokens, layouts: Layouts, topology: Topology, sharded: set[fx.Node]) -> float:
    """The formula at the head of place_min_cut.py, read off the rules again."""
    total = 0.0
    for node, op in tokens.views.items():
        if node in CANDIDATES[0]:
            chosen = layouts.of(op)
            cut = next((layout for layout in (*chosen.outs, *chosen.ins) if layout is not None), None)
            share = 1 / topology.num_ranks if cut is None else layouts.owners.busiest(cut)
            needs = zip(op.operands, CANDIDATES[0][node], strict=True)
            whole = {operand.index for operand, need in needs if need is None}
            total += shard_seconds(op, topology, share, whole) if node in sharded else seconds(op, topology)
    for value in graph.nodes:
        if not is_tensor(value) or value not in sharded:
            continue
        for user in value.users:
            gathered = user not in sharded
            if user in sharded:
                for operand, need in zip(tokens.views[user].operands, CANDIDATES[0][user], strict=True):
                    agrees = layouts.owners.same(need, layouts.chosen.get(value))
                    gathered = gathered or (operand.node is value and (need is None or not agrees))
            if gathered:
                total += gather_seconds(value, topology, layouts.owners.shares(layouts.chosen[value]))
                break
    return total


CANDIDATES: list[dict] = [{}]


def network(x: torch.Tensor, text: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    a = torch.nn.functional.linear(x, w)
    b = a.softmax(dim=1)
    c = torch.nn.functional.gelu(a) + b
    d = c @ text.transpose(1, 2)
    return torch.nn.functional.linear(c, w).relu(), d.prod(dim=1)


@settings(max_examples=25, deadline=None)
@example(7384914.0, 7877244.0, 7339097.0, 5, 2)  # twelve tokens on five ranks: the busiest has a quarter
@example(677750983.0, 706114047.0, 333141397.0, 5, 1)  # a weight is read whole, however few tokens a rank has
@given(
    st.floats(1e3, 1e9), st.floats(1e3, 1e9), st.floats(1e2, 1e9), st.integers(2, 6), st.integers(1, 2)
)  # fmt: skip
def test_the_cut_is_the_cheapest_assignment(
    flops: float, memory: float, link: float, ranks: int, machines: int
) -> None:
    topology = Topology(
        tuple(rank * machines // ranks for rank in range(ranks)), flops, memory, link, 1e-6, link / 3, 1e-5
    )
    args = torch.zeros(2, 12, 4), torch.zeros(2, 5, 4), torch.zeros(4, 4)
    graph, tokens, layouts, placement = placed(network, topology, *args)
    everything = place_min_cut(graph, tokens, layouts, topology, shard_everything=True)
    CANDIDATES[0] = dict(everything.needs)
    best = min(
        cost(graph, tokens, layouts, topology, set(choice))
        for count in range(len(CANDIDATES[0]) + 1)
        for choice in itertools.combinations(CANDIDATES[0], count)
    )
    got = cost(graph, tokens, layouts, topology, set(placement.needs))
    assert got == pytest.approx(best, rel=1e-6, abs=1e-8)


def test_slow_links_replicate_and_fast_links_shard() -> None:
    args = torch.zeros(2, 12, 4), torch.zeros(2, 5, 4), torch.zeros(4, 4)
    slow = Topology((0, 1), local_bytes_per_s=1.0, network_bytes_per_s=1.0)
    assert not placed(network, slow, *args)[3].needs
    fast = Topology((0, 0), 1e3, 1e3, local_bytes_per_s=1e12, local_latency_s=0.0)
    assert len(placed(network, fast, *args)[3].needs) >= 4


def test_shard_everything_shards_what_has_a_rule_and_says_why_the_rest_is_not() -> None:
    args = torch.zeros(2, 12, 4), torch.zeros(2, 5, 4), torch.zeros(4, 4)
    slow = Topology((0, 1), local_bytes_per_s=1.0, network_bytes_per_s=1.0)
    _, tokens, _, placement = placed(network, slow, *args, shard_everything=True)
    names = {tokens.views[node].name for node in placement.needs}
    assert names == {"linear", "gelu", "add", "matmul", "relu"}
    assert {tokens.views[node].name for node in placement.reasons} == {"softmax", "prod"}
    assert all("mix" in reason or "differ" in reason for reason in placement.reasons.values())


def test_ops_are_sharded_where_that_is_worth_their_gathers() -> None:
    """The running product mixes tokens and needs y whole; the product reads shards of y, and its result is gathered."""
    graph = parse(
        """
        x: f32[1,12,64] = input
        w: f32[64,64] = input
        y: f32[1,12,64] = aten.relu(x)
        c: f32[1,12,64] = aten.cumprod(y, 1)
        p: f32[1,12,64] = aten.matmul(y, w)
        return c, p
        """
    ).gm.graph
    tokens = analyse_tokens(graph, [(next(iter(graph.nodes)), 1)])
    layouts = choose_layouts(tokens, [], 2)
    sides = {}
    for link in (1e3, 1e12):
        topology = Topology((0, 0), 1e6, 1e9, local_bytes_per_s=link, local_latency_s=0.0)
        placement = place_min_cut(graph, tokens, layouts, topology, shard_everything=False)
        sides[link] = {str(node): "shards" if node in placement.needs else "whole" for node in tokens.views}
    assert sides[1e3] == {"y": "whole", "c": "whole", "p": "whole"}
    assert sides[1e12] == {"y": "shards", "c": "whole", "p": "shards"}


def test_ties_are_sharded() -> None:
    free = Topology((0, 0), 1e30, 1e30, 1e30, 0.0, 1e30, 0.0)
    _, _, _, placement = placed(lambda x: (x * 2).relu(), free, torch.zeros(2, 12, 4))
    assert len(placement.needs) == 2


def test_all_tokens_on_one_rank_is_as_dear_as_no_sharding() -> None:
    topology = Topology((0, 0), 1e9, 1e9)
    x, weight = torch.zeros(2, 12, 4), torch.zeros(4, 4)
    graph, tokens, layouts, even = placed(lambda x, w: x @ w, topology, x, weight, shard_everything=True)
    (node,) = (node for node, op in tokens.views.items() if op.name == "matmul")
    lonely = Ownership(tokens.space, layouts.owners.segments, [0] * len(layouts.owners.segments), 2, {0: 12})
    assert lonely.busiest(layouts.chosen[node]) == 1.0
    uneven = place_min_cut(graph, tokens, replace(layouts, owners=lonely), topology, True)
    assert uneven.seconds > 1.5 * even.seconds


def test_rows_that_few_ranks_own_are_dear_to_gather() -> None:
    """Two of 16 ranks own all: each sends half of the product to 15 others, eight times what it takes from even shards.

    Computed whole the product takes four times as long as a gather of even shards.
    """
    x, weight = torch.zeros(1, 64, 4), torch.zeros(4, 4)
    nbytes, operations = 64 * 4 * 4, 2 * 64 * 4 * 4
    topology = Topology(
        (0,) * 16,
        operations / 4,
        1e12,
        local_bytes_per_s=nbytes * 15 / 16,
        local_latency_s=0.0,
        network_bytes_per_s=1.0,
    )
    graph, tokens, layouts, even = placed(lambda x, w: x @ w, topology, x, weight)
    (node,) = (node for node, op in tokens.views.items() if op.name == "matmul")
    assert node in even.needs and even.seconds == pytest.approx(1 + 4 / 16)
    segments = layouts.owners.segments
    few = replace(layouts, owners=Ownership(tokens.space, segments, [0] * len(segments), 16, {segments[0][0]: 32}))
    whole = place_min_cut(graph, tokens, few, topology, shard_everything=False)
    assert node not in whole.needs and whole.seconds == pytest.approx(4)
    forced = place_min_cut(graph, tokens, few, topology, shard_everything=True)
    assert node in forced.needs
