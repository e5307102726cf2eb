"""Hide from the capture what no functional ATen graph can hold: vmapped functions and higher-order ops.

Flex attention with its block masks is the case that DiTs have. Each such stretch of a Dynamo graph becomes one call of
``streamfusion.opaque``, which runs the stretch as it is. It has no rule, so it is computed whole on every rank.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from sfcompile.runtime.rank.ops import OPAQUE, Opaque
from sfcompile.torch_private import FakeTensorMode, HigherOrderOperator, autocast_as, autocast_state, no_modes

_serial = itertools.count()


def hide_opaque(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph in which every stretch is one call; the graph itself where there is none."""
    stretches = list(_stretches(list(gm.graph.nodes)))
    if not stretches:
        return gm
    inside = {node: stretch for stretch in stretches for node in stretch}
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        stretch = inside.get(node)
        if stretch is None:
            values[node] = graph.node_copy(node, lambda n: values[n])
        elif node is stretch[-1]:
            region, inputs, outputs = _region(gm, stretch)
            call = graph.call_function(region, tuple(values[n] for n in inputs))
            call.meta = dict(node.meta)
            for i, output in enumerate(outputs):
                values[output] = graph.call_function(_item, (call, i))
                values[output].meta = dict(output.meta)
    return fx.GraphModule(gm, graph)


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]


def _stretches(nodes: list[fx.Node]) -> Iterator[list[fx.Node]]:
    """Runs of nodes from the outermost beginning of a vmap to its end, and single higher-order ops."""
    depth = 0
    current: list[fx.Node] = []
    for node in nodes:
        name = getattr(node.target, "__name__", "")
        depth += name == "_vmap_increment_nesting"
        if depth:
            current.append(node)
        elif isinstance(node.target, HigherOrderOperator):
            yield [node, *(user for user in node.users if user.target is operator.getitem)]
        if name == "_vmap_decrement_nesting":
            depth -= 1
            if not depth:
                yield current
                current = []


def _region(gm: fx.GraphModule, nodes: list[fx.Node]) -> tuple[Callable[..., Any], list[fx.Node], list[fx.Node]]:
    """The stretch as a function, the nodes it reads and the nodes it makes for others."""
    own = set(nodes)
    read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in own)
    inputs = [n for n in read if n.op != "get_attr" or isinstance(_attribute(gm, n), torch.Tensor)]
    outputs = [node for node in nodes if any(user not in own for user in node.users)]
    graph = fx.Graph()
    values = {n: graph.placeholder(n.name) for n in inputs}
    for n in read:
        if n not in values:  # a submodule: the mask or score function of a higher-order op
            values[n] = graph.node_copy(n)
    for node in nodes:
        values[node] = graph.node_copy(node, lambda n: values[n])
    graph.output(tuple(values[n] for n in outputs))
    return _Region(fx.GraphModule(gm, graph)), inputs, outputs


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = gm
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


class _Region:
    """Calls ``streamfusion.opaque``, which takes tensors only: sizes are kept with the function that it runs."""

    __name__ = "opaque"

    def __init__(self, body: fx.GraphModule) -> None:
        self._body = body

    def __call__(self, *values: Any) -> tuple[Any, ...]:
        tensors = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor)]
        rest = [None if isinstance(value, torch.Tensor) else value for value in values]
        around = autocast_state()  # that of the region which is being replayed; none is on when the graph runs

        def run(*arguments: torch.Tensor) -> list[torch.Tensor]:
            full = list(rest)
            for i, tensor in zip(tensors, arguments, strict=True):
                full[i] = tensor
            with autocast_as(around):
                return list(self._body(*full))

        key = f"opaque{next(_serial)}"
        inputs = [values[i] for i in tensors]
        with no_modes(), FakeTensorMode(), torch.no_grad():
            fake = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in inputs]
            outputs = [(list(map(int, out.shape)), out.dtype) for out in run(*fake)]
        OPAQUE[key] = Opaque(run, outputs, self._flops(values))
        return tuple(torch.ops.streamfusion.opaque(inputs, key))

    def _flops(self, values: Sequence[Any]) -> float:
        """Of attentions among the higher-order ops, as if no block were masked."""
        places = {node: i for i, node in enumerate(n for n in self._body.graph.nodes if n.op == "placeholder")}
        total = 0.0
        for node in self._body.graph.nodes:
            if isinstance(node.target, HigherOrderOperator) and all(arg in places for arg in node.args[:3]):
                q, k, v = (values[places[arg]].shape for arg in node.args[:3])
                total += 2.0 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
        return total
