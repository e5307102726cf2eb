"""One rank's graph as readable code: every line with its placement, bytes, seconds and the user's source line.

Lines are grouped by the model's own blocks. Blocks that are alike (the layers of a transformer) are shown once and
counted, so a model of 60 layers is as short to read as one of two.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sfcompile.codegen.plan.simulator import Phase
from sfcompile.codegen.plan.step import StageTimes, Step
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.errors import source_line
from sfcompile.passes.graph.cost import flops, is_view
from sfcompile.passes.graph.local_graph import COMMUNICATION
from sfcompile.passes.graph.op_view import OpView, is_getitem
from sfcompile.passes.graph.stages import compute_seconds, steps_of
from sfcompile.runtime.program.instructions import Forward, Push, Put
from sfcompile.runtime.program.phases import ENDS, EXCHANGE_LINEAR
from sfcompile.runtime.program.stages import Stage
from sfcompile.runtime.program.topology import Topology

_BLOCK = re.compile(r"^.*?\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Line:
    """One line of a rank's graph.

    Attributes:
        text: the call, as code.
        value: dtype and shape of what this rank makes, e.g. ``bf16[1, 144, 3072]``.
        kind: "compute", "view" (moves nothing), "cut" (this rank's part of a whole value), "put", "attend", "collect",
            "gather", "exchange" (halos, other cuts, another dim).
        placement: "sharded", "whole" (every rank computes the same) or "wire" (talks to other ranks).
        seconds: predicted on this rank, waits included; ``waits_s`` of it blocked.
        nbytes: what this rank sends in this line; ``across`` of it to other machines.
        flops: matmul, convolution and attention FLOPs of this rank.
        source: the user's line.
        reason: why it is whole, if it touches tokens.
    """

    text: str
    value: str
    kind: str
    placement: str
    seconds: float = 0.0
    waits_s: float = 0.0
    nbytes: int = 0
    across: int = 0
    flops: float = 0.0
    source: str = ""
    reason: str = ""

    @property
    def matters(self) -> bool:
        """Whether it takes time, sends something, or was left whole although it touches tokens."""
        return self.kind not in ("view", "cut") or bool(self.reason)


@dataclass(frozen=True)
class Block:
    """A layer of the model, or what lies between layers ("" as name), and its lines.

    ``alike``: how many blocks have these lines; ``name`` is the first of them.
    """

    name: str
    alike: int
    lines: tuple[Line, ...]

    @property
    def seconds(self) -> float:
        """Predicted seconds of one such block on this rank."""
        return sum(line.seconds for line in self.lines)


@dataclass(frozen=True)
class StageCost:
    """What a stage costs a rank: ``nbytes`` are sent in it, ``across`` of them to other machines."""

    times: StageTimes
    nbytes: int
    across: int

    @property
    def kind(self) -> str:
        """What a line of the explained graph calls it: put, attend, collect, gather or exchange."""
        if self.times.kind != "attention":
            return self.times.kind
        phase = self.times.stage.phase
        return "put" if phase.startswith("put_") else phase


def costs_of(step: Step) -> list[StageCost]:
    """The stages of a step in their order, with what its rank sends in each."""
    known: dict[tuple[int, str, int], tuple[int, int]] = {}  # layers repeat
    costs = []
    for times in step.stages:
        key = id(times.schedule), times.stage.phase, times.stage.part
        if key not in known:
            known[key] = _sent(times.schedule, times.stage, step.rank, step.job)
        costs.append(StageCost(times, *known[key]))
    return costs


def _sent(schedule: Schedule, stage: Stage, rank: int, job: Topology) -> tuple[int, int]:
    """Bytes that a rank sends in a stage, and how many of them to other machines."""
    place, members = schedule.members(rank)
    arrivals = {arrival.slot: schedule.arrival_bytes(arrival) for arrival in schedule.origin.arrivals}
    phase = Phase(schedule, 1, stage.phase, stage.part)
    sent = across = 0
    for step in schedule.program(place).phases[stage.phase]:
        match step:
            case Put(_, _, dst, slot) | Forward(_, dst, slot):
                pass
            case Push(q, slot):
                dst = q.src
            case _:
                continue
        if phase.has(step):
            nbytes = int(arrivals[slot][dst])
            sent += nbytes
            across += 0 if job.same_machine(rank, members[dst]) else nbytes
    return sent, across


@dataclass(frozen=True)
class Facts:
    """What the listing of a graph needs to know.

    Attributes:
        topology: that of this rank's group.
        names: readable names of the graph's inputs, in order.
        sharded: captured nodes that were placed on shards.
        reasons: captured nodes that touch tokens and were left whole, and why.
        step: that the graph's lines add up to; None if it talks to nobody.
    """

    topology: Topology
    names: Sequence[str]
    sharded: frozenset[str]
    reasons: dict[str, str]
    step: Step | None = None


def blocks_of(graph: fx.Graph, facts: Facts) -> tuple[Block, ...]:
    """The graph's lines by block, in the order in which blocks begin; blocks alike are counted once."""
    names = _names(graph, facts.names)
    costs = iter(costs_of(facts.step) if facts.step is not None else ())
    where, runs = "", 0
    order: dict[tuple[str, int], list[Line]] = {}
    for node in steps_of(graph):
        before, where = where, _layer(node) if node.meta.get("nn_module_stack") else where
        runs += where != before
        talks = node.target in COMMUNICATION
        line = _stage(node, names, next(costs), facts.topology) if talks else _line(node, names, facts)
        # A layer is one block wherever its lines are; what lies between layers is a block of its own.
        order.setdefault((where, 0 if where else runs), []).append(line)
    kinds: dict[tuple[Any, ...], list[tuple[str, list[Line]]]] = {}
    for (name, _), lines in order.items():
        # What talks to others takes a little longer here than there, as ranks come at different times.
        same = ((x.kind, x.placement, x.value, x.nbytes, x.placement == "wire" or x.seconds) for x in lines)
        kinds.setdefault((re.sub(r"\d+$", "", name), *same), []).append((name, lines))
    return tuple(Block(alike[0][0], len(alike), _mean([lines for _, lines in alike])) for alike in kinds.values())


def _mean(blocks: Sequence[Sequence[Line]]) -> tuple[Line, ...]:
    """The lines of the first of blocks that are alike, with the mean times of all."""
    count = len(blocks)
    return tuple(
        replace(lines[0], seconds=sum(x.seconds for x in lines) / count, waits_s=sum(x.waits_s for x in lines) / count)
        for lines in zip(*blocks, strict=True)
    )


def _line(node: fx.Node, names: dict[fx.Node, str], facts: Facts) -> Line:
    source = source_line(node.stack_trace) or ""
    op = OpView.of(node)
    origin = str(node.meta.get("origin", node.name))
    sharded = origin in facts.sharded
    value = _value(node.meta.get("val"))
    text = f"{names[node]} = {_call(node, names)}"
    if op is None:
        return Line(text, value, "view", "sharded" if sharded else "whole", source=source)
    whole_in = all(x.op in ("placeholder", "get_attr") for x in node.all_input_nodes)
    cut = is_view(op) and whole_in and "origin" in node.meta and op.name in ("slice", "index_select")
    kind = "cut" if cut else "view" if is_view(op) else "compute"
    reason = "" if sharded else facts.reasons.get(origin, "")
    placement = "sharded" if sharded else "whole"
    return Line(
        text,
        value,
        kind,
        placement,
        compute_seconds(node, facts.topology),
        flops=flops(op),
        source=source,
        reason=reason,
    )


def _stage(node: fx.Node, names: dict[fx.Node, str], cost: StageCost, topology: Topology) -> Line:
    op, times = OpView.of(node), cost.times
    assert op is not None
    tensor = next((operand.node for operand in op.operands if not _is_ticket(operand.node)), None)
    args = [*([] if tensor is None else [names[tensor]]), f"site={times.stage.site}"]
    args += [f"part={times.stage.part}"] if times.stage.part >= 0 else []
    text = f"{op.name}({', '.join(args)})"
    value = ""
    if op.name in ENDS:
        text, value = f"{names[node]} = {text}", _value(node.meta["val"][0])
    elif tensor is not None and op.name != "attend":
        value = _value(tensor.meta["val"])
    source = source_line(node.stack_trace) or ""
    reads = op.name == EXCHANGE_LINEAR
    took_s, product = times.seconds + (compute_seconds(node, topology) if reads else 0.0), flops(op) if reads else 0.0
    return Line(text, value, cost.kind, "wire", took_s, times.waits_s, cost.nbytes, cost.across, product, source=source)


def _is_ticket(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and tuple(value.shape) == (1,) and value.dtype == torch.int64


def _names(graph: fx.Graph, inputs: Sequence[str]) -> dict[fx.Node, str]:
    """Readable names: of inputs, of results without the overload's name, of picked outputs as ``x[1]``."""
    names: dict[fx.Node, str] = {}
    used: Counter[str] = Counter()
    of_inputs = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = next(of_inputs, node.name)
        elif is_getitem(node):
            source, index = node.args
            assert isinstance(source, fx.Node)
            ends = source.target in COMMUNICATION
            names[node] = names[source] if ends else f"{names[source]}[{index}]"
        else:
            base = _target(node)
            names[node] = f"{base}_{used[base]}" if used[base] else base
            used[base] += 1
    return names


def input_names(placeholders: Sequence[str]) -> list[str]:
    """Names of a Dynamo graph's inputs as a user writes them: ``blocks.0.attn.to_q.weight``, ``hidden_states``."""
    names = []
    for name in placeholders:
        path = re.split(r"_(?:modules|parameters|buffers)_", name.strip("_"))
        head = re.sub(r"^[lL]_+(self(_+dict)?|kwargs|args)?_*", "", path[0])
        names.append(".".join(word.strip("_") for word in (head, *path[1:]) if word.strip("_")) or name)
    return names


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    args = [_argument(arg, names) for arg in node.args]
    args += [f"{key}={_argument(value, names)}" for key, value in node.kwargs.items() if _worth_saying(key, value)]
    return f"{_target(node)}({', '.join(args)})"


def _target(node: fx.Node) -> str:
    """The op's name without library and overload."""
    name = str(node.target).split(".")
    return (name[1] if len(name) > 2 else str(getattr(node.target, "__name__", node.target))).lstrip("_")


def _worth_saying(key: str, value: Any) -> bool:
    return key not in ("device", "pin_memory", "layout", "memory_format") and value is not None and value is not False


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    match value:
        case fx.Node():
            text = names[value]
            return ".".join(text.split(".")[-2:]) if value.op == "placeholder" else text
        case tuple() | list():
            shown = [_argument(entry, names) for entry in value[:8]]
            return f"[{', '.join(shown + ['...'] * (len(value) > 8))}]"
        case float():
            return f"{value:.6g}"
        case torch.dtype():
            return _dtype(value)
        case int() if value > 1 << 60:
            return "end"
    return str(value)


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_dtype(value.dtype)}[{', '.join(str(int(size)) for size in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return ", ".join(_value(entry) for entry in value)
    return ""


def _dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    for long, short in (("bfloat", "bf"), ("float", "f"), ("complex", "c"), ("uint", "u"), ("int", "i")):
        if name.startswith(long):
            return name.replace(long, short, 1)
    return name


def module_of(node: fx.Node) -> str:
    """The module that a node comes from, as a user writes it: ``transformer_blocks.0.attn``; "" outside all."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()), ("", None))[0]) if stack else ""
    path = path.replace("']['", ".").replace("['", ".").replace("']", "").replace("[", ".").replace("]", "")
    path = re.sub(r"\.(__dict__|_modules)(?=\.|$)", "", path)
    return re.sub(r"^L?\.?(self)?\.?", "", path)


def _layer(node: fx.Node) -> str:
    """The layer a node belongs to: its module's path up to the first number; "" outside of layers."""
    match = _BLOCK.match(module_of(node))
    return match[0] if match else ""
