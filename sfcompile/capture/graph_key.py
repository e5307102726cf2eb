"""All that decides what is captured of a Dynamo graph, as a text: two graphs of one text are captured alike.

A graph that calls what a text cannot stand for has none, with the reason: a function from outside of torch, whose body
may be another one tomorrow under the same name; a body of a loop or a branch, which is a module; a value that is no
plain one. Values of weights and inputs are not in it: capture sees shapes only. Constants of the graph are, byte by
byte.
"""

from __future__ import annotations

import hashlib
import operator
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from sfcompile.capture.graph import changing_numbers, numbers, present
from sfcompile.torch_private import (
    FakeTensor,
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    autocast_state,
    is_plain,
    kernels_of_aten,
    outside_autocast,
)

MOST_BYTES = 1 << 28
"""A graph with more constants has no text: reading them all would take longer than it spares."""
_LIBRARIES = frozenset({"aten", "prims", "prim"})
_MODULES = frozenset({"torch", "_operator", "operator", "math", "builtins"})
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class NoText(Exception):
    """Why a graph, or what was made of it, has no text."""


def text_of_capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """The text of a Dynamo graph, its example inputs, and the state of this process that capture reads.

    Raises:
        NoText: it has none.
    """
    if any(map(outside_autocast, ("cpu", "cuda"))):
        raise NoText("operators have kernels for autocast from outside of torch")
    place: dict[fx.Node, int] = {}
    lines = [repr(_state()), repr(sorted(numbers(gm, inputs).items())), repr(changing_numbers(gm, inputs))]
    lines += [_input(value) for value in inputs]
    size = 0
    for node in gm.graph.nodes:
        target = node.target
        if node.op == "get_attr":
            constant = _attribute(gm, str(target))
            size += constant.nbytes
            if size > MOST_BYTES:
                raise NoText(f"its constants are more than {MOST_BYTES >> 20} MiB")
            target = _constant(constant)
        elif node.op == "call_function":
            target = name_of(target)
        elif node.op not in ("placeholder", "call_method", "output"):
            raise NoText(f"{node.name} is a {node.op}")
        args = _word((node.args, node.kwargs), place)
        lines.append(f"{node.name} = {node.op} {target} {args} {_line(node)}")
        place[node] = len(place)
    return "\n".join(lines)


def name_of(function: Any) -> str:
    """A function of torch's or of Python's own by name.

    Raises:
        NoText: it is another one.
    """
    if isinstance(function, OpOverload | OpOverloadPacket):
        packet = function if isinstance(function, OpOverloadPacket) else function._overloadpacket
        if packet._qualified_op_name.split("::")[0] in _LIBRARIES:
            return str(function)
        raise NoText(f"it calls {function}, whose body is another library's")
    module = getattr(function, "__module__", None) or getattr(getattr(function, "__objclass__", None), "__module__", "")
    name = getattr(function, "__qualname__", "")
    if isinstance(function, HigherOrderOperator) or str(module).split(".")[0] not in _MODULES or not name:
        raise NoText(f"it calls {function}, which is not torch's")
    if "<" in name:
        raise NoText(f"it calls {name} of {module}, which has no name of its own")
    if not _is_what_it_says(function):
        raise NoText(f"it calls {function}, which bears the name of {module}.{name} and is another function")
    return f"{module}.{name}"


def _is_what_it_says(function: Any) -> bool:
    """Whether a function that bears torch's or Python's name is theirs.

    ``functools.wraps(gelu)`` gives gelu's name to any function, and its body may be another one tomorrow. Where a
    function's code stands it cannot give away; what it wraps is held against the same.
    """
    if isinstance(function, types.FunctionType):
        if str(function.__globals__.get("__name__")).split(".")[0] not in _MODULES:
            return False
    elif not isinstance(function, type) and "__module__" in getattr(function, "__dict__", ()):
        return False  # partial() and objects that can be called bear no name unless somebody gave it to them
    inner = getattr(function, "__wrapped__", None)
    return inner is None or _is_what_it_says(inner)


def _attribute(gm: fx.GraphModule, path: str) -> torch.Tensor:
    value = operator.attrgetter(path)(gm)
    if not isinstance(value, torch.Tensor) or not is_plain(value) or isinstance(value, FakeTensor):
        raise NoText(f"it reads a {type(value).__name__}")
    if value.is_conj() or value.is_neg():
        raise NoText("it reads a constant that is conjugated or negated only when it is read")
    return value


def _constant(value: torch.Tensor) -> str:
    content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    facts = tuple(value.shape), value.stride(), value.dtype, value.device
    return f"{facts} {hashlib.sha256(content.data).hexdigest()}"


def _input(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {present(value)!r}"
    kind = type(value).__name__, isinstance(value, torch.nn.Parameter), value.layout
    sizes = tuple(map(present, value.shape))
    strides = tuple(map(present, value.stride())) if value.layout is torch.strided else None
    return f"{kind} {sizes} {strides} {value.dtype} {value.device} {value.requires_grad}"


def _line(node: fx.Node) -> str:
    """The user's line that a node comes from: reports name it."""
    trace = node.stack_trace or ""
    return trace[trace.rfind('File "') :].partition("\n")[0] if 'File "' in trace else ""


def _word(value: Any, place: Mapping[fx.Node, int]) -> str:
    """An argument: 1, 1.0 and True differ, nodes are numbers."""
    if isinstance(value, fx.Node):
        return f"%{place[value]}"
    if value is None or type(value) in (bool, int, float, complex, str) or isinstance(value, _NAMED):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"{'(' if isinstance(value, tuple) else '['}{' '.join(_word(entry, place) for entry in value)})"
    if isinstance(value, dict):
        return f"{{{' '.join(f'{key!r}: {_word(entry, place)}' for key, entry in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{_word((value.start, value.stop, value.step), place)}"
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return f"{type(value).__name__} {present(value)!r}"
    raise NoText(f"a call has a {type(value).__name__} among its arguments")


def _state() -> list[Any]:
    """What the process is set to, as far as calls of torch take another way for it."""
    sdpa = torch.backends.cuda
    return [
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), autocast_state(),
        torch.get_default_device(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        sdpa.flash_sdp_enabled(), sdpa.mem_efficient_sdp_enabled(), sdpa.math_sdp_enabled(), sdpa.cudnn_sdp_enabled(),
        torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, kernels_of_aten(),
    ]  # fmt: skip
