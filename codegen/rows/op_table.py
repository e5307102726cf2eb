"""The table of ops that row programs know, and what their rules (row_views.py, row_math.py) read of a node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from sfcompile.codegen.rows.indices import Index
from sfcompile.codegen.rows.rows import CannotFollowError, Conditions, Place, RowText, Value

Op = Callable[[RowText, fx.Node, Place, Conditions], Value]
"""A rule: the value of a node at a place, where some conditions hold."""
OPS: dict[str, Op] = {}
"""The rule of an op, by name_of a node."""
POINTWISE: set[str] = set()
VIEWS: set[str] = set()
"""Names of ops that cost nothing to do twice."""


def register(*names: str, view: bool = False, pointwise: bool = False) -> Callable[[Op], Op]:
    """Add a rule to the table under some names: ``@register("neg.default", pointwise=True)``."""

    def add(op: Op) -> Op:
        for name in names:
            OPS[name] = op
            if view:
                VIEWS.add(name)
            if pointwise:
                POINTWISE.add(name)
        return op

    return add


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Sizes of a node's value, as plain ints."""
    return tuple(int(size) for size in node.meta["val"].shape)


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an ATen call by its name in the schema."""
    for i, entry in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if entry.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, entry.default_value)
    raise CannotFollowError(node, f"it has no argument {name}")


def first_of(node: fx.Node) -> fx.Node:
    """The node that an op reads first."""
    first = node.args[0]
    if not isinstance(first, fx.Node):
        raise CannotFollowError(node, "its first argument is no tensor")
    return first


def dim_of(value: Any, rank: int) -> int:
    """A dim counted from the front; negative ones count from the end."""
    return int(value) % rank


def broadcast(place: Place, source: fx.Node) -> Place:
    """Where in ``source`` the element lies that broadcasting brings to a place."""
    shape = shape_of(source)
    last = place[len(place) - len(shape) :]
    return tuple(Index() if size == 1 else at for at, size in zip(last, shape, strict=True))
