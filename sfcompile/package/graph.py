"""A functional ATen graph as JSON, and back.

Why not torch's own archive of an exported program: that stores tensors and its inputs' structure with pickle in parts,
and it traces the graph anew before it writes. Our graphs are simpler than what it must carry (functional, static sizes,
ops of ATen and of ours, a few constants), so a list of calls says all, can be read with the eye, and runs no code when
it is opened: a target is looked up among torch's registered operators and nowhere else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from sfcompile.errors import PackageError, UnsupportedError
from sfcompile.package.calls import CallList, OperatorCall, Ref
from sfcompile.package.limits import dtype_of, entries, is_identifier, refused, shown, table, text
from sfcompile.package.operators import GETITEM, check_arguments, operator_of, reason_against
from sfcompile.torch_private import OpOverload

_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_NAMED_VALUES = {
    "layout": {"strided": torch.strided},
    "memory_format": {
        name: getattr(torch, name)
        for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
    },
}


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


def graph_to_json(gm: fx.GraphModule) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A graph, and the constants that its ``get_attr`` nodes read, by target.

    Raises:
        UnsupportedError: a node calls Python, or holds something that cannot be written down.
    """
    nodes: list[list[Any]] = []
    constants: dict[str, torch.Tensor] = {}
    inputs: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for i, node in enumerate(gm.graph.nodes):
        name = names[node.name] = node.name if is_identifier(node.name) else f"node_{i}"
        if node.op == "placeholder":
            nodes.append(["input", name])
            inputs.append(tensor_facts(node.meta["val"]))
        elif node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(gm)
            if not isinstance(value, torch.Tensor):
                raise _refused(node, f"it reads a {type(value).__name__}")
            constants[str(node.target)] = value
            nodes.append(["constant", name, str(node.target)])
        elif node.op == "call_function":
            args = _encode(node, list(node.args), names)
            kwargs = {key: _encode(node, value, names) for key, value in node.kwargs.items()}
            nodes.append(["call", name, _target_name(node), args, kwargs])
        elif node.op == "output":
            nodes.append(["output", name, _encode(node, node.args[0], names)])
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
    why = reason_against(node.target, (node.target.namespace,))
    if why:
        raise _refused(node, why)
    return str(node.target)


def _encode(node: fx.Node, value: Any, names: Mapping[str, str]) -> Any:
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": names[value.name]}
    if isinstance(value, (list, tuple)):
        encoded = [_encode(node, entry, names) for entry in value]
        return encoded if isinstance(value, list) else {"tuple": encoded}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for key, kind in _NAMED.items():
        if isinstance(value, kind):
            return {key: str(value).removeprefix("torch.")}
    raise _refused(node, f"it holds a {type(value).__name__}")


def libraries_of(data: Mapping[str, Any]) -> tuple[str, ...]:
    """The libraries whose operators a written graph calls, other than torch's and ours."""
    names = {node[2].split(".")[0] for node in data["nodes"] if node[0] == "call"}
    return tuple(sorted(names - {GETITEM, "aten", "streamfusion"}))


def graph_from_json(data: Any, constants: Mapping[str, torch.Tensor], libraries: tuple[str, ...] = ()) -> CallList:
    """The inverse of :func:`graph_to_json`.

    Args:
        libraries: other namespaces whose operators are allowed (operators.py).

    Raises:
        PackageError: the description is damaged, or calls what no package may call.
    """
    try:
        return _Reader(constants, libraries).read(data)
    except PackageError:
        raise
    except Exception as error:
        raise PackageError(
            f"a graph of the package cannot be read: {type(error).__name__}: {error}",
            "its text is damaged, or another version wrote it",
            "export the model again",
        ) from error


class _Reader:
    def __init__(self, constants: Mapping[str, torch.Tensor], libraries: tuple[str, ...]) -> None:
        self._constants = constants
        self._libraries = libraries
        self._calls = CallList()
        self._known: dict[str, Ref] = {}

    def read(self, data: Any) -> CallList:
        nodes = entries(table(data, "a graph").get("nodes"), "the nodes of a graph")
        facts = entries(data.get("inputs"), "the inputs of a graph")
        if not nodes or nodes[-1][0] != "output":
            raise refused("a graph has no output at its end")
        for kind, name, *rest in nodes[:-1]:
            self._define(name)
            if kind == "input":
                if len(self._calls.names) > self._calls.inputs + 1 or rest:
                    raise refused(f"input {name} stands behind another node")
                self._calls.inputs += 1
            elif kind == "constant":
                (target,) = rest
                if not isinstance(target, str) or not all(map(is_identifier, target.split("."))):
                    raise refused(f"a constant has the name {shown(target)}")
                if target not in self._constants:
                    raise refused(f"constant {target} is missing")
                self._calls.constants[self._known[name].index] = self._constants[target]
            elif kind == "call":
                self._call(name, *rest)
            else:
                raise refused(f"a graph has a node of kind {shown(kind)}")
        if len(facts) != self._calls.inputs:
            raise refused(f"a graph describes {len(facts)} inputs and has {self._calls.inputs}")
        _, name, outputs = nodes[-1]
        self._calls.outputs = list(self._decode(entries(self._untupled(outputs), "what a graph returns")))
        return self._calls

    def _define(self, name: Any) -> None:
        if not is_identifier(name) or name in self._known:
            raise refused(f"a node has the name {shown(name)}, which is no identifier or taken")
        self._known[name] = Ref(len(self._calls.names))
        self._calls.names.append(name)

    def _call(self, name: str, target: Any, args: Any, kwargs: Any) -> None:
        op = operator_of(target, self._libraries)
        own = self._known.pop(name)  # no call reads its own result
        decoded = tuple(self._decode(entry) for entry in entries(args, f"the arguments of {name}"))
        named = {key: self._decode(value) for key, value in table(kwargs, f"the keywords of {name}").items()}
        check_arguments(op, decoded, named, Ref)
        self._known[name] = own
        self._calls.calls.append(OperatorCall(own.index, name, op, decoded, named))

    @staticmethod
    def _untupled(value: Any) -> Any:
        return value["tuple"] if isinstance(value, dict) and set(value) == {"tuple"} else value

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decode(entry) for entry in entries(value, "an argument")]
        if isinstance(value, str):
            return text(value, "an argument")
        if not isinstance(value, dict):
            return value
        ((key, inner),) = value.items()
        match key:
            case "node":
                if inner not in self._known:
                    raise refused(f"a call reads {shown(inner)}, which does not stand before it")
                return self._known[inner]
            case "tuple":
                return tuple(self._decode(entry) for entry in entries(inner, "an argument"))
            case "float":
                return _SPECIAL[inner]
            case "complex":
                real, imaginary = inner
                return complex(real, imaginary)
            case "device":
                return torch.device(text(inner, "a device", 32))
            case "dtype":
                return dtype_of(inner)
            case "layout" | "memory_format":
                return _NAMED_VALUES[key][inner]
            case _:
                raise refused(f"an argument is a {shown(key)}")
