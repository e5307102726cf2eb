"""A finished local graph read as a step: what lies between the nodes that talk to other ranks, in seconds.

One place says which nodes count and what they cost, so that a listing of the graph and a prediction of it agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from sfcompile.passes.graph.cost import seconds
from sfcompile.passes.graph.halo import ASSEMBLED
from sfcompile.passes.graph.local_graph import COMMUNICATION
from sfcompile.passes.graph.op_view import OpView, is_getitem
from sfcompile.passes.graph.tickets import kind_of
from sfcompile.runtime.program.phases import EXCHANGE_FINISH, EXCHANGE_LINEAR
from sfcompile.runtime.program.stages import GraphStages, Stage
from sfcompile.runtime.program.topology import Topology


def steps_of(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes that compute or talk, in their order: no inputs, no picked outputs, no first ticket."""
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output") and not is_getitem(node) and not _is_ticket(node):
            yield node


def _is_ticket(node: fx.Node) -> bool:
    """The graph's first ticket: an order, not a value (runtime/rank/ops.py)."""
    return bool(node.users) and all(user.target in COMMUNICATION for user in node.users) and not node.all_input_nodes


def compute_seconds(node: fx.Node, topology: Topology) -> float:
    """What a node computes on this rank, apart from what it waits for."""
    op = OpView.of(node)
    return 0.0 if op is None or ASSEMBLED in node.meta else seconds(op, topology)


def stage_of(node: fx.Node, before_s: float = 0.0) -> Stage:
    """A node of ``COMMUNICATION`` as a stage."""
    op = OpView.of(node)
    assert op is not None
    phase = op.args["phase"] if op.name == "put_fused" else op.name
    phase = EXCHANGE_FINISH if op.name == EXCHANGE_LINEAR else phase
    return Stage(str(op.args["program"]), int(op.args["site"]), str(phase), int(op.args.get("part", -1)), before_s)


def stages_of(graph: fx.Graph, topology: Topology) -> GraphStages:
    """The stages of a local graph; ``topology`` has the rates of the rank that computes between them."""
    stages: list[Stage] = []
    before_s = 0.0
    for node in steps_of(graph):
        if node.target in COMMUNICATION:
            stages.append(stage_of(node, before_s))
            # What it computes with the weight, it does when all of that is there.
            before_s = compute_seconds(node, topology) if kind_of(node) == EXCHANGE_LINEAR else 0.0
        else:
            before_s += compute_seconds(node, topology)
    return GraphStages(tuple(stages), before_s)


def without(graph: GraphStages, program: str) -> GraphStages:
    """The same step without the stages of one program: what a rank computes before them stays."""
    stages: list[Stage] = []
    carried_s = 0.0
    for stage in graph.stages:
        if stage.program == program:
            carried_s += stage.before_s
        else:
            stages.append(replace(stage, before_s=stage.before_s + carried_s))
            carried_s = 0.0
    return GraphStages(tuple(stages), graph.after_s + carried_s)
