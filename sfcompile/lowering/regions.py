"""Stretches of a local graph as graphs of their own, and which of them are equal.

A region takes all that it reads as inputs: activations, weights, constants, the ticket. The numbers of its sites count
from the lowest of them (`sites_from` of runtime/rank/ops.py says at a call where that is). Then repetitions of a block
are the same text, and two regions are equal if that text, the shapes, strides, dtypes, devices and alignments of all
values, and the values that are read behind them are equal. Nothing else decides it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sfcompile.runtime.rank.ops import COMMUNICATION
from sfcompile.torch_private import FakeTensorMode

_TALKS = frozenset(COMMUNICATION)
_ALIGNED_BYTES = 64
"""Two inputs are alike for a compiled kernel if they begin equally many bytes behind a multiple of this."""


@dataclass(frozen=True)
class Region:
    """A stretch of calls.

    Attributes:
        nodes: its calls, in order.
        inputs: what they read of other nodes: tensors, in the order of first use.
        outputs: those of its values that are read behind it.
        first_site: by program, the lowest of its sites.
        key: equal for regions of which one compiled graph serves both.
    """

    nodes: Sequence[fx.Node]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    first_site: dict[str, int]
    key: Hashable

    def as_module(self, gm: fx.GraphModule, mode: FakeTensorMode) -> tuple[fx.GraphModule, list[torch.Tensor]]:
        """The region as a graph, and fake inputs for it, no two of which lie in the same memory.

        Whether two inputs overlap differs from repetition to repetition. A compiler that saw it in one of them would
        make an output that is a view of the one as a view of the other.
        """
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        examples = []
        for i, node in enumerate(self.inputs):
            examples.append(_apart(node.meta["val"], mode))
            copies[node] = graph.placeholder(f"input_{i}")
            copies[node].meta["val"] = examples[-1]
        for node in self.nodes:
            for module in _modules(node):
                if module not in copies:
                    copies[module] = graph.get_attr(str(module.target))
            args, kwargs = fx.node.map_arg((_with_site(node, self.first_site), node.kwargs), copies.__getitem__)
            copy = graph.create_node(node.op, node.target, args, kwargs)
            copy.meta = dict(node.meta)
            copies[node] = copy
        graph.output(tuple(copies[node] for node in self.outputs))
        graph.lint()
        return fx.GraphModule(gm, graph), examples


def letter(node: fx.Node) -> Hashable:
    """What a call is by itself: its operator, constants, and what its operands and results are like."""
    args = (_with_site(node, None), node.kwargs)
    return node.op, node.target, _plain(args, lambda operand: _like(operand.meta.get("val"))), _like(node.meta["val"])


def region_of(nodes: Sequence[fx.Node]) -> Region:
    """The region of some consecutive calls."""
    place = {node: i for i, node in enumerate(nodes)}
    inputs: dict[fx.Node, int] = {}
    first_site: dict[str, int] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand not in place and not _is_module(operand):
                inputs.setdefault(operand, len(inputs))
        for program, site in _site(node):
            first_site[program] = min(site, first_site.get(program, site))

    def name(operand: fx.Node) -> Hashable:
        if operand in place:
            return "here", place[operand]
        return ("module", operand.target) if _is_module(operand) else ("input", inputs[operand])

    calls = tuple(
        (node.target, _plain((_with_site(node, first_site), node.kwargs), name), _like(node.meta["val"]))
        for node in nodes
    )
    outputs = tuple(node for node in nodes if any(user not in place for user in node.users))
    likes = tuple(_like(node.meta["val"]) for node in inputs)
    return Region(
        nodes, tuple(inputs), outputs, first_site, (calls, likes, tuple(place[node] for node in outputs))
    )  # fmt: skip


def sites_of(node: fx.Node) -> tuple[str, int] | None:
    """Program and number of the site that a node belongs to, if it talks to other ranks."""
    return next(_site(node), None)


def _site(node: fx.Node) -> Iterator[tuple[str, int]]:
    if node.target in _TALKS:
        program, site = (node.args[i] for i in _places(node))
        yield str(program), int(site)  # type: ignore[arg-type]


def _places(node: fx.Node) -> tuple[int, int]:
    """Where a node that talks has its program and its site."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return names.index("program"), names.index("site")


def _with_site(node: fx.Node, first_site: dict[str, int] | None) -> tuple[Any, ...]:
    """The arguments of a node, its site counted from a region's lowest, or (None) left out."""
    args: list[Any] = list(node.args)
    if node.target in _TALKS:
        program, site = _places(node)
        args[site] = -1 if first_site is None else args[site] - first_site[args[program]]
    return tuple(args)


def _is_module(node: fx.Node) -> bool:
    """Whether a node names a part of the model that is no tensor: the body of a loop, say."""
    return node.op == "get_attr" and not isinstance(node.meta.get("val"), torch.Tensor)


def _modules(node: fx.Node) -> list[fx.Node]:
    return [operand for operand in node.all_input_nodes if _is_module(operand)]


def _like(value: Any) -> Hashable:
    """What a value is like, for whoever compiles what reads it."""
    if isinstance(value, torch.Tensor):
        offset = value.storage_offset() * value.element_size() % _ALIGNED_BYTES
        return tuple(value.shape), value.stride(), value.dtype, value.device, offset, type(value)
    if isinstance(value, (tuple, list)):
        return tuple(_like(entry) for entry in value)
    return type(value), repr(value)


def _plain(value: Any, name: Callable[[fx.Node], Hashable]) -> Hashable:
    """Arguments as something that can be compared: 1, 1.0 and True differ, nodes are what ``name`` says."""
    if isinstance(value, fx.Node):
        return "node", name(value)
    if isinstance(value, (tuple, list)):
        return type(value).__name__, tuple(_plain(entry, name) for entry in value)
    if isinstance(value, dict):
        return "dict", tuple((key, _plain(entry, name)) for key, entry in value.items())
    if isinstance(value, slice):
        return "slice", tuple(_plain(entry, name) for entry in (value.start, value.stop, value.step))
    return type(value), repr(value)


def _apart(value: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor like this one, in memory of its own, that begins at an address of the same alignment."""
    size, stride = tuple(value.shape), value.stride()
    offset = value.storage_offset() * value.element_size() % _ALIGNED_BYTES // value.element_size()
    with mode:
        if not offset or not value.numel():
            return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
        last = sum((count - 1) * step for count, step in zip(size, stride, strict=True))
        memory = torch.empty(offset + last + 1, dtype=value.dtype, device=value.device)
        return memory.as_strided(size, stride, offset)


def is_pick(node: fx.Node) -> bool:
    """Whether a node picks one of the results of another."""
    return node.op == "call_function" and node.target is operator.getitem
