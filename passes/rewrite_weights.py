"""Gather weights that ranks hold in shares, just before they are read.

An input that is such a weight becomes this rank's rows of it, and before its first reader stands an exchange that makes
it whole, or two (codegen/schedule/weight_gather.py): sites like all others, with their proofs, their place in the one
order of communication, and their prices. On CPUs a weight comes together in the heap's bank, and a product that is its
only reader reads it there (``exchange_linear`` in runtime/rank/ops.py): nobody copies it. Other readers get a copy.
Those that follow share what was gathered, as long as only the last few gathered weights are kept: a value dies with its
last reader, so a weight that is read again much later is gathered again, and a rank never holds more than those few
whole. What reads its own rank's rows (graph/features.py) reads the share, and nothing is gathered for it.

Products that follow one another share an exchange, of which each of their weights is a part: while the rank computes
with one, those behind it still arrive, and what is computed for long hides what is read for a few rows.

When an exchange starts, order_puts.py decides: the heap has two banks, so one weight can travel while the rank computes
with the one before it. The exchanges are a program of their own, of all ranks of the job: those that share out the
batch hold one model together.
"""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.schedule.weight_gather import Assembled, build_assembled, build_weight_gather
from sfcompile.passes.graph.cost import value_bytes
from sfcompile.passes.graph.features import OWN_ROWS
from sfcompile.passes.graph.local_graph import COMMUNICATION, LocalGraph
from sfcompile.passes.graph.tickets import tie, untie
from sfcompile.passes.state import ShardedWeights, State, WeightTraffic
from sfcompile.runtime.program.weight_rows import WeightRows

KEPT = 2
"""So many gathered weights are kept for readers that follow: the one that is read, and one more."""

TOGETHER = 2
"""So many times the largest gathered weight one exchange may hold: a bank of the heap does."""


def run(state: State) -> None:
    """The pass: changes ``local`` and fills ``weights``, if there are weights in shares."""
    if state.asked.weights is not None and state.asked.weights.places:
        state.weights = gather_weights(state.local, state.asked.weights, not state.asked.late_reads)


@dataclass
class _Gather:
    """One gathering of a weight.

    Attributes:
        readers: of what it makes, in graph order.
        product: whether it has one reader, a product, which reads it in the bank.
    """

    weight: fx.Node
    readers: list[fx.Node] = field(default_factory=list)
    product: bool = False


def gather_weights(local: LocalGraph, asked: ShardedWeights, on_cpu: bool = True) -> WeightTraffic:
    """Turn inputs into shares and gather them before they are read; what that moves."""
    on_cpu = on_cpu and not asked.by_machine  # as GPUs hold them
    graph = local.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    weights = [inputs[i] for i in asked.places]
    gathers = _gathers(graph, weights)
    cuts = {weight: WeightRows(_shape(weight), asked.cut) for weight in weights}
    if on_cpu:
        _find_products(gathers)
    together = _together(graph, gathers)
    built: dict[tuple[tuple[WeightRows, ...], torch.dtype], tuple[Schedule, ...]] = {}
    stages: list[tuple[Schedule, ...]] = []
    for group in together:
        key = tuple(cuts[gather.weight] for gather in group), group[0].weight.meta["val"].dtype
        if key not in built:
            name = f"weight {', '.join(str(list(each.shape)) for each in key[0])}"
            if on_cpu:
                built[key] = (build_assembled(name, *key, asked.topology.machine_of),)
            else:
                built[key] = build_weight_gather(name, key[0][0], key[1], asked.topology.machine_of)
        stages.append(built[key])
    facts = [(schedule.site, schedule.groups) for schedules in stages for schedule in schedules]
    program = f"weights-{hashlib.sha256(repr((facts, asked.topology.machine_of)).encode()).hexdigest()[:16]}"
    traffic = WeightTraffic(program, [schedule for schedules in stages for schedule in schedules])
    start = _first_ticket(local)
    site = 0
    for group, schedules in zip(together, stages, strict=True):
        if group[0].product:
            _insert_products(local, group, program, site, start)
        else:
            _insert(local, group[0], schedules, program, site, start, asked.rank)
        site += len(schedules)
    for weight in weights:
        _read_own_rows(graph, weight)
        value, rows = weight.meta["val"], cuts[weight]
        traffic.whole_bytes += value.numel() * value.element_size()
        weight.meta["val"] = value.new_empty(rows.local_shape(asked.rank))
        traffic.own_bytes += weight.meta["val"].numel() * value.element_size()
    tie(graph, [node for node in graph.nodes if node.target in COMMUNICATION], start)
    traffic.gathers, traffic.count = len(gathers), len(weights)
    return traffic


def _read_own_rows(graph: fx.Graph, weight: fx.Node) -> None:
    """What reads this rank's rows of a weight, and on every rank its own (graph/features.py), reads its share."""
    for user in list(weight.users):
        if user.meta.get(OWN_ROWS):
            user.replace_all_uses_with(weight)
            graph.erase_node(user)


def _gathers(graph: fx.Graph, weights: Sequence[fx.Node]) -> list[_Gather]:
    """When which weight has to be whole; who reads this rank's rows needs no more than its share."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    users = [[user for user in weight.users if not user.meta.get(OWN_ROWS)] for weight in weights]
    reads = sorted((order[user], at, user) for at, mine in enumerate(users) for user in mine)
    gathers: list[_Gather] = []
    kept: list[_Gather] = []
    for _, at, user in reads:
        current = next((gather for gather in kept if gather.weight is weights[at]), None)
        if current is None:
            current = _Gather(weights[at])
            gathers.append(current)
        else:
            kept.remove(current)
        current.readers.append(user)
        kept = [*kept, current][-KEPT:]
    return gathers


def _first_ticket(local: LocalGraph) -> fx.Node:
    """The ticket from which the chain starts, untied; a new one where nothing talks yet."""
    graph = local.graph
    nodes = [node for node in graph.nodes if node.target in COMMUNICATION]
    if nodes:
        return untie(graph, nodes)
    head = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(head):
        return local.ticket()


def _insert(
    local: LocalGraph,
    gather: _Gather,
    schedules: Sequence[Schedule],
    program: str,
    site: int,
    start: fx.Node,
    rank: int,
) -> None:
    """The exchanges of one gathering before its first reader, and its readers on what comes out."""
    ops, first, value = torch.ops.streamfusion, gather.readers[0], gather.weight
    dtype = value.meta["val"].dtype
    with local.graph.inserting_before(first):
        for number, schedule in enumerate(schedules, site):
            begun = local.call(ops.exchange_start.default, [value, start, program, number], {})
            if isinstance(schedule, Assembled):
                shape = list(schedule.whole(0)[1])
            else:
                shape = list(schedule.site.wanted_shape(schedule.members(rank)[0]))  # type: ignore[union-attr]
            ended = local.call(ops.exchange_finish.default, [start, program, number, shape, dtype], {})
            value = local.getitem(ended, 0)
            for node in (begun, ended, value):
                node.meta |= {key: first.meta[key] for key in ("stack_trace", "nn_module_stack") if key in first.meta}
    for reader in gather.readers:
        reader.replace_input_with(gather.weight, value)


def _find_products(gathers: Sequence[_Gather]) -> None:
    """Mark weights that a plain product reads, and nothing else, and that alone of all weights in shares."""
    reads = Counter(reader for gather in gathers for reader in gather.readers)
    for gather in gathers:
        reader, weight = gather.readers[0], gather.weight
        product = reader.target is torch.ops.aten.linear.default and not reader.kwargs
        if len(gather.readers) == 1 == reads[reader] and product:
            x, read, *bias = reader.args
            gather.product = read is weight and weight not in (x, *bias) and weight.meta["val"].dim() == 2


def _together(graph: fx.Graph, gathers: Sequence[_Gather]) -> list[list[_Gather]]:
    """The gathers that one exchange makes: of weights that products read one after the other.

    Nothing else is exchanged between the products of one exchange, so that of three exchanges in a row the first has
    ended when the third begins, as the heap's two banks want it.
    """
    most = TOGETHER * max((value_bytes(gather.weight) for gather in gathers if gather.product), default=0)
    order = {node: i for i, node in enumerate(graph.nodes)}
    talks = sorted(order[node] for node in graph.nodes if node.target in COMMUNICATION)
    together: list[list[_Gather]] = []
    room, before = 0, -1  # of the last exchange; where its last product stands, -1: nothing may join it
    for gather in gathers:
        at, size = order[gather.readers[0]], value_bytes(gather.weight)
        talked = bisect(talks, at) != bisect(talks, before)
        same = bool(together) and together[-1][0].weight.meta["val"].dtype == gather.weight.meta["val"].dtype
        if not gather.product or before < 0 or talked or not same or size > room:
            together.append([])
            room = most
        together[-1].append(gather)
        room, before = room - size, at if gather.product else -1
    return together


def _insert_products(local: LocalGraph, group: Sequence[_Gather], program: str, site: int, start: fx.Node) -> None:
    """One exchange of weights, each of which is a part of it and ends in the product that reads it, in its place."""
    ops, several = torch.ops.streamfusion, len(group) > 1
    for part, gather in enumerate(group):
        number = part if several else -1
        with local.graph.inserting_before(group[0].readers[0]):
            begun = local.call(ops.exchange_start.default, [gather.weight, start, program, site, number], {})
        begun.meta = {**gather.readers[0].meta, "val": begun.meta["val"]}
    for part, gather in enumerate(group):
        (reader,), number = gather.readers, part if several else -1
        x, _, bias = (*reader.args, None)[:3]
        with local.graph.inserting_before(reader):
            args = [x, bias, start, program, site, _shape(gather.weight)[0], number]
            ended = local.call(ops.exchange_linear.default, args, {})
            value = local.getitem(ended, 0)
        for node in (ended, value):
            node.meta = {**reader.meta, "val": node.meta["val"]}
        reader.replace_all_uses_with(value)
        local.graph.erase_node(reader)


def _shape(weight: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in weight.meta["val"].shape)
