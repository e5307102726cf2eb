"""One graph node as the rules see it: tensor operands in order, arguments by schema name, outputs in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sfcompile.passes.graph.layout import Shape
from sfcompile.torch_private import OpOverload

FakeMode = Any
"""The fake tensor mode of a capture: a private torch type, named only in sfcompile/torch_private.py."""


@dataclass(frozen=True)
class Operand:
    """A tensor argument: its place among the operands, the node that computes it, its global shape."""

    index: int
    node: fx.Node
    shape: Shape

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)


def value_of(node: fx.Node) -> Any:
    """The fake value that capture recorded for a node."""
    return node.meta.get("val")


def shape_of(node: fx.Node) -> Shape:
    """Global shape of a tensor-valued node."""
    return tuple(int(size) for size in node.meta["val"].shape)


def is_tensor(node: fx.Node) -> bool:
    """Whether a node is one tensor (and not a tuple, a number or nothing)."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_getitem(node: fx.Node) -> bool:
    """Whether a node only picks one output of a node with several."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


@dataclass
class OpView:
    """A call of an ATen op.

    ``args`` maps schema argument names to values (defaults filled in), with every tensor replaced by its
    :class:`Operand`; ``outputs[j]`` is the node that holds output ``j``, or None where nothing reads it.
    """

    node: fx.Node
    name: str
    operands: list[Operand]
    args: dict[str, Any]
    outputs: list[fx.Node | None]
    out_shapes: list[Shape] = field(default_factory=list)

    @classmethod
    def of(cls, node: fx.Node) -> OpView | None:
        """View a node, or None if it is not an ATen call with tensor outputs."""
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            return None
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            outputs: list[fx.Node | None] = [node]
            shapes = [shape_of(node)]
        elif isinstance(value, (tuple, list)) and value and isinstance(value[0], torch.Tensor):
            outputs = [None] * len(value)
            for user in node.users:
                if is_getitem(user):
                    outputs[int(user.args[1])] = user  # type: ignore[arg-type]
            if any(output is not None and not is_tensor(output) for output in outputs):
                return None  # a number among its results is read
            shapes = [tuple(int(size) for size in v.shape) if isinstance(v, torch.Tensor) else () for v in value]
        else:
            return None
        operands: list[Operand] = []

        def wrap(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                if not is_tensor(arg):
                    return arg
                operands.append(Operand(len(operands), arg, shape_of(arg)))
                return operands[-1]
            if isinstance(arg, (tuple, list)):
                return [wrap(item) for item in arg]
            return arg

        args: dict[str, Any] = {}
        schema = node.target._schema.arguments
        for position, spec in enumerate(schema):
            if position < len(node.args):
                args[spec.name] = wrap(node.args[position])
            elif spec.name in node.kwargs:
                args[spec.name] = wrap(node.kwargs[spec.name])
            else:
                args[spec.name] = spec.default_value if spec.has_default_value() else None
        return cls(node, node.target._schema.name.split("::")[-1], operands, args, outputs, shapes)

    @property
    def namespace(self) -> str:
        """Library of the op, e.g. ``aten``."""
        return str(self.node.target._schema.name).split("::")[0]  # type: ignore[union-attr]

    def dim(self, name: str, ndim: int) -> int:
        """An int dim argument, wrapped to ``0 <= dim < ndim``."""
        return int(self.args[name]) % max(ndim, 1)

    def dims(self, name: str, ndim: int) -> tuple[int, ...]:
        """A dim-list argument (an int, a list, or None / empty for all dims), wrapped and sorted."""
        value = self.args.get(name)
        if isinstance(value, int):
            value = [value]
        if value is None or len(value) == 0:
            return tuple(range(ndim))
        return tuple(sorted(int(dim) % max(ndim, 1) for dim in value))

    def rebuild(self, operands: list[fx.Node]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of the node with its tensors replaced, in operand order."""
        replacements = iter(operands)

        def swap(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                return next(replacements) if is_tensor(arg) else arg
            if isinstance(arg, (tuple, list)):
                return [swap(item) for item in arg]
            return arg

        # The order of schema arguments is the order in which `of` numbered the operands.
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for position, spec in enumerate(self.node.target._schema.arguments):  # type: ignore[union-attr]
            if position < len(self.node.args):
                args.append(swap(self.node.args[position]))
            elif spec.name in self.node.kwargs:
                kwargs[spec.name] = swap(self.node.kwargs[spec.name])
        return args, kwargs
