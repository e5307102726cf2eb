r"""Place every op: computed as shards (S) or replicated on every rank (R), at minimum total cost.

Let each op ``w`` have a side, S or R. With ``P`` ranks, ``c(w)`` its seconds when computed whole and ``g(v)`` the
seconds to all-gather the value ``v``:

    cost = sum over w on side R of c(w)
         + sum over w on side S of c(w) b(w) + t(w)            b(w): what the busiest rank owns, 1 / P if even;
                                                               operands needed whole (weights) are read whole
                                                               t(w): chunks sent by a torus attention, the
                                                               all-reduce of an op that sums over tokens, or
                                                               the statistics of a norm over tokens
         + sum over values v made on side S and *read whole* of g(v)         (paid once, however many readers)

A value is read whole by an op on side R, by the graph's output, and by an S op that needs it whole (``Rule.needs``).
Cutting a replicated value to a shard is a local slice and free. This is an s-t minimum cut, so the answer is the
optimum and not a heuristic:

    source = S, sink = R
    source -> w  capacity c(w)            cut when w ends on side R         -> _add_op
    w -> sink    capacity c(w) b(w) + t(w)  cut when w ends on side S         -> _add_op
    w -> g(v)    capacity g(v)            v made on S, but read whole       -> _add_reads
    g(v) -> u    infinite                 a reader u on R forces "read whole"
    g(v) -> sink infinite                 some reader needs v whole whatever its side

Both prices are those of the busiest link: where a few ranks own all of v (eight frames on 64 ranks), their links carry
all of it to everybody, and a gather takes many times what it takes from even shards.

A reader on S that needs v under another layout, or a window of it (the halo of a convolution), gets it by an exchange
of its maker's shards; its seconds are added to t(maker). If the reader ends on R they were counted in vain: an upper
bound, so that a halo is taken only where it is cheaper than the gather.

If everything shall be sharded, c(w) is out of reach for products, and so is the part of them that the busiest rank
computes beyond an even share (give or take a quarter): to give all tokens to one rank is not to shard them.

Ops without a local rule have ``w -> sink`` infinite. ``c`` gets a vanishing bonus so that ties go to side S: shard as
early and gather as late as costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import networkx as nx
from torch import fx

from sfcompile.passes.choose_schedules import choose_schedules
from sfcompile.passes.graph.cost import (
    exchange_seconds,
    flops,
    gather_seconds,
    seconds,
    shard_seconds,
    spread_seconds,
    value_bytes,
)
from sfcompile.passes.graph.layout import Layout, Need, OpLayouts
from sfcompile.passes.graph.op_view import OpView, is_getitem, is_tensor
from sfcompile.passes.rules.rule import parts_of, statistics_bytes
from sfcompile.passes.state import Layouts, Placement, State, Tokens, maker_of
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.value_rows import ValueRows

Needs = list[Need]

_FORCE = 1e3
"""Seconds per FLOP that nobody wants to spend twice if all shall be sharded."""
_UNEVEN = 1.25
"""The busiest rank's part of the tokens, over an even part, that still counts as even then."""


def run(state: State) -> None:
    """The pass: fills ``placement``. A group of one rank computes its part of the batch whole."""
    if state.topology.num_ranks == 1:
        state.placement = Placement()
        return
    forced, exchange_s = state.asked.shard_everything, state.choices.exchange_s
    state.placement = place_min_cut(
        state.gm.graph,
        state.tokens,
        state.layouts,
        state.topology,
        forced,
        exchange_s,
        crossing=state.asked.crossing,
        arrivals=state.arrivals,
    )


def price(state: State, layouts: Layouts) -> float:
    """Predicted seconds of a step with other layouts: every attention planned for them, every op placed.

    Products must be sharded if the user says so; the small ops around them go where traffic is least.
    """
    asked = replace(state.asked, split_batch=False, parts=())
    choices = choose_schedules(state.tokens, layouts, state.sites, state.topology, asked)
    forced, exchange_s = asked.shard_everything, choices.exchange_s
    graph, tokens = state.gm.graph, state.tokens
    return place_min_cut(graph, tokens, layouts, state.topology, forced, exchange_s, force_s=0.0).seconds


def place_min_cut(
    graph: fx.Graph,
    tokens: Tokens,
    layouts: Layouts,
    topology: Topology,
    shard_everything: bool,
    exchange_s: Mapping[fx.Node, float] | None = None,
    force_s: float = 1e3,
    crossing: Sequence[int] = (),
    arrivals: Mapping[fx.Node, ValueRows] = MappingProxyType({}),
) -> Placement:
    """Choose the side of every op.

    Args:
        shard_everything: price replication so high that whatever can shard does, whatever traffic that takes.
        force_s: how high, in seconds for every op; products are always too dear to replicate then.
        exchange_s: what sharding an attention costs beyond its share of the compute, by node (choose_schedules.py).
        crossing: outputs that may leave in shards: as outputs they are not read whole.
        arrivals: placeholders that come in shards: made on side S, whatever this graph does.
    """
    placement = Placement()
    candidates: dict[fx.Node, Needs] = {}
    for node, op in tokens.views.items():
        if not any(value in layouts.chosen for value in (*op.outputs, *(operand.node for operand in op.operands))):
            continue
        placement.chosen[node] = chosen = layouts.of(op)
        rule = tokens.rules.get(node)
        needs = rule.needs(op, chosen) if rule is not None and any(chosen.outs) else None
        if needs is None and rule is not None and not any(chosen.outs):
            needs = rule.partial(op, chosen)
        if needs is not None:
            candidates[node] = needs
        elif any(chosen.outs):
            placement.reasons[node] = _why_whole(rule is not None, chosen)

    net = _Network(candidates, topology, force_s if shard_everything else None, exchange_s or {})
    for node in candidates:
        told = statistics_bytes(tokens.rules[node], tokens.views[node], placement.chosen[node])
        parts = parts_of(tokens.rules[node], tokens.views[node], placement.chosen[node])
        net.add_op(node, tokens.views[node], placement.chosen[node], told, None if parts is None else max(parts))
    for value in graph.nodes:
        if is_tensor(value) and maker_of(value) in candidates and any(placement.chosen[maker_of(value)].outs):
            net.add_reads(value, tokens, placement, _crosses(graph, value, crossing))
    for value, cut in arrivals.items():
        own = layouts.chosen.get(value)
        # Cut otherwise than this graph has its tokens, it is made whole before the call in any case.
        if own is not None and all(layouts.owners.dim_runs(own, rank) == runs for rank, runs in enumerate(cut.owned)):
            net.add_reads(value, tokens, placement, own=own)
    sharded, cut_s = net.solve()
    placement.seconds = cut_s + sum(net.whole_s(op) for node, op in tokens.views.items() if node not in candidates)
    placement.needs = {node: needs for node, needs in candidates.items() if node in sharded}
    for node in candidates:
        if node not in sharded:
            placement.reasons[node] = "replicating costs less than the traffic of sharding"
    for node, op in tokens.views.items():
        reads_shards = any(placement.sharded(operand.node) and 0 not in operand.shape for operand in op.operands)
        if node not in placement.needs and node not in placement.reasons and reads_shards:
            placement.reasons[node] = (
                "no rule for this op" if node not in tokens.rules else "it mixes the tokens of a sharded value"
            )
    return placement


def _why_whole(has_rule: bool, chosen: OpLayouts) -> str:
    if not has_rule:
        return "no rule for this op"
    if not any(chosen.ins):
        return "the tokens come into being here: before it they fill no single dim"
    output = next(out for out in chosen.outs if out is not None)
    if all(chosen.owners.same(operand, output) for operand in chosen.ins if operand is not None):
        return "it mixes the tokens of a sharded value"
    return "its operands hold the tokens in layouts that differ"


def _crosses(graph: fx.Graph, value: fx.Node, crossing: Sequence[int]) -> bool:
    """Whether a value may leave in shards wherever it is an output."""
    if not crossing:
        return False
    (results,) = next(node for node in reversed(graph.nodes) if node.op == "output").args
    return all(i in crossing for i, result in enumerate(results) if result is value)


class _Network:
    """The flow network of the head of the file, capacities in integer picoseconds."""

    def __init__(
        self,
        candidates: dict[fx.Node, Needs],
        topology: Topology,
        force_s: float | None,
        exchange_s: Mapping[fx.Node, float],
    ) -> None:
        self._ids = {node: i + 2 for i, node in enumerate(candidates)}
        self._candidates = candidates
        self._topology = topology
        self._force_s = force_s
        self._exchange_s = exchange_s
        self._graph = nx.DiGraph()
        self._graph.add_nodes_from((0, 1))
        self._next = len(candidates) + 2
        self._share: dict[int, float] = {}

    def _edge(self, a: int, b: int, cost: float | None) -> None:
        if cost is None:
            self._graph.add_edge(a, b)  # no capacity attribute: infinite
        else:
            self._graph.add_edge(a, b, capacity=max(0, round(cost * 1e12)))

    def whole_s(self, op: OpView) -> float:
        """Seconds of an op computed whole."""
        forced = 0.0 if self._force_s is None else self._force_s + _FORCE * flops(op)
        return forced + seconds(op, self._topology)

    def add_op(self, node: fx.Node, op: OpView, chosen: OpLayouts, told: int = 0, most: float | None = None) -> None:
        """Edges source -> w and w -> sink.

        Args:
            told: bytes of statistics that ranks exchange inside the op.
            most: the part of it that the busiest rank computes; None: as much as it owns of the tokens.
        """
        ranks = self._topology.num_ranks
        whole = self.whole_s(op)
        layout = next((cut for cut in (*chosen.outs, *chosen.ins) if cut is not None), None)
        busiest = 1 / ranks if layout is None else chosen.owners.busiest(layout)
        busiest = busiest if most is None else most
        read_whole = [i for i, need in enumerate(self._candidates[node]) if need is None]
        share = shard_seconds(op, self._topology, busiest, read_whole) + self._exchange_s.get(node, 0.0)
        if self._force_s is not None:  # to give nearly all of the tokens to one rank is not to shard them
            share += _FORCE * flops(op) * max(0.0, busiest - _UNEVEN / ranks)
        if not any(chosen.outs):
            share += spread_seconds(ranks * value_bytes(node), self._topology)
        if told:
            share += spread_seconds(told * ranks, self._topology)
        self._edge(0, self._ids[node], whole + 1e-9)
        self._share[self._ids[node]] = share

    def add_reads(
        self,
        value: fx.Node,
        tokens: Tokens,
        placement: Placement,
        crosses: bool = False,
        own: Layout | None = None,
    ) -> None:
        """Edges of the value's all-gather: who reads it whole; and what moving it to another layout costs.

        Args:
            crosses: as an output it may leave in shards.
            own: its layout, if it comes in shards; else its maker says it.
        """
        maker = self._ids[maker_of(value)] if own is None else 0
        gather = self._next
        read = False
        for user in value.users:
            if user in self._candidates:
                op, chosen = tokens.views[user], placement.chosen[user]
                for operand, need in zip(op.operands, self._candidates[user], strict=True):
                    if operand.node is value:
                        held = chosen.ins[operand.index]
                        movable = need is not None and held is not None
                        moved = need is not None and held is not None and not chosen.owners.holds(held, need)
                        if moved and maker == 0:  # other rows than came: of what was made whole
                            movable = False
                        self._edge(gather, self._ids[user] if movable else 1, None)
                        if maker and moved and need is not None and held is not None:
                            self._share[maker] += exchange_seconds(value, chosen.owners, held, need, self._topology)
                        read = True
            elif not is_getitem(user) and not (crosses and user.op == "output"):
                self._edge(gather, 1, None)
                read = True
        if read:
            self._next += 1
            shares = None
            if own is None:
                chosen = placement.chosen[maker_of(value)]
                layout = chosen.outs[tokens.views[maker_of(value)].outputs.index(value)]
                shares = None if layout is None else chosen.owners.shares(layout)
            self._edge(maker, gather, gather_seconds(value, self._topology, shares))

    def solve(self) -> tuple[set[fx.Node], float]:
        """The ops on side S (the largest such side among the minimum cuts), and the cost in seconds."""
        if not self._ids:
            return set(), 0.0
        for op, share in self._share.items():
            self._edge(op, 1, share)
        residual = nx.algorithms.flow.boykov_kolmogorov(self._graph, 0, 1)
        reach = {1}
        stack = [1]
        while stack:  # who can still reach the sink in the residual network must be R; everything else may be S
            at = stack.pop()
            for before in residual.pred[at]:
                edge = residual[before][at]
                if before not in reach and edge["flow"] < edge["capacity"]:
                    reach.add(before)
                    stack.append(before)
        chosen = {node for node, i in self._ids.items() if i not in reach}
        return chosen, residual.graph["flow_value"] * 1e-12
