"""Attention that a library offers as a Python function, not as an op: Dynamo is told to keep its calls whole.

Traced as it stands, such a function becomes kernels of which nothing is known (SageAttention's quantise queries and
keys by one kernel and attend by another), or it breaks the graph. Its heads are independent: so a call becomes one op
(runtime/rank/library_calls.py), which ranks run on all tokens of some of the heads (passes/rules/per_head.py), with the
library's own kernels. The model is not touched, and a graph that is not sharded calls the function as it would have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sfcompile.runtime.rank.library_calls import CALLS, LibraryCall, TensorAt
from sfcompile.torch_breaks import KeptWhole
from sfcompile.torch_private import autocast_state

Letters = tuple[Mapping[str, str], str]
FunctionReader = Callable[[Mapping[str, Any]], Letters | None]
"""From a function's arguments by name (defaults filled in) to the letters of its tensors' dims, q first and v last of
those with D, and of its result, as in :class:`sfcompile.passes.rules.per_head.Dims`; None: the call is traced."""

FUNCTIONS: dict[str, FunctionReader] = {}
"""By ``package.function``: the first part of the module that it is defined in, and its name."""


def reader_of(function: object) -> FunctionReader | None:
    """What is known of a function that a model calls."""
    module, name = getattr(function, "__module__", None) or "", getattr(function, "__name__", "")
    return FUNCTIONS.get(f"{module.partition('.')[0]}.{name}")


def as_library_call(
    function: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any]
) -> tuple[list[torch.Tensor], str] | None:
    """A call as the tensors and the key of the op that stands for it.

    Args:
        args, kwargs: of the function: tensors (fake ones) and constants.

    Returns:
        None where the reader does not accept the call, or an argument does not fit.
    """
    reader = reader_of(function)
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named["**"] = bound.arguments[name]
        elif parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            return None
        else:
            named[name] = bound.arguments[name]
    known = reader(named) if reader is not None else None
    rest = named.get("**", {})
    if known is None or any(isinstance(value, torch.Tensor) for value in rest.values()):
        return None
    letters, out = known
    names = [name for name, value in named.items() if isinstance(value, torch.Tensor)]
    if not set(letters) <= {*names} or any(named[name].dim() != len(text) for name, text in letters.items()):
        return None
    order = [*letters, *(name for name in names if name not in letters)]
    places = {name: TensorAt(order.index(name)) if name in order else value for name, value in named.items()}
    call = LibraryCall(function, places, {order.index(n): text for n, text in letters.items()}, out, autocast_state())
    return [named[name] for name in order], _keyed(call)


def _keyed(call: LibraryCall) -> str:
    """The key of a call: the same for the same call in every process."""
    function = call.function
    key = f"{function.__module__}.{function.__qualname__}{dict(call.arguments)} {call.around}"
    number = 1
    while CALLS.setdefault(name := key if number == 1 else f"{key} #{number}", call) != call:
        number += 1
    return name


def _sage(args: Mapping[str, Any]) -> Letters | None:
    """SageAttention: tensor_layout "HND" is [B, H, L, D], "NHD" is [B, L, H, D]."""
    text = {"HND": "BHLD", "NHD": "BLHD"}.get(args.get("tensor_layout", ""), "")
    return None if args.get("return_lse") or not text else (dict.fromkeys("qkv", text), text)


def _sage_packed(args: Mapping[str, Any]) -> Letters | None:
    """The same of sequences laid end to end: [tokens, H, D], with lengths that all heads share."""
    lengths = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), "-")
    return ({**dict.fromkeys("qkv", "LHD"), **lengths}, "LHD") if lengths.keys() <= args.keys() else None


FUNCTIONS |= dict.fromkeys(
    (
        "sageattention.sageattn",
        "sageattention.sageattn_qk_int8_pv_fp16_triton",
        "sageattention.sageattn_qk_int8_pv_fp16_cuda",
        "sageattention.sageattn_qk_int8_pv_fp8_cuda",
        "sageattention.sageattn_qk_int8_pv_fp8_cuda_sm90",
    ),
    _sage,
)
FUNCTIONS["sageattention.sageattn_varlen"] = _sage_packed


def _as_op(
    function: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, list[Any], str] | None:
    call = as_library_call(function, args, kwargs)
    return None if call is None else (torch.ops.streamfusion.library_call.default, *call)


KEPT = KeptWhole(lambda function: reader_of(function) is not None, _as_op)
"""What Dynamo asks (sfcompile/torch_breaks.py)."""
