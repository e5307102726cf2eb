"""A functional ATen graph as JSON, and back.

Why not torch's own archive of an exported program: that stores tensors and its inputs' structure with pickle in parts,
and it traces the graph anew before it writes. Our graphs are simpler than what it must carry (functional, static sizes,
ops of ATen and of ours, a few constants), so a list of calls says all, can be read with the eye, and runs no code when
it is opened: a target is looked up among torch's registered operators and nowhere else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from sfcompile.errors import PackageError, UnsupportedError
from sfcompile.torch_private import OpOverload

GETITEM = "getitem"
_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_NAMED = {
    "dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format,
}  # fmt: skip


def tensor_facts(value: torch.Tensor) -> dict[str, Any]:
    """Shape, strides and dtype of a tensor, for JSON."""
    return {
        "shape": [int(n) for n in value.shape],
        "stride": [int(n) for n in value.stride()],
        "dtype": str(value.dtype).removeprefix("torch."),
    }


def empty_of(facts: Mapping[str, Any]) -> torch.Tensor:
    """An uninitialised tensor of some :func:`tensor_facts`; fake under a fake mode."""
    return torch.empty_strided(facts["shape"], facts["stride"], dtype=dtype_of(facts["dtype"]))


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name such as "float32".

    Raises:
        PackageError: there is none.
    """
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise PackageError(f"torch has no dtype {name!r}", "the package is damaged", "export the model again")
    return found


def graph_to_json(gm: fx.GraphModule) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A graph, and the constants that its ``get_attr`` nodes read, by target.

    Raises:
        UnsupportedError: a node calls Python, or holds something that cannot be written down.
    """
    nodes: list[list[Any]] = []
    constants: dict[str, torch.Tensor] = {}
    inputs: list[dict[str, Any]] = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            nodes.append(["input", node.name])
            inputs.append(tensor_facts(node.meta["val"]))
        elif node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(gm)
            if not isinstance(value, torch.Tensor):
                raise _refused(node, f"it reads a {type(value).__name__}")
            constants[str(node.target)] = value
            nodes.append(["constant", node.name, str(node.target)])
        elif node.op == "call_function":
            args, kwargs = _encode(node, list(node.args)), {key: _encode(node, v) for key, v in node.kwargs.items()}
            nodes.append(["call", node.name, _target_name(node), args, kwargs])
        elif node.op == "output":
            nodes.append(["output", node.name, _encode(node, node.args[0])])
        else:
            raise _refused(node, f"it is a {node.op}")
    return {"inputs": inputs, "nodes": nodes}, constants


def _refused(node: fx.Node, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"node {node.name} ({node.target}) cannot be exported: {why}",
        "a package holds calls of torch's operators and plain values only, so that loading it runs no foreign code",
        "compile this model with backend='streamfusion' instead",
        node=node,
    )


def _target_name(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return GETITEM
    if not isinstance(node.target, OpOverload):
        raise _refused(node, "it calls a Python function")
    if node.target.name().startswith("streamfusion::opaque"):
        raise _refused(node, "it runs a stretch of Python that no functional graph can hold")
    return str(node.target)


def _encode(node: fx.Node, value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        encoded = [_encode(node, entry) for entry in value]
        return encoded if isinstance(value, list) else {"tuple": encoded}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for key, kind in _NAMED.items():
        if isinstance(value, kind):
            return {key: str(value).removeprefix("torch.")}
    raise _refused(node, f"it holds a {type(value).__name__}")


def graph_from_json(data: Mapping[str, Any], constants: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """The inverse of :func:`graph_to_json`.

    Raises:
        PackageError: the description is damaged, or names an operator that torch does not have here.
    """
    graph, root = fx.Graph(), torch.nn.Module()
    known: dict[str, fx.Node] = {}
    try:
        for kind, name, *rest in data["nodes"]:
            if kind == "input":
                known[name] = graph.placeholder(name)
            elif kind == "constant":
                root.register_buffer(rest[0], constants[rest[0]])
                known[name] = graph.get_attr(rest[0])
            elif kind == "call":
                target, args, kwargs = rest
                decode = _decoder(known)
                call = graph.call_function(
                    _target(target), tuple(decode(args)), {k: decode(v) for k, v in kwargs.items()}
                )
                known[name] = call
            elif kind == "output":
                graph.output(_decoder(known)(rest[0]))
            else:
                raise ValueError(f"a node of kind {kind!r}")
        graph.lint()
    except PackageError:
        raise
    except Exception as error:
        raise PackageError(
            f"a graph of the package cannot be read: {type(error).__name__}: {error}",
            "its text is damaged, or another version wrote it",
            "export the model again",
        ) from error
    return fx.GraphModule(root, graph, "StreamFusionRank")


def _target(name: str) -> Callable[..., Any]:
    if name == GETITEM:
        return operator.getitem
    found: Any = torch.ops
    for part in str(name).split("."):
        found = getattr(found, part, None)
        if found is None:
            break
    if not isinstance(found, OpOverload):
        raise PackageError(
            f"operator {name!r} is not registered in this process",
            "the package calls it; operators outside ATen come from a library that must be imported first",
            "import the library that defines it before sfcompile.load, or export with this version of torch",
        )
    return found


def _decoder(known: Mapping[str, fx.Node]) -> Callable[[Any], Any]:
    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        ((key, inner),) = value.items()
        match key:
            case "node":
                return known[inner]
            case "tuple":
                return tuple(decode(entry) for entry in inner)
            case "float":
                return _SPECIAL[inner]
            case "complex":
                return complex(*inner)
            case "device":
                return torch.device(inner)
            case _:
                found = getattr(torch, inner)
                if not isinstance(found, _NAMED[key]):
                    raise ValueError(f"{inner!r} is no {key}")
                return found

    return decode
