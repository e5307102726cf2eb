"""The ticket: one total order through the communication of a graph, as a data dependence (see runtime/rank/ops.py).

A pass that moves or adds communication unties the chain, works on the order of the nodes, and ties it anew.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from sfcompile.passes.graph.op_view import is_getitem
from sfcompile.runtime.program.phases import ENDS


def kind_of(node: fx.Node) -> str:
    """What a node that talks to other ranks is: "put_q", "attend", "exchange_start"..."""
    return str(node.target).split(".")[1]


def argument_of(node: fx.Node, name: str) -> int:
    """The position of an argument by its name."""
    return [argument.name for argument in node.target._schema.arguments].index(name)  # type: ignore[union-attr]


def by_site(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Nodes of each site, sites and nodes in graph order."""
    sites: dict[object, list[fx.Node]] = {}
    for node in nodes:
        key = node.args[argument_of(node, "program")], node.args[argument_of(node, "site")]
        sites.setdefault(key, []).append(node)
    return list(sites.values())


def untie(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
    """Drop the chain of tickets; returns the first ticket, moved to the head of the graph."""
    start = nodes[0].args[argument_of(nodes[0], "ticket")]
    assert isinstance(start, fx.Node) and start.target is torch.ops.aten.zeros.default
    for node in nodes:
        node.update_arg(argument_of(node, "ticket"), start)
    for node in nodes:
        for user in list(node.users):
            if is_getitem(user) and user.args[1] == 1:
                graph.erase_node(user)
    head = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    if head is not start:
        head.prepend(start)
    return start


def tie(graph: fx.Graph, nodes: list[fx.Node], start: fx.Node) -> None:
    """Thread the ticket through the communication (``nodes``) in graph order, from ``start`` on."""
    current = start
    for node in sorted(nodes):
        node.update_arg(argument_of(node, "ticket"), current)
        current = node
        if kind_of(node) in ENDS:
            with graph.inserting_after(node):
                current = graph.call_function(operator.getitem, (node, 1))
            current.meta["val"] = node.meta["val"][1]
    if is_getitem(current) and not current.users:
        graph.erase_node(current)
