"""A rank's graph as plain values, for JSON, and back: calls of torch's operators and ours, and what their values are
like.

What it does not hold is what a compiler does not read: where in the user's source a node comes from. What a graph in
another process could not have in the same way has no text: a function of Python's, a put that computes, a stretch that
runs as it is (both are looked up in tables of this process), a value that is no plain tensor.
"""

from __future__ import annotations

import base64
import math
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import fx

from sfcompile.capture.graph_key import NoText
from sfcompile.torch_private import FakeTensor, FakeTensorMode, OpOverload, is_plain, module_of

MOST_BYTES = 1 << 25
"""A graph with more constants has no text."""
_LIBRARIES = frozenset({"aten", "prims", "streamfusion"})
_OF_THIS_PROCESS = frozenset({"streamfusion::put_fused", "streamfusion::opaque"})
_PICK = "getitem"
_NAMED: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def graph_to_plain(gm: fx.GraphModule) -> dict[str, Any]:
    """A graph as lists, dicts, texts and numbers.

    Raises:
        NoText: it holds what cannot be written down.
    """
    place: dict[fx.Node, int] = {}
    likes: dict[Hashable, int] = {}
    nodes: list[list[Any]] = []
    constants: dict[str, list[Any]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            target = str(node.target)
            constants[target] = _constant(gm, target, sum(len(each[3]) for each in constants.values()))
        elif node.op == "call_function":
            target = _target(node.target)
        elif node.op in ("placeholder", "output"):
            target = str(node.target)
        else:
            raise NoText(f"{node.name} is a {node.op}")
        args = [_word(entry, place) for entry in node.args]
        kwargs = {key: _word(entry, place) for key, entry in node.kwargs.items()}
        like = -1 if node.op == "output" else likes.setdefault(_like(node), len(likes))
        nodes.append([node.op, node.name, target, args, kwargs, like])
        place[node] = len(place)
    return {"nodes": nodes, "likes": [_listed(like) for like in likes], "constants": constants}


def graph_from_plain(plain: Mapping[str, Any], mode: FakeTensorMode) -> fx.GraphModule:
    """The graph, with fake values of ``mode``. Inputs lie in memory of their own each; other values need not.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, RuntimeError: it is no such text.
    """
    root, graph = torch.nn.Module(), fx.Graph()
    for name, (dtype, shape, stride, content, device) in plain["constants"].items():
        raw = torch.frombuffer(bytearray(base64.b64decode(content, validate=True)) or bytearray(8), dtype=torch.uint8)
        value = raw[: math.prod(shape) * _dtype(dtype).itemsize].view(_dtype(dtype)).view(shape)
        laid = torch.empty_strided(shape, stride, dtype=value.dtype).copy_(value).to(device)
        root.register_buffer(name, laid, persistent=False)
    alike: dict[int, Any] = {}
    nodes: list[fx.Node] = []
    for op, name, target, args, kwargs, like in plain["nodes"]:
        read = tuple(_read(entry, nodes) for entry in args)
        named = {key: _read(entry, nodes) for key, entry in kwargs.items()}
        called: Callable[..., Any] | str = _operator(target) if op == "call_function" else target
        node = graph.create_node(op, called, read, named, name)
        if node.name != name:
            raise ValueError(f"node {name} is called {node.name}")
        nodes.append(node)
        if op == "get_attr":
            node.meta["val"] = mode.from_tensor(getattr(root, target))
        elif op == "placeholder":
            node.meta["val"] = _value(plain["likes"][like], mode)
        elif op != "output":
            if like not in alike:
                alike[like] = _value(plain["likes"][like], mode)
            node.meta["val"] = alike[like]
    graph.lint()
    return module_of(root, graph, "StreamFusionRank")


def _constant(gm: fx.GraphModule, name: str, before: int) -> list[Any]:
    value = operator.attrgetter(name)(gm)
    if not isinstance(value, torch.Tensor) or not is_plain(value) or isinstance(value, FakeTensor) or "." in name:
        raise NoText(f"it reads a {type(value).__name__} as {name}")
    if value.is_conj() or value.is_neg():
        raise NoText(f"{name} is conjugated or negated only when it is read")
    if before + value.nbytes > MOST_BYTES:
        raise NoText(f"its constants are more than {MOST_BYTES >> 20} MiB")
    content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    encoded = base64.b64encode(content).decode()
    return [_name(value.dtype), list(value.shape), list(value.stride()), encoded, str(value.device)]


def _target(target: Any) -> str:
    if target is operator.getitem:
        return _PICK
    if not isinstance(target, OpOverload) or target.namespace not in _LIBRARIES:
        raise NoText(f"it calls {target}, whose body may be another one tomorrow")
    if target.name() in _OF_THIS_PROCESS:
        raise NoText(f"it calls {target}, which looks up what this process holds")
    return str(target)


def _operator(text: str) -> Callable[..., Any]:
    if text == _PICK:
        return operator.getitem
    library, name, overload = text.split(".")
    if library not in _LIBRARIES:
        raise ValueError(f"{text} is no operator of a rank's graph")
    op = getattr(getattr(getattr(torch.ops, library), name), overload)
    if not isinstance(op, OpOverload):
        raise ValueError(f"{text} is no operator")
    return op


def _like(node: fx.Node) -> Hashable:
    return _like_of(node.meta.get("val"), node)


def _like_of(value: Any, node: fx.Node) -> Hashable:
    if isinstance(value, tuple | list):
        return (type(value) is list, *(_like_of(entry, node) for entry in value))
    if value is None or type(value) in (bool, int):
        return "=", value
    if type(value) is not FakeTensor or value.layout is not torch.strided or value.is_conj() or value.is_neg():
        raise NoText(f"the value of {node.name} is a {type(value).__name__} of a kind that is not written down")
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    if not all(type(size) is int for size in sizes) or value.requires_grad:
        raise NoText(f"the value of {node.name} has no plain sizes")
    return _name(value.dtype), tuple(value.shape), value.stride(), value.storage_offset(), str(value.device)


def _listed(like: Any) -> Any:
    return [_listed(entry) for entry in like] if isinstance(like, tuple) else like


def _value(like: Any, mode: FakeTensorMode) -> Any:
    if isinstance(like[0], bool):
        entries = [_value(entry, mode) for entry in like[1:]]
        return entries if like[0] else tuple(entries)
    if like[0] == "=":
        return like[1]
    dtype, shape, stride, offset, device = like
    with mode:
        if not offset:
            return torch.empty_strided(shape, stride, dtype=_dtype(dtype), device=device)
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0
        return torch.empty(offset + last + 1, dtype=_dtype(dtype), device=device).as_strided(shape, stride, offset)


def _word(value: Any, place: Mapping[fx.Node, int]) -> Any:
    """An argument; what JSON lacks is a dict with one entry."""
    if isinstance(value, fx.Node):
        return {"node": place[value]}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [_word(entry, place) for entry in value]}
    if isinstance(value, list):
        return [_word(entry, place) for entry in value]
    if type(value) is complex:
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, named in _NAMED.items():
        if isinstance(value, named):
            return {kind: _name(value)}
    raise NoText(f"a call has a {type(value).__name__} among its arguments")


def _read(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(entry, nodes) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "node":
            return nodes[content]
        case "tuple":
            return tuple(_read(entry, nodes) for entry in content)
        case "float":
            return float(content)
        case "complex":
            return complex(*content)
        case "device":
            return torch.device(content)
    named = getattr(torch, content)
    if not isinstance(named, _NAMED[kind]):
        raise ValueError(f"{content} is no {kind}")
    return named


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return dtype
