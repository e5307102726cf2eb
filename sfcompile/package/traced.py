"""What an export knows of a model: one graph for one set of inputs, traced while nothing is computed.

The tracing backend returns tensors without values; by their identity the model's result is described, so a result may
hold them anywhere, beside inputs and constants.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sfcompile.capture.fewer_breaks import fewer_breaks
from sfcompile.capture.graph import Captured, capture, refuse_training
from sfcompile.errors import OptionError, StreamFusionError, UnsupportedError
from sfcompile.package.call import bind, describe
from sfcompile.package.graph import tensor_facts
from sfcompile.torch_private import GraphBreak


@dataclass
class Traced:
    """A model's graph, where its placeholders' values come from, and its result.

    Attributes:
        placeholders: for each, ``("input", number)`` or ``("weight", name)``.
        weights: parameters, buffers and other tensors that the graph reads, by name.
        inputs: the tensors of the call, by number.
        result: the description of the model's result (call.py); tensors are outputs of the graph, then inputs.
    """

    captured: Captured
    positional: list[str]
    arguments: dict[str, Any]
    inputs: list[torch.Tensor]
    placeholders: list[tuple[str, Any]]
    weights: dict[str, torch.Tensor]
    result: Any = None

    def as_json(self, model: torch.nn.Module) -> dict[str, Any]:
        """The part of the manifest that is the same on every rank."""
        tensors = [{**tensor_facts(x), "device": "cpu" if x.is_meta else x.device.type} for x in self.inputs]
        return {
            "model": type(model).__name__,
            "signature": {"positional": self.positional, "arguments": self.arguments, "tensors": tensors},
            "result": self.result,
            "placeholders": self.placeholders,
            "written": [self.captured.tensor_inputs.index(i) for i in self.captured.written],
        }


@dataclass
class _Seen:
    """What the tracing backend was given and what it handed out."""

    captured: list[Captured] = field(default_factory=list)
    actual: list[tuple[Any, ...]] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    failed: list[StreamFusionError] = field(default_factory=list)


def trace(model: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Traced:
    """Trace a model for one set of inputs. Nothing is computed.

    Raises:
        OptionError: ``args`` is a tensor.
        InputError: they do not fit forward().
        UnsupportedError: the model has a graph break, keeps state, or takes or gives what no package can say.
    """
    if isinstance(args, torch.Tensor):
        raise OptionError("args is a tensor", "it is the sequence of forward()'s positional arguments", "write (x,)")
    positional, named_args = bind(model, args, kwargs)
    named = dict(
        itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    )
    names: dict[int, str] = {}
    for name, tensor in named.items():
        names.setdefault(id(tensor), name)
    inputs: list[torch.Tensor] = []

    def leaf(tensor: torch.Tensor) -> int:
        inputs.append(tensor)
        return len(inputs) - 1

    arguments = {name: describe(value, leaf, name) for name, value in named_args.items()}
    devices = {x.device.type for x in (*inputs, *named.values())} - {"cpu", "meta"}
    if devices:
        raise UnsupportedError(
            f"the model or its inputs are on {', '.join(sorted(devices))}",
            "packages run on CPU ranks so far",
            "export it from the CPU or the meta device, or compile it with backend='streamfusion'",
        )
    # One object in two places would be one input of the graph: give each place its own.
    known = set(names)
    for i, tensor in enumerate(inputs):
        if id(tensor) in known:
            inputs[i] = tensor.detach().clone()
        known.add(id(inputs[i]))
    seen = _Seen()
    call = _refill(named_args, arguments, inputs)
    torch.compiler.reset()
    try:
        with torch.no_grad():
            result = torch.compile(model, backend=_tracer(seen), fullgraph=True, dynamic=False)(**call)
    except GraphBreak as error:
        reason = str(error).strip().splitlines()
        raise UnsupportedError(
            f"{type(model).__name__} does not trace as one graph: {reason[0] if reason else type(error).__name__}",
            "a package holds one graph and nothing of the model's own code",
            "remove the graph break (torch.compile(fullgraph=True) says where), or compile the model instead",
        ) from error
    finally:
        torch.compiler.reset()
    if seen.failed:
        raise seen.failed[0]
    if not seen.captured:
        raise UnsupportedError(f"{type(model).__name__} has no graph", "torch.compile traced nothing of it")
    placeholders, weights = _sources(seen, inputs, names)
    traced = Traced(seen.captured[0], positional, arguments, inputs, placeholders, weights)
    traced.result = _describe_result(result, seen.outputs, inputs, type(model).__name__)
    return traced


def _sources(
    seen: _Seen, inputs: Sequence[torch.Tensor], names: Mapping[int, str]
) -> tuple[list[tuple[str, Any]], dict[str, torch.Tensor]]:
    """Where each placeholder of the graph comes from, an input or a weight; and the weights by name."""
    number = {id(tensor): i for i, tensor in enumerate(inputs)}
    weights: dict[str, torch.Tensor] = {}
    placeholders: list[tuple[str, Any]] = []
    for i in seen.captured[0].tensor_inputs:
        value = seen.actual[0][i]
        if id(value) in number:
            placeholders.append(("input", number[id(value)]))
            continue
        name = names.get(id(value), f"constant.{len(weights)}")
        weights[name] = value
        placeholders.append(("weight", name))
    return placeholders, weights


def _refill(values: Mapping[str, Any], arguments: Mapping[str, Any], inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The arguments with the tensors of ``inputs``; values of the model's own types stay as they are."""

    def fill(value: Any, tree: Mapping[str, Any]) -> Any:
        ((kind, inner),) = tree.items()
        if kind == "tensor":
            return inputs[inner]
        if kind in ("list", "tuple"):
            return type(value)(fill(entry, part) for entry, part in zip(value, inner, strict=True))
        if kind == "dict":
            return type(value)((key, fill(value[key], part)) for key, part in inner.items())
        return value

    return {name: fill(value, arguments[name]) for name, value in values.items()}


def _tracer(seen: _Seen) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    @fewer_breaks
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            refuse_training(example_inputs)
            captured = capture(gm, example_inputs)
        except StreamFusionError as error:  # torch.compile would wrap it
            seen.failed.append(error)
            return gm.forward
        seen.captured.append(captured)
        values: Any = captured.gm.graph.output_node().args[0]
        results = [node.meta["val"] for node in values[: len(values) - len(captured.written)]]
        seen.outputs.extend(torch.empty(tuple(value.shape), dtype=value.dtype, device="meta") for value in results)

        def run(*actual: Any) -> list[torch.Tensor]:
            seen.actual.append(actual)
            return list(seen.outputs)

        return run

    return backend


def _describe_result(result: Any, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], name: str) -> Any:
    """The result with tensors numbered: the graph's outputs, then the inputs of the call."""
    number = {id(tensor): i for i, tensor in enumerate([*outputs, *inputs])}
    used: set[int] = set()

    def leaf(tensor: torch.Tensor) -> int:
        if id(tensor) not in number:
            raise UnsupportedError(
                f"{name} returns a tensor that its graph does not make",
                "it is a weight, or computed outside the graph",
                "return something computed from the inputs",
            )
        used.add(number[id(tensor)])
        return number[id(tensor)]

    tree = describe(result, leaf, "the result")
    kept = [i for i in range(len(outputs)) if i not in used]
    if kept:
        raise UnsupportedError(
            f"{name} computes {len(kept)} tensors that are no part of its result",
            "it keeps state between calls (a cache on itself, say), which a package would lose",
            "return them, or compile the model instead",
        )
    return tree
