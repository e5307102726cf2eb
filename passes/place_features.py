"""Cut by features what every rank would compute alike: products of the time step and of the text.

A modulation reads a matrix for one row; keys and values of cross-attention read one for the few rows of a prompt. They
hold no tokens that could be shared out, or too few to be worth a message each. Computed whole on every rank they cost
what their weights take to read, however many ranks there are. But all those of one input can be computed at once, each
rank some features (rows of the weight) of each, and put together in one exchange:

    each, computed whole    max(FLOPs / rate, (input + weight + output) / memory rate)
    each, by features       max(FLOPs / P / rate, (input + (weight + output) / P) / memory rate)
    once for all            the exchange of all outputs: P - 1 messages and waits

A product that the cut shards over its few tokens is one of them too, if all that is made of it is read whole: views of
it then are whole as well, and need no gather of their own.

It is done where the exchange takes at most half of what the products save. Where ranks hold weights in shares, such a
product reads the rank's own share, and what it saves is the gathering, too. Products go together that read the same
value; where every layer makes it anew of the same inputs (an activation of the time embedding), it is the first one's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sfcompile.codegen.plan.simulator import Phase, simulate
from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.passes.graph.cost import (
    flops,
    gather_seconds,
    is_view,
    seconds,
    shard_seconds,
    spread_seconds,
    value_bytes,
)
from sfcompile.passes.graph.features import site_of
from sfcompile.passes.graph.layout import OpLayouts
from sfcompile.passes.graph.op_view import OpView, is_tensor
from sfcompile.passes.state import Features, Placement, State
from sfcompile.runtime.program.phases import EXCHANGE
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.weight_rows import count_of

_WORTH = 0.5
"""What an exchange may cost of what it saves."""
_MOST_BYTES = 1 << 24
"""Of outputs that one exchange carries: it needs as much of a rank's heap, twice."""
_MOST_BEHIND = 8
"""Ops behind a product that may become whole with it."""


def run(state: State) -> None:
    """The pass: fills ``features`` of ``placement``; what was sharded before and is no more leaves ``needs``.

    Not where tokens come in parts, for the order of what communicates is that of the parts; and not where the ranks of
    the graph hold other shares of weights than one each: groups that share out the batch, machines that hold all.
    """
    ranks, held = state.topology.num_ranks, state.asked.weights
    places = tuple(range(ranks)) if held is None else held.cut
    if state.choices.parts > 1 or ranks == 1 or (len(places), count_of(places)) != (ranks, ranks):
        return
    inputs = [node for node in state.gm.graph.nodes if node.op == "placeholder"]
    shares = [inputs[i] for i in held.places] if held is not None else []
    placement, views = state.placement, state.tokens.views
    chosen = by_features(state.gm.graph, views, placement, state.topology, state.arrivals, shares)
    for group in chosen:
        for product in group:
            for node in product.behind:
                placement.needs.pop(node, None)
                if not is_view(views[node]):
                    placement.reasons[node] = "it is made of what is computed by features"
            placement.needs.pop(product.node, None)
            placement.reasons.pop(product.node, None)
    placement.features = tuple(
        Features(group[0].source, tuple(product.node for product in group), places) for group in chosen
    )


@dataclass(frozen=True)
class Product:
    """A product that may be computed by features, and what a rank then saves beside the exchange.

    Attributes:
        source: its input: of equal ones the first.
        behind: ops on shards of it that become whole.
    """

    node: fx.Node
    source: fx.Node
    behind: tuple[fx.Node, ...]
    saved_s: float


def by_features(
    graph: fx.Graph,
    views: Mapping[fx.Node, OpView],
    placement: Placement,
    topology: Topology,
    arrivals: Collection[fx.Node] = (),
    shares: Collection[fx.Node] = (),
) -> list[list[Product]]:
    """The groups of products that are worth an exchange each.

    Args:
        arrivals: inputs that come in shards.
        shares: inputs that are weights in shares.
    """
    alike: dict[tuple[fx.Node, torch.dtype], list[Product]] = {}
    same = _first_of_equals(graph)
    for node, op in views.items():
        if not _can_be_cut(op, placement, topology.num_ranks) or op.operands[0].node in arrivals:
            continue
        behind = _behind(node, views, placement) if node in placement.needs else ()
        if behind is None:
            continue
        saved_s = _saved_s(op, behind, views, placement, topology)
        saved_s += sum(gather_seconds(each.node, topology) for each in op.operands[1:] if each.node in shares)
        if saved_s > _marginal_s(node, topology):
            source = same[op.operands[0].node]
            alike.setdefault((source, node.meta["val"].dtype), []).append(Product(node, source, behind, saved_s))
    groups = (group for products in alike.values() for group in _in_groups(products))
    return [group for group in groups if _pays(group, topology)]


def _can_be_cut(op: OpView, placement: Placement, ranks: int) -> bool:
    """Whether an op is a product with a weight whose features divide, of an input that every rank has whole."""
    if op.name != "linear" or placement.sharded(op.operands[0].node):
        return False
    features = op.out_shapes[0][-1]
    return all(w.node.op == "placeholder" for w in op.operands[1:]) and features > 0 and features % ranks == 0


def _behind(node: fx.Node, views: Mapping[fx.Node, OpView], placement: Placement) -> tuple[fx.Node, ...] | None:
    """The ops that compute on shards of a sharded product, if nothing else is sharded in them; else None."""
    behind: dict[fx.Node, None] = {}
    todo = [node]
    while todo:
        value = todo.pop()
        for user in value.users:
            needs = placement.needs.get(user)
            if user in behind or needs is None:
                continue
            reads = list(zip(views[user].operands, needs, strict=True))
            if all(need is None for operand, need in reads if operand.node is value):
                continue
            behind[user] = None
            others = (operand.node for operand, _ in reads if operand.node is not node and operand.node not in behind)
            several = len(views[user].outputs) > 1 or not any(placement.chosen[user].outs)
            if flops(views[user]) or several or any(map(placement.sharded, others)) or len(behind) > _MOST_BEHIND:
                return None
            todo.append(user)
    return tuple(behind)


def _first_of_equals(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Of every value the first one of the graph that is computed by the same calls of the same inputs."""
    first: dict[str, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not is_tensor(node) or not _repeatable(node.target):
            same[node] = node
            continue
        names = fx.map_arg((node.args, node.kwargs), lambda n: same[n])
        same[node] = first.setdefault(f"{node.target} {names}", node)
    return same


def _repeatable(target: Any) -> bool:
    """Whether two calls with the same arguments return the same."""
    tags = getattr(target, "tags", None)
    return tags is not None and torch.Tag.nondeterministic_seeded not in tags and not target._schema.is_mutable


def _saved_s(
    op: OpView,
    behind: Sequence[fx.Node],
    views: Mapping[fx.Node, OpView],
    placement: Placement,
    topology: Topology,
) -> float:
    """What a rank saves that computes its features of an op alone: of what it computes, and of what it gathers."""
    own_s = shard_seconds(op, topology, 1 / topology.num_ranks, (0,))
    if op.node not in placement.needs:
        return seconds(op, topology) - own_s
    rest = [views[node] for node in behind]
    weights = [operand.index for operand in op.operands[1:]]
    before_s = shard_seconds(op, topology, _busiest(placement.chosen[op.node]), weights)
    before_s += sum(shard_seconds(other, topology, _busiest(placement.chosen[other.node])) for other in rest)
    message_s = (topology.num_ranks - 1) * (topology.message_s + topology.wait_s)
    for value in (op.node, *behind):
        if any(user not in behind and user in views for user in value.users):
            before_s += gather_seconds(value, topology) + message_s
    return before_s - own_s - sum(seconds(other, topology) for other in rest)


def _busiest(chosen: OpLayouts) -> float:
    layout = next(cut for cut in chosen.outs if cut is not None)
    return chosen.owners.busiest(layout)


def _marginal_s(node: fx.Node, topology: Topology) -> float:
    """What an output adds to an exchange of others."""
    size = value_bytes(node)
    return spread_seconds(size, topology) - spread_seconds(0.0, topology) + _put_together_s(size, topology)


def _put_together_s(nbytes: int, topology: Topology) -> float:
    """To join a rank's own features, and to take those of all ranks apart: each is read and written."""
    return 2 * nbytes * (1 + 1 / topology.num_ranks) / topology.memory_bytes_per_s


def _in_groups(products: Iterable[Product]) -> list[list[Product]]:
    """Products that one exchange may carry together: not too many."""
    groups: list[list[Product]] = [[]]
    for product in products:
        nbytes = sum(value_bytes(other.node) for other in (*groups[-1], product))
        if groups[-1] and nbytes > _MOST_BYTES:
            groups.append([])
        groups[-1].append(product)
    return groups


def _pays(group: Sequence[Product], topology: Topology) -> bool:
    """Whether a group is worth its exchange."""
    nodes, ranks = [product.node for product in group], topology.num_ranks
    schedule = build("exchange", site_of(nodes, range(ranks)), Mesh.of(topology, 1, ranks))
    exchange_s = simulate([Phase(schedule, 1, phase) for phase in EXCHANGE], topology).seconds
    cost_s = exchange_s + _put_together_s(sum(map(value_bytes, nodes)), topology)
    return cost_s <= _WORTH * sum(product.saved_s for product in group)
