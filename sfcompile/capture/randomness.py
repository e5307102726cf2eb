"""Graphs that draw random numbers: noise made inside a model must be the same on every rank, as inputs must.

What a graph draws follows from the state of torch's generator on its device. Ranks compare that state as they compare
inputs, or get rank 0's where they get its inputs (``options={"inputs": "rank0"}``).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx


def draws(gm: fx.GraphModule) -> bool:
    """Whether a graph draws random numbers. Dropout of nothing, as in inference, draws none."""
    calls = (node for node in gm.graph.nodes if node.op == "call_function")
    return any(call_draws(node.target, node.args, node.kwargs) for node in calls)


def call_draws(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operator draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    schema = target._schema
    values = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    values |= {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)}
    values |= kwargs
    if "dropout_p" in values:  # attention
        return bool(values["dropout_p"])
    if "dropout" in schema.name:
        return bool(values.get("p", True)) and values.get("train", True) is not False
    return bool(values.get("training", True))


def generator_state(device: torch.device) -> torch.Tensor:
    """The state of the generator that draws for a device: bytes, on the CPU."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(device: torch.device, state: torch.Tensor) -> None:
    """Draw from here on as from that state."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state.cpu().clone(), device)
    else:
        torch.set_rng_state(state.clone())  # torch crashes on a state that lies inside a larger tensor


def state_mark(device: torch.device) -> torch.Tensor:
    """One number that tells states apart, to be compared among a call's inputs (which are compared by samples)."""
    return torch.tensor([zlib.crc32(generator_state(device).numpy().tobytes())], dtype=torch.int64)
