"""What no capture can hold, found before the trace: such a graph runs as it is, whole on every rank.

A captured graph is one of plain tensors, and computes on this rank's tokens without a backward. Derivatives taken
through it would be those of one rank's share, and a tensor that is not what it looks like (a wrapper, a sparse or
nested one) would be planned as if it were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sfcompile.capture.wrappers import PutTogether
from sfcompile.errors import UnsupportedError, source_line
from sfcompile.runtime.rank.sharded_value import ShardedValue
from sfcompile.runtime.rank.sharded_weight import ShardedWeight
from sfcompile.torch_private import OpOverload, OpOverloadPacket, is_plain, other_memory, set_grad_enabled

_OURS = (ShardedWeight, ShardedValue)
_TRANSFORMS = ("_grad_increment_nesting", "_jvp_increment_nesting")
"""Names of the calls in a Dynamo graph by which ``torch.func`` begins to differentiate."""


def refuse_odd_tensors(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Refuse inputs that are no plain dense tensors.

    Raises:
        UnsupportedError: one is a wrapper with a dispatch of its own, sparse, nested or quantized.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=False):
        if isinstance(value, torch.Tensor) and not is_plain(value) and not isinstance(value, _OURS):
            raise UnsupportedError(
                f"input {node.name!r} is a {type(value).__name__} with layout {value.layout} and dtype {value.dtype}",
                "tokens are divided, and travel, in plain dense tensors only",
                "give the model a dense tensor (dequantize(), to_dense(), to_padded_tensor()) to have it sharded",
            )


def refuse_wrapped_outputs(gm: fx.GraphModule, outputs: Sequence[Any]) -> None:
    """Refuse results that a graph hands out inside a wrapper which its inputs came in (wrappers.py).

    Raises:
        UnsupportedError: one is.
    """
    wrappers = {node.target.cls for node in gm.graph.nodes if isinstance(node.target, PutTogether)}
    for place, value in enumerate(outputs):
        if type(value) in wrappers:
            raise UnsupportedError(
                f"output {place} is a {type(value).__name__}",
                "a graph of ranks returns plain dense tensors only",
                "unpack it before it leaves the compiled function",
            )


def refuse_other_memory(gm: fx.GraphModule) -> None:
    """Refuse a graph that gives a tensor other memory (``weight.data = ...``, as offloading hooks do).

    Raises:
        UnsupportedError: it does; a trace would take what the tensor holds now for a constant.
    """
    for node in gm.graph.nodes:
        if node.target in other_memory:
            raise UnsupportedError(
                "the graph gives a tensor other memory",
                "a captured graph is a function of its inputs, which stay where they are",
                "bring weights and take them away outside of what is compiled (compile what the hooks stand around), "
                "or let this graph run unsharded",
                node=node.name,
                source=source_line(node.stack_trace),
            )


_RESERVED = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")


def unseen_write(gm: fx.GraphModule) -> fx.Node | None:
    """A call of a library's op that writes, though its schema says that it writes to nothing: it is the first to be
    given memory that was only reserved, and others read that afterwards. A trace would give them what it held before.
    """
    first: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        for value in node.all_input_nodes:
            first.setdefault(value, node)
    for value, node in first.items():
        name = value.target if value.op == "call_method" else getattr(value.target, "__name__", "")
        shown = value.meta.get("example_value")
        if name not in _RESERVED or len(value.users) < 2 or isinstance(shown, torch.Tensor) and not shown.numel():
            continue
        target = node.target.default if isinstance(node.target, OpOverloadPacket) else node.target
        if isinstance(target, OpOverload) and target.namespace != "aten" and not target._schema.is_mutable:
            return node
    return None


def refuse_unseen_writes(gm: fx.GraphModule) -> None:
    """Refuse a graph with a call that :func:`unseen_write` finds.

    Raises:
        UnsupportedError: there is one.
    """
    node = unseen_write(gm)
    if node is not None:
        raise UnsupportedError(
            f"{node.target} is given memory that nobody has written to, and its schema says that it writes to nothing",
            "others read that memory afterwards: it does write, and a compiler would give them what was there before",
            "declare what it writes (mutates_args=...), or wrap it in an op that returns the result; this graph "
            "runs eagerly and whole on every rank",
            node=node.name,
            source=source_line(node.stack_trace),
        )


def refuse_derivatives(gm: fx.GraphModule) -> None:
    """Refuse a Dynamo graph that takes derivatives, or turns gradients on for results that somebody may differentiate.

    Dynamo's check of the caller's mode does not see the second: a model may say ``torch.enable_grad()`` itself.

    Raises:
        UnsupportedError: it does.
    """
    on = False
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.target is torch.autograd.grad or name in _TRANSFORMS:
            raise _derivatives("the graph takes derivatives", node)
        on = on or (node.target is set_grad_enabled and bool(node.args[0]))
        if node.op == "output" and on:
            for value in node.all_input_nodes:
                if getattr(value.meta.get("example_value"), "requires_grad", False):
                    raise _derivatives("the graph turns gradients on, and its result wants them", value)


def _derivatives(what: str, node: fx.Node) -> UnsupportedError:
    return UnsupportedError(
        what,
        "a sharded graph computes on this rank's tokens: a derivative through it would be that of one rank's share",
        "leave enable_grad() out, or use model.requires_grad_(False), where no derivative is wanted",
        node=node.name,
        source=source_line(node.stack_trace),
    )
