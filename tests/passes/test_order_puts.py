from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_text import parse, same
from helpers import captured, placeholder_values, run_compiled, run_sharded
from models import build
from torch import fx

from sfcompile.passes.graph.local_graph import COMMUNICATION
from sfcompile.passes.order_puts import order_puts
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS


def rank_graph(fn: Any, *args: torch.Tensor) -> fx.Graph:
    got = captured(fn, *args)
    state = State(got.gm, got.mode, Topology.grid(1, 3), 1, Asked(shard_everything=True))
    return run_pipeline(state).gm.graph


def kinds(graph: fx.Graph) -> list[tuple[str, int]]:
    calls = []
    for node in graph.nodes:
        if node.target in COMMUNICATION:
            names = [argument.name for argument in node.target._schema.arguments]
            calls.append((str(node.target).split(".")[1], node.args[names.index("site")]))
    return calls


def check_banks(graph: fx.Graph) -> None:
    """Site s[i] opens after s[i - NUM_BANKS] has ended, and every phase of a site is in order."""
    opened: list[int] = []
    ended: set[int] = set()
    for kind, site in kinds(graph):
        if site not in opened:
            opened.append(site)
            assert set(opened[: max(0, len(opened) - NUM_BANKS)]) <= ended
        if kind in ("collect", "exchange_finish"):
            ended.add(site)
    assert ended == set(opened)


@pytest.mark.parametrize("name", ["self", "joint", "cross"])
def test_banks_and_one_chain_of_tickets(name: str) -> None:
    model, inputs = build(name)
    graph = rank_graph(model, *inputs)
    graph.lint()
    check_banks(graph)
    current = None
    for node in graph.nodes:
        if node.target in COMMUNICATION:
            names = [argument.name for argument in node.target._schema.arguments]
            ticket = node.args[names.index("ticket")]
            source = ticket.args[0] if str(ticket.target).endswith("getitem>") else ticket
            assert current is None or source is current, "the chain skips a node"
            current = node


def test_puts_follow_their_tensor_and_collects_precede_their_reader() -> None:
    def attend(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        v, k, q = (torch.nn.functional.linear(x, w).unsqueeze(1) for _ in range(3))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        other = torch.nn.functional.gelu(torch.nn.functional.linear(x, w))
        return out.squeeze(1) + other

    graph = rank_graph(attend, torch.zeros(2, 9, 4), torch.zeros(4, 4))
    assert [kind for kind, site in kinds(graph) if site == 0] == ["put_v", "put_k", "put_q", "attend", "collect"]
    nodes = list(graph.nodes)
    for node in nodes:
        if str(node.target).startswith("streamfusion.put"):
            between = nodes[nodes.index(node.args[0]) + 1 : nodes.index(node)]
            assert all(other.target in COMMUNICATION or other.op == "get_attr" for other in between)
    names = [str(node.target) for node in nodes]
    collect = names.index("streamfusion.collect.default")
    assert names.index("aten.gelu.default") < collect, "the projection beside attention runs before the collect"


def test_the_chunks_of_one_tensor_travel_while_the_next_is_computed() -> None:
    """Puts go up to their tensors; the collect goes down below what does not need it; the ticket follows the order."""
    graph = parse(
        """
        x: f32[1,2,6,16] = input
        w: f32[16,16] = input
        t: i64[1] = aten.zeros([1], dtype=torch.int64)
        v: f32[1,2,6,16] = aten.linear(x, w)
        k: f32[1,2,6,16] = aten.linear(v, w)
        q: f32[1,2,6,16] = aten.linear(k, w)
        tq: i64[1] = streamfusion.put_q(q, t, 'p', 0)
        tk: i64[1] = streamfusion.put_k(k, tq, 'p', 0)
        tv: i64[1] = streamfusion.put_v(v, tk, 'p', 0)
        ta: i64[1] = streamfusion.attend(tv, None, 'p', 0)
        o: (f32[1,2,6,16], i64[1]) = streamfusion.collect(ta, 'p', 0, [1, 2, 6, 16], torch.float32)
        y: f32[1,2,6,16] = o[0]
        g: f32[1,2,6,16] = aten.gelu(x)
        s: f32[1,2,6,16] = aten.add.Tensor(y, g)
        return s
        """
    ).gm.graph
    assert order_puts(graph) == 5
    same(
        graph,
        """
        x: f32[1,2,6,16] = input
        w: f32[16,16] = input
        t: i64[1] = aten.zeros([1], dtype=torch.int64)
        v: f32[1,2,6,16] = aten.linear(x, w)
        tv: i64[1] = streamfusion.put_v(v, t, 'p', 0)
        k: f32[1,2,6,16] = aten.linear(v, w)
        tk: i64[1] = streamfusion.put_k(k, tv, 'p', 0)
        q: f32[1,2,6,16] = aten.linear(k, w)
        tq: i64[1] = streamfusion.put_q(q, tk, 'p', 0)
        ta: i64[1] = streamfusion.attend(tq, None, 'p', 0)
        g: f32[1,2,6,16] = aten.gelu(x)
        o: (f32[1,2,6,16], i64[1]) = streamfusion.collect(ta, 'p', 0, [1, 2, 6, 16], torch.float32)
        y: f32[1,2,6,16] = o[0]
        s: f32[1,2,6,16] = aten.add.Tensor(y, g)
        return s
        """,
    )


def test_many_independent_sites_never_open_a_third() -> None:
    def parallel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        heads = [torch.nn.functional.linear(x, w).unsqueeze(1) for _ in range(5)]
        heads = [heads[i] for i in (3, 0, 4, 1, 2)]
        return sum(torch.nn.functional.scaled_dot_product_attention(h, h, h) for h in heads)  # type: ignore[return-value]

    check_banks(rank_graph(parallel, torch.zeros(2, 9, 4), torch.zeros(4, 4)))


def test_nothing_to_order() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    assert order_puts(graph) == 0


@pytest.mark.parametrize(
    ("name", "ranks", "parts"), [("self", 1, 2), ("tall", 1, 2), ("tall", 1, 3), ("joint", 2, 3), ("cross", 2, 2)]
)
def test_tokens_in_parts_give_the_same(name: str, ranks: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfcompile.passes.choose_schedules._WORTH", float("inf"))
    model, inputs = build(name if name != "tall" else "self")
    if name == "tall":  # three rows a rank, which are not cut: a part of two and one of one
        inputs = (torch.randn(2, 3, 12, 8), inputs[1])
    topology = Topology.grid(2, ranks)
    got = captured(model, *inputs)
    compiled = []
    for rank in range(topology.num_ranks):
        asked = Asked(shard_everything=True, split_batch=False, parts=(parts,))
        state = State(got.gm, got.mode, topology, rank, asked)
        compiled.append(run_pipeline(state))
        assert state.choices.parts == parts, state.choices.notes
        check_banks(compiled[-1].gm.graph)
    assert len({tuple(rank.order) for rank in compiled}) == 1
    order = kinds(compiled[0].gm.graph)
    if name == "joint":
        layers = list(dict.fromkeys(site for kind, site in order if kind == "put_k"))
        second = order.index(("put_k", layers[1]))
        late = order[second:].count(("collect", layers[0]))
        assert late == parts - 1, "later parts of layer 0 come home under layer 1's puts"
    values = placeholder_values(got)
    with torch.no_grad():
        want = got.gm(*values)
    for out in run_compiled(compiled, topology, values):
        for mine, theirs in zip(out, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


def test_tokens_that_do_not_suffice_for_parts_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfcompile.passes.choose_schedules._WORTH", float("inf"))
    model, inputs = build("self")  # two rows a rank
    got = captured(model, *inputs)
    asked = Asked(shard_everything=True, split_batch=False, parts=(3,))
    state = State(got.gm, got.mode, Topology.grid(2, 1), 0, asked)
    run_pipeline(state)
    assert state.choices.parts == 1


def test_tiles_whose_rows_all_lie_on_some_ranks_are_exchanged_in_one_order() -> None:
    """A rank whose rows all lie in a slice, or none, has nothing to cut, and yet puts it when the others do."""

    class Tiles(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            h = torch.nn.functional.conv1d(torch.nn.functional.pad(x, [0, 1]), w, stride=2)
            tiles = [(0, 4, 0), (2, 7, 1), (5, 9, 1)]
            outs = [torch.nn.functional.conv1d(h[:, :, a:b], w, padding=1)[:, :, at : at + 3] for a, b, at in tiles]
            return torch.nn.functional.group_norm(torch.cat(outs, 2), 2)

    gen = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 4, 18, generator=gen), torch.randn(4, 4, 3, generator=gen)]
    for ranks in (2, 3, 4, 5):
        run_sharded(Tiles(), inputs, ranks)
