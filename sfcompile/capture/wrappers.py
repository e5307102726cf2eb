"""Take apart inputs that are tensors around tensors: weights kept as bytes and unpacked where they are used (GGUF's,
torchao's).

Such a class says with ``__tensor_flatten__`` which tensors it holds, and does its arithmetic in
``__torch_dispatch__``. The graph gets the tensors inside as inputs and puts the wrapper together again where it begins;
the trace then sees what the wrapper does with them, ordinary ops, which are sharded like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.rank.sharded_value import ShardedValue
from sfcompile.runtime.rank.sharded_weight import ShardedWeight
from sfcompile.torch_private import (
    FunctionalTensor,
    aten_op,
    is_plain,
    is_static_input,
    is_wrapper,
    mark_static_input,
    no_torch_function,
    tree_leaves,
)

_OURS = (ShardedWeight, ShardedValue)


@dataclass(frozen=True)
class _Wrapper:
    """How to put a wrapper together: its class, the names of what it holds (each a wrapper again, or None), facts."""

    cls: Any
    names: tuple[str, ...]
    inside: tuple[_Wrapper | None, ...]
    facts: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, value: Any) -> _Wrapper | None:
        """That of a value; None for a plain tensor."""
        if not isinstance(value, torch.Tensor) or not is_wrapper(value) or isinstance(value, _OURS):
            return None
        names, facts = value.__tensor_flatten__()  # type: ignore[attr-defined]
        inside = tuple(cls.of(getattr(value, name)) for name in names)
        return cls(type(value), tuple(names), inside, facts, tuple(value.shape), tuple(value.stride()))

    def flat(self, value: Any) -> list[torch.Tensor]:
        """The plain tensors in a wrapper, in order."""
        tensors: list[torch.Tensor] = []
        for name, inner in zip(self.names, self.inside, strict=True):
            held = getattr(value, name)
            tensors += [held] if inner is None else inner.flat(held)
        return tensors

    def put_together(self, tensors: list[Any]) -> Any:
        """The wrapper around plain tensors, which are taken from the front of the list."""
        held = {
            name: tensors.pop(0) if inner is None else inner.put_together(tensors)
            for name, inner in zip(self.names, self.inside, strict=True)
        }
        return self.cls.__tensor_unflatten__(held, self.facts, self.shape, self.strides)


class PutTogether:
    """A call in a graph: the wrapper around its arguments."""

    __name__ = "put_together"

    def __init__(self, wrapper: _Wrapper) -> None:
        self._wrapper, self.cls = wrapper, wrapper.cls

    def __call__(self, *tensors: Any) -> Any:
        return self._wrapper.put_together(list(tensors))


def op_of_wrapper(target: Any, args: Any, kwargs: Any) -> Callable[[], Any] | None:
    """What a call on a wrapper does: its ``__torch_dispatch__`` on the ATen op; None where torch finds the way itself.

    The trace stands above the level at which torch would ask a class (it keeps composite ops like linear whole), so it
    is asked here. A class with a ``__torch_function__`` of its own has been asked before that.
    """
    held = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and is_wrapper(x) and not is_plain(x)]
    held = [x for x in held if not isinstance(x, FunctionalTensor)]
    if not held:
        return None
    asked: Any = type(held[0]).__torch_function__
    if getattr(asked, "__func__", asked) not in (torch.Tensor.__torch_function__.__func__, no_torch_function):  # type: ignore[attr-defined]
        return None
    op = aten_op(target if isinstance(target, str) else getattr(target, "__name__", ""), args, kwargs)
    if op is None:
        return None
    return lambda: _asked(type(held[0]), op, tuple({type(x) for x in held}), args, kwargs)


def _asked(cls: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """What a class makes of an op.

    Raises:
        UnsupportedError: it does not know the op. In a plain run it may be asked for the parts of a composite one.
    """
    try:
        result = cls.__torch_dispatch__(op, types, args, kwargs)
    except NotImplementedError as error:
        why: BaseException | None = error
    else:
        if result is not NotImplemented:
            return result
        why = None
    raise UnsupportedError(
        f"{cls.__name__}, a tensor around tensors, does not know {op}{f' ({why})' if why else ''}",
        "only what such a class does with whole operators can be sharded",
        f"handle {op} in its __torch_dispatch__, or let this graph run unsharded",
    ) from why


Flat = Callable[[Sequence[Any]], list[Any]]
"""From a call's inputs to those of the graph without wrappers."""


def without_wrappers(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any], Flat | None]:
    """A Dynamo graph whose inputs are plain tensors, its example inputs, and how to make them from a call's.

    None for the last, and the graph as it is, where no input is a wrapper.
    """
    wrappers = [_Wrapper.of(value) for value in inputs]
    if not any(wrappers):
        return gm, list(inputs), None

    def flat(values: Sequence[Any]) -> list[Any]:
        plain: list[Any] = []
        for value, wrapper in zip(values, wrappers, strict=True):
            if wrapper is None:
                plain.append(value)
                continue
            held = wrapper.flat(value)
            if is_static_input(value):  # so are its insides, the same objects at every call: ranks read them once
                for tensor in held:
                    mark_static_input(tensor)
            plain += held
        return plain

    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    inside: dict[fx.Node, list[fx.Node]] = {}
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, value, wrapper in zip(placeholders, inputs, wrappers, strict=True):
        if wrapper is None:
            values[node] = graph.node_copy(node)
            continue
        held = wrapper.flat(value)
        inside[node] = [graph.placeholder(f"{node.name}_{i}") for i in range(len(held))]
        for inner, tensor in zip(inside[node], held, strict=True):
            inner.meta = {"example_value": tensor}
    for node, wrapper in zip(placeholders, wrappers, strict=True):
        if wrapper is not None:
            values[node] = graph.call_function(PutTogether(wrapper), tuple(inside[node]))
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            values[node] = graph.node_copy(node, lambda n: values[n])
    plain = fx.GraphModule(gm, graph)
    plain.meta = dict(gm.meta)
    if hasattr(gm, "compile_subgraph_reason"):
        plain.compile_subgraph_reason = gm.compile_subgraph_reason
    return plain, flat(inputs), flat
