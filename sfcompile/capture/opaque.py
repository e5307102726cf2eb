"""Hide from the capture what no functional ATen graph can hold: vmapped functions and higher-order ops; and hide
calls whose inside depends on the autocast region that they stand in.

Flex attention with its block masks is the case that DiTs have. Each such stretch of a Dynamo graph becomes one call of
``streamfusion.opaque``, which runs the stretch as it is: whole on every rank, or, if it is a flex attention that asks
for no head, by heads (passes/rules/per_head.py).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.rank.ops import OPAQUE, Opaque
from sfcompile.torch_private import (
    AutocastState,
    FakeTensorMode,
    HigherOrderOperator,
    autocast_as,
    autocast_state,
    block_lists_of_gradients,
    kernel_writes,
    no_modes,
    same_storage,
    tree_leaves,
)

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
    read = dict.fromkeys(n for node in nodes for n in _read_by(node) if n not in own)
    inputs = [n for n in read if n.op != "get_attr" or isinstance(_attribute(gm, n), torch.Tensor)]
    outputs = [node for node in nodes if any(user not in own for user in node.users)]
    graph = fx.Graph()
    values = {n: graph.placeholder(n.name) for n in inputs}
    for n in read:
        if n not in values:  # a submodule: the mask or score function of a higher-order op
            values[n] = graph.node_copy(n)
    for node in nodes:
        values[node] = _copied(graph, node, values)
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

        def body(*arguments: torch.Tensor) -> list[torch.Tensor]:
            full = list(rest)
            for i, tensor in zip(tensors, arguments, strict=True):
                full[i] = tensor
            with autocast_as(around):
                return list(self._body(*full))

        inputs = [values[i] for i in tensors]
        with no_modes(), FakeTensorMode(), torch.no_grad():
            fake = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in inputs]
            before = [t._version for t in fake]
            outputs = [(list(map(int, out.shape)), out.dtype) for out in self._shapes(body, fake)]
            by_kernels = self._written_by_kernels(dict(zip(tensors, fake, strict=True)))
        changed = [i for i, (t, version) in enumerate(zip(fake, before, strict=True)) if t._version != version]
        written = sorted({*changed, *(tensors.index(i) for i in by_kernels)})
        self._refuse_views(inputs, written)

        def run(*arguments: torch.Tensor) -> list[torch.Tensor]:
            own = [t.clone() if i in written else t for i, t in enumerate(arguments)]
            return [*body(*own), *(own[i] for i in written)]

        key = f"opaque{next(_serial)}"
        shapes = outputs + [(list(map(int, inputs[i].shape)), inputs[i].dtype) for i in written]
        OPAQUE[key] = Opaque(run if written else body, shapes, self._flops(values), self._per_head(values, tensors))
        results = torch.ops.streamfusion.opaque(inputs, key)
        for i, value in zip(written, results[len(outputs) :], strict=True):
            inputs[i].copy_(value)
        return tuple(results[: len(outputs)])

    def _written_by_kernels(self, fake: Mapping[int, torch.Tensor]) -> set[int]:
        """The places, among the values, of tensors that Triton kernels of the stretch write to."""
        places = {node: i for i, node in enumerate(self._body.graph.find_nodes(op="placeholder"))}
        written: set[int] = set()
        for node in self._body.graph.nodes:
            if getattr(node.target, "__name__", "") == "triton_kernel_wrapper_mutation":
                shown: Any = node.kwargs["kwargs"]
                operands = {name: places[value] for name, value in shown.items() if value in places}
                shown = {**shown, **{name: fake.get(place) for name, place in operands.items()}}
                written |= {operands[name] for name in kernel_writes({**node.kwargs, "kwargs": shown})}
        return written

    def _refuse_views(self, inputs: Sequence[torch.Tensor], written: Sequence[int]) -> None:
        """What is written to is written to in a copy, which no other operand may be a view of.

        Raises:
            UnsupportedError: one is.
        """
        for i in written:
            others = [at for at, tensor in enumerate(inputs) if at != i and same_storage(inputs[i], tensor)]
            if others:
                raise UnsupportedError(
                    f"a vmapped stretch or a Triton kernel is given operands {i} and {others[0]}, views of one memory, "
                    "and may write to it",
                    "a captured graph has values and no memory: it cannot say what the other view holds then",
                    "give it a clone() of one of them, or let this graph run unsharded",
                )

    def _shapes(self, run: Callable[..., list[torch.Tensor]], fake: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the stretch gives for fake tensors.

        Raises:
            UnsupportedError: that is only known once it runs: a loop whose end depends on data.
        """
        try:
            return run(*fake)
        except Exception as error:  # whatever torch's ops raise for what has no shape yet
            names = [
                str(node.target) for node in self._body.graph.nodes if isinstance(node.target, HigherOrderOperator)
            ]
            raise UnsupportedError(
                f"what {', '.join(names) or 'a vmapped stretch'} gives is not known before it runs "
                f"({type(error).__name__}: {error})",
                "sharding needs the shape of every value",
                "write the loop in Python, or let this graph run unsharded",
            ) from error

    def _flops(self, values: Sequence[Any]) -> float:
        """Of attentions among the higher-order ops, as if no block were masked."""
        places = {node: i for i, node in enumerate(n for n in self._body.graph.nodes if n.op == "placeholder")}
        total = 0.0
        for node in self._body.graph.nodes:
            if _is_attention(node) and all(arg in places for arg in node.args[:3]):
                q, k, v = (values[places[arg]].shape for arg in node.args[:3])
                total += 2.0 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
        return total

    def _per_head(self, values: Sequence[Any], tensors: Sequence[int]) -> dict[int, str] | None:
        """The letters of the dims (passes/rules/per_head.py) of q, k, v and the lists of blocks, by their places among
        the tensors, if this is one flex attention that asks for no head.

        Its score function is called with (score, sample, head, query, key), its mask with (sample, head, query, key);
        tensors of a block mask are [B or 1, H or 1, ...].
        """
        nodes = [node for node in self._body.graph.nodes if isinstance(node.target, HigherOrderOperator)]
        (results,) = (node.args[0] for node in self._body.graph.nodes if node.op == "output")
        if len(nodes) != 1 or not _is_flex(nodes[0]):
            return None
        flex = nodes[0]
        first = [(user.target, user.args[1:]) for user in flex.users] == [(operator.getitem, (0,))]
        calls = sum(node.op == "call_function" for node in self._body.graph.nodes)
        if not first or list(results) != list(flex.users) or calls != 2:
            return None
        places = {node: i for i, node in enumerate(self._body.graph.find_nodes(op="placeholder"))}
        score, mask = flex.args[3], flex.args[4]
        if not isinstance(mask, tuple) or not all(node in places for node in flex.args[:3]):
            return None
        q, k, v = (tuple(values[places[node]].shape) for node in flex.args[:3])
        asked = {"B": len({q[0], k[0], v[0]}) > 1, "H": False}
        for function, sample in ((score, 1), (mask[-1], 0)):
            if not isinstance(function, fx.Node) or function.op != "get_attr":
                return None
            arguments = getattr(self._body, str(function.target)).graph.find_nodes(op="placeholder")
            asked["B"] |= _is_asked(arguments[sample])
            asked["H"] |= _is_asked(arguments[sample + 1])
        if asked["H"]:
            return None
        names = {tensors.index(places[node]): "-HLD" if asked["B"] else "BHLD" for node in flex.args[:3]}
        for entry in mask[:-1]:
            value = values[places[entry]] if entry in places else None
            if isinstance(entry, fx.Node) and not (isinstance(value, torch.Tensor) and value.dim() > 1):
                return None
            if isinstance(value, torch.Tensor):
                samples, heads, *blocks = value.shape
                if samples not in (1, q[0]) or heads not in (1, q[1]):
                    return None
                text = ("B" if samples > 1 and not asked["B"] else "-") + ("H" if heads > 1 else "-")
                if text != "--":
                    names[tensors.index(places[entry])] = text + "-" * len(blocks)
        return names


def _is_asked(argument: fx.Node) -> bool:
    """Whether a function reads a number that it is given, and not only what kind of tensor that is (as torch's own mask
    does that masks nothing)."""
    kinds = ("new_ones", "new_zeros", "new_full", "new_empty")
    for user in argument.users:
        if user.op != "call_method" or user.target not in kinds or user.args[0] is not argument:
            return True
        if argument in tree_leaves((user.args[1:], dict(user.kwargs))):
            return True
    return False


def _is_flex(node: fx.Node) -> bool:
    return isinstance(node.target, HigherOrderOperator) and getattr(node.target, "__name__", "") == "flex_attention"


def _is_attention(node: fx.Node) -> bool:
    return isinstance(node.target, HigherOrderOperator) and len(node.args) >= 3


def _read_by(node: fx.Node) -> list[fx.Node]:
    """What a node reads: of flex attention's lists of blocks, not those that only its gradient reads."""
    if not _is_flex(node) or len(node.args) < 5 or not isinstance(node.args[4], tuple):
        return list(node.all_input_nodes)
    gradients = block_lists_of_gradients()
    mask = tuple(entry for place, entry in enumerate(node.args[4]) if place not in gradients)
    read: dict[fx.Node, None] = {}
    fx.map_arg((*node.args[:4], mask, *node.args[5:], dict(node.kwargs)), lambda n: read.setdefault(n))
    return list(read)


def _copied(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, fx.Node]) -> fx.Node:
    """The node in another graph; what it does not read is None there."""
    reads = frozenset(_read_by(node))

    def value_of(n: fx.Node) -> Any:
        return values[n] if n in reads else None

    return graph.node_copy(node, value_of)


@dataclass(frozen=True)
class _OperandAt:
    """Where an operand of a hidden call stands among its tensors."""

    index: int


def hide_call(graph: fx.Graph, node: fx.Node, state: AutocastState) -> None:
    """Replace one call of a captured graph by an opaque one that runs it under an autocast state.

    Args:
        node: what it returns has fake values: a tensor, or several.

    Raises:
        UnsupportedError: it returns lists of tensors among others.
    """
    values = [node.meta["val"]] if isinstance(node.meta["val"], torch.Tensor) else list(node.meta["val"])
    if any(isinstance(value, (list, tuple)) for value in values):
        raise UnsupportedError(
            f"{node.target} is called under autocast and returns lists of tensors among others",
            "what autocast does inside a call that it does not know is kept by running the call under it, as one that "
            "returns tensors",
            "return the tensors of the list one by one, or leave this call out of the autocast region",
            node=node,
        )
    outputs = [value for value in values if isinstance(value, torch.Tensor)]
    key = f"opaque{next(_serial)}"
    operands = list(dict.fromkeys(node.all_input_nodes))
    shapes = [(list(map(int, out.shape)), out.dtype) for out in outputs]
    OPAQUE[key] = Opaque(_under(node, operands, state), shapes, 0.0)
    with graph.inserting_before(node):
        call = graph.call_function(torch.ops.streamfusion.opaque.default, (operands, key))
        items = [graph.call_function(operator.getitem, (call, i)) for i in range(len(outputs))]
    call.meta = {**node.meta, "val": outputs}
    for each, output in zip(items, outputs, strict=True):
        each.meta = {**node.meta, "val": output}
    if isinstance(node.meta["val"], torch.Tensor):
        node.replace_all_uses_with(items[0])
    for user in list(node.users):
        assert user.target is operator.getitem and isinstance(user.args[1], int)
        before = [value for value in values[: user.args[1]] if isinstance(value, torch.Tensor)]
        user.replace_all_uses_with(items[len(before)])
        graph.erase_node(user)
    graph.erase_node(node)


def _under(node: fx.Node, operands: list[fx.Node], state: AutocastState) -> Callable[..., list[torch.Tensor]]:
    """The call as a function of its operands, under an autocast state."""
    target: Any = node.target
    places: dict[fx.Node, Any] = {operand: _OperandAt(i) for i, operand in enumerate(operands)}
    template: Any = fx.map_arg((node.args, dict(node.kwargs)), lambda operand: places[operand])

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        def put_in(leaf: Any) -> Any:
            return tensors[leaf.index] if isinstance(leaf, _OperandAt) else leaf

        args, kwargs = fx.node.map_aggregate(template, put_in)
        with autocast_as(state):
            return [out for out in tree_leaves(target(*args, **kwargs)) if isinstance(out, torch.Tensor)]

    return run
