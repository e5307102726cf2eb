"""Gather weights that ranks hold in shares, just before they are read.

An input that is such a weight becomes this rank's rows of it, and before its first reader stands an exchange that makes
it whole, or two (codegen/schedule/weight_gather.py): sites like all others, with their proofs, their place in the one
order of communication, and their prices. Readers that follow share what was gathered, as long as only the last few
gathered weights are kept: a value dies with its last reader, so a weight that is read again much later is gathered
again, and a rank never holds more than those few whole.

When an exchange starts, order_puts.py decides: the heap has two banks, so one weight can travel while the rank computes
with the one before it. The exchanges are a program of their own, of all ranks of the job: those that share out the
batch hold one model together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.schedule.weight_gather import build_weight_gather
from sfcompile.passes.graph.local_graph import COMMUNICATION, LocalGraph
from sfcompile.passes.graph.tickets import tie, untie
from sfcompile.passes.state import ShardedWeights, State, WeightTraffic
from sfcompile.runtime.program.weight_rows import WeightRows

KEPT = 2
"""So many gathered weights are kept for readers that follow: the one that is read, and one more."""


def run(state: State) -> None:
    """The pass: changes ``local`` and fills ``weights``, if there are weights in shares."""
    if state.asked.weights is not None and state.asked.weights.places:
        state.weights = gather_weights(state.local, state.asked.weights)


@dataclass
class _Gather:
    """One gathering of a weight: who reads what it makes, in graph order."""

    weight: fx.Node
    readers: list[fx.Node] = field(default_factory=list)


def gather_weights(local: LocalGraph, asked: ShardedWeights) -> WeightTraffic:
    """Turn inputs into shares and gather them before they are read; what that moves."""
    graph = local.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    weights = [inputs[i] for i in asked.places]
    gathers = _gathers(graph, weights)
    cuts = {weight: WeightRows(_shape(weight), asked.cut) for weight in weights}
    built: dict[tuple[WeightRows, torch.dtype], tuple[Schedule, ...]] = {}
    stages: list[tuple[Schedule, ...]] = []
    for gather in gathers:
        key = cuts[gather.weight], gather.weight.meta["val"].dtype
        if key not in built:
            built[key] = build_weight_gather(f"weight {list(key[0].shape)}", *key, asked.topology.machine_of)
        stages.append(built[key])
    facts = [(schedule.site, schedule.groups) for schedules in stages for schedule in schedules]
    program = f"weights-{hashlib.sha256(repr((facts, asked.topology.machine_of)).encode()).hexdigest()[:16]}"
    traffic = WeightTraffic(program, [schedule for schedules in stages for schedule in schedules])
    start = _first_ticket(local)
    site = 0
    for gather, schedules in zip(gathers, stages, strict=True):
        _insert(local, gather, schedules, program, site, start, asked.rank)
        site += len(schedules)
    for weight in weights:
        value, rows = weight.meta["val"], cuts[weight]
        traffic.whole_bytes += value.numel() * value.element_size()
        weight.meta["val"] = value.new_empty(rows.local_shape(asked.rank))
        traffic.own_bytes += weight.meta["val"].numel() * value.element_size()
    tie(graph, [node for node in graph.nodes if node.target in COMMUNICATION], start)
    traffic.gathers, traffic.count = len(gathers), len(weights)
    return traffic


def _gathers(graph: fx.Graph, weights: Sequence[fx.Node]) -> list[_Gather]:
    """When which weight has to be whole."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    reads = sorted((order[user], at, user) for at, weight in enumerate(weights) for user in weight.users)
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
            shape = list(schedule.site.wanted_shape(schedule.members(rank)[0]))  # type: ignore[union-attr]
            ended = local.call(ops.exchange_finish.default, [start, program, number, shape, dtype], {})
            value = local.getitem(ended, 0)
            for node in (begun, ended, value):
                node.meta |= {key: first.meta[key] for key in ("stack_trace", "nn_module_stack") if key in first.meta}
    for reader in gather.readers:
        reader.replace_input_with(gather.weight, value)


def _shape(weight: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in weight.meta["val"].shape)
