"""One chain of tickets through all communication, in graph order, however it was threaded before."""

from __future__ import annotations

from helpers import captured
from models import build

from sfcompile.passes.graph.local_graph import COMMUNICATION
from sfcompile.passes.graph.tickets import argument_of, by_site, kind_of, tie, untie
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.topology import Topology


def test_untied_and_tied_anew() -> None:
    model, inputs = build("self")
    got = captured(model, *inputs)
    asked = Asked(shard_everything=True, split_batch=False)
    graph = run_pipeline(State(got.gm, got.mode, Topology.grid(1, 2), 0, asked)).gm.graph
    nodes = [node for node in graph.nodes if node.target in COMMUNICATION]
    before = str(graph)
    start = untie(graph, nodes)
    assert {node.args[argument_of(node, "ticket")] for node in nodes} == {start}
    tie(graph, nodes, start)
    graph.lint()
    assert str(graph).count("getitem") == before.count("getitem")
    last = start
    for node in nodes:
        ticket = node.args[argument_of(node, "ticket")]
        assert last in (ticket, ticket.args[0])  # type: ignore[union-attr]
        last = node
    kinds = {tuple(sorted(map(kind_of, site))) for site in by_site(nodes)}
    assert kinds == {("attend", "collect", "put_k", "put_q", "put_v"), ("exchange_finish", "exchange_start")}
