"""Order the communication: every put leaves as soon as its tensor exists, every collect waits for its first reader.

Between them lie the other projections, norms and RoPE, and those run while the chunks travel. The pass then threads
the ticket anew, so that the order it chose is a data dependence, the same on every rank, which no compiler can undo.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from sfcompile.passes.local_graph import COMMUNICATION
from sfcompile.passes.op_view import is_getitem

_EARLY = ("put_q", "put_k", "put_v", "gather_start")
_LATE = ("collect", "gather_finish")


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if node.target in COMMUNICATION else ""


def schedule_puts(graph: fx.Graph) -> int:
    """Move puts up and collects down, then thread the ticket. Returns the number of communication nodes."""
    nodes = [node for node in graph.nodes if node.target in COMMUNICATION]
    if not nodes:
        return 0
    tickets = {node: _ticket_of(node) for node in nodes}
    start = next(node.args[position] for node, position in tickets.items() if _is_start(node.args[position]))
    assert isinstance(start, fx.Node)
    _unthread(nodes, tickets, start)
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    if start is not first:
        first.prepend(start)
    for node in nodes:
        if _name(node) in _EARLY:
            tensor = node.args[0]
            assert isinstance(tensor, fx.Node)
            _after(graph, tensor).append(node)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in nodes:
        if _name(node) in _LATE:
            picks = [user for user in node.users if is_getitem(user)]
            readers = [reader for pick in picks for reader in pick.users]
            if readers:
                target = min(readers, key=order.__getitem__)
                target.prepend(node)
                for pick in picks:
                    target.prepend(pick)
    _thread(graph, tickets, start)
    return len(nodes)


def _ticket_of(node: fx.Node) -> int:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return names.index("ticket")


def _is_start(ticket: object) -> bool:
    return isinstance(ticket, fx.Node) and ticket.target is torch.ops.aten.zeros.default


def _after(graph: fx.Graph, tensor: fx.Node) -> fx.Node:
    """The last node that must stay before a put of ``tensor``."""
    if tensor.op not in ("placeholder", "get_attr"):
        return tensor
    last = tensor
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr") or _is_start(node):
            last = node
    return last


def _unthread(nodes: list[fx.Node], tickets: dict[fx.Node, int], start: fx.Node) -> None:
    for node in nodes:
        node.update_arg(tickets[node], start)
    for node in nodes:
        for user in list(node.users):
            if is_getitem(user) and user.args[1] == 1 and not user.users:
                user.graph.erase_node(user)


def _thread(graph: fx.Graph, tickets: dict[fx.Node, int], start: fx.Node) -> None:
    current = start
    for node in list(graph.nodes):
        if node not in tickets:
            continue
        node.update_arg(tickets[node], current)
        if _name(node) in _LATE:
            with graph.inserting_after(node):
                current = graph.call_function(operator.getitem, (node, 1))
            current.meta["val"] = node.meta["val"][1]
        else:
            current = node
    if is_getitem(current) and not current.users:
        graph.erase_node(current)
