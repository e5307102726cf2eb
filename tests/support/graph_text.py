"""Graphs as a few lines of text, so that a test of a pass shows the graph before and after.

    x: f32[1,8,4] = input
    y: f32[1,8,4] = aten.relu(x)
    a: (f32[1,8,2], f32[1,8,2]) = aten.split.Tensor(y, 2, -1)
    b: f32[1,8,2] = a[0]
    return b

A line gives the name of a node, the type of its value and the call (``constant``: a tensor of the module, of zeros
here). The parser runs each call on fake values, so that nodes carry ``meta["val"]`` as after a capture, and refuses a
type that is not what the call gives. Names of ops are those of ``torch.ops``, with the overload unless it is the
default one. ``text_of`` writes the same form, which parses to an equal graph.
"""

from __future__ import annotations

import ast
import operator
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sfcompile.torch_private import FakeTensorMode, OpOverload

TYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "bool": torch.bool,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass
class Parsed:
    """A graph as a capture gives it: its module and the mode of its fake values."""

    gm: fx.GraphModule
    mode: FakeTensorMode

    def __getitem__(self, name: str) -> fx.Node:
        return next(node for node in self.gm.graph.nodes if node.name == name)


def parse(text: str) -> Parsed:
    """The graph of a text.

    Raises:
        ValueError: a line that is not of the form, or whose type is not that of its value; gives the line.
    """
    graph, mode, root = fx.Graph(), FakeTensorMode(allow_non_fake_inputs=True), torch.nn.Module()
    nodes: dict[str, fx.Node] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("return"):
            names = [name.strip() for name in line.removeprefix("return").split(",")]
            graph.output(tuple(nodes[name] for name in names))
            break
        head, _, call = line.partition(" = ")
        name, _, kind = head.partition(": ")
        if not call or not kind:
            raise ValueError(f"not of the form 'name: type = call': {line}")
        if call in ("input", "constant"):
            dtype, _, sizes = kind.removesuffix("]").partition("[")
            value = torch.zeros([int(size) for size in sizes.split(",") if size], dtype=TYPES[dtype])
            node = graph.create_node("placeholder" if call == "input" else "get_attr", name, name=name)
            node.meta["val"] = mode.from_tensor(value)
            if call == "constant":
                setattr(root, name, value)
        else:
            node = _call_node(graph, mode, nodes, name, call)
        if node.name != name or type_of(node.meta["val"]) != kind:
            raise ValueError(f"this is {node.name}: {type_of(node.meta['val'])}, not what the line says: {line}")
        nodes[name] = node
    graph.lint()
    return Parsed(fx.GraphModule(root, graph), mode)


def _call_node(graph: fx.Graph, mode: FakeTensorMode, nodes: Mapping[str, fx.Node], name: str, call: str) -> fx.Node:
    tree = ast.parse(call, mode="eval").body
    target: Any = operator.getitem
    args: list[Any]
    if isinstance(tree, ast.Subscript):
        args, kwargs = [_value(tree.value, nodes), _value(tree.slice, nodes)], {}
    elif isinstance(tree, ast.Call):
        target = _op(ast.unparse(tree.func))
        args = [_value(arg, nodes) for arg in tree.args]
        kwargs = {str(keyword.arg): _value(keyword.value, nodes) for keyword in tree.keywords}
    else:
        raise ValueError(f"neither a call nor one of its results: {call}")
    node = graph.create_node("call_function", target, tuple(args), kwargs, name=name)
    fake_args, fake_kwargs = fx.map_arg((tuple(args), kwargs), lambda value: value.meta["val"])
    with mode:
        node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node


def _op(name: str) -> Any:
    namespace, op, *overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), overload[0] if overload else "default")


def _value(tree: ast.expr, nodes: Mapping[str, fx.Node]) -> Any:
    """An argument: a node, a list of arguments, a dtype, or a constant of Python."""
    if isinstance(tree, ast.Name):
        return nodes[tree.id]
    if isinstance(tree, ast.List | ast.Tuple):
        return [_value(item, nodes) for item in tree.elts]
    if isinstance(tree, ast.Attribute):
        return getattr(torch, tree.attr)
    return ast.literal_eval(tree)


def type_of(value: Any) -> str:
    """The type of a fake value: ``f32[2,3]``, or those of several in brackets."""
    if isinstance(value, torch.Tensor):
        return f"{NAMES[value.dtype]}[{','.join(str(int(size)) for size in value.shape)}]"
    return f"({', '.join(map(type_of, value))})"


def text_of(graph: fx.Graph) -> str:
    """A graph in the form of the head of the file."""
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {', '.join(value.name for value in node.all_input_nodes)}")
        else:
            call = {"placeholder": "input", "get_attr": "constant"}.get(node.op) or _call(node)
            lines.append(f"{node.name}: {type_of(node.meta['val'])} = {call}")
    return "\n".join(lines) + "\n"


def _call(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return f"{node.args[0]}[{node.args[1]}]"
    assert isinstance(node.target, OpOverload), f"{node.format_node()} has no form as text"
    args = [_text(arg) for arg in node.args] + [f"{name}={_text(arg)}" for name, arg in node.kwargs.items()]
    return f"{str(node.target).removesuffix('.default')}({', '.join(args)})"


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, torch.device):
        return repr(str(value))
    return value.name if isinstance(value, fx.Node) else repr(value)


def same(graph: fx.Graph, text: str) -> None:
    """Assert that a graph reads as a text; indentation of the text is free."""
    wanted = textwrap.dedent(text).strip() + "\n"
    assert text_of(graph) == wanted, f"it reads:\n{text_of(graph)}"
