"""The table of op rules, and what a rule is.

A rule answers three questions about one op, and the same answers serve the analysis (both ways), the placement and
the rewrite:

* ``spread``: tokens are known on one operand or output; where else does the op put them?
* ``needs``:  the outputs shall be computed as shards; what must each operand be? A layout, a window (its own rows and
              a halo of others'), or None for "whole". No answer (None for the list) means: this op has no local form
              here and must be computed replicated.
* ``emit``:   write the local op.

A rule may also offer ``partial``: the output holds no tokens, but it is a sum over tokens, so every rank can add up its
own and the partial sums are all-reduced (linear attention, means over tokens). Where what ranks tell is put together
otherwise, the rule has a ``combine`` for it (extremes.py).

A rule does not move tokens: an operand that is needed in another way than it was made is moved by the rewrite. Two
families meet other ranks inside an op: attention (attention.py), and norms over tokens, which exchange statistics of a
few numbers (norm.py; ``statistics`` says how many bytes). An op without a rule is never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import fx

from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Layout, Need, OpLayouts
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView

Side = tuple[str, int]
"""``("in", operand index)`` or ``("out", output index)``."""
Spread = list[tuple[Side, Layout]]


class Rule(Protocol):
    """How one family of ops behaves on shards; see the head of the file."""

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """Where else the op puts the tokens seen at ``side``; may repeat ``side`` itself with labels to unite."""

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Per operand the layout or window it must have (None: the whole value), or None for no local form."""

    def partial(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Per operand the layout for a local op whose outputs sum over the ranks to the true one, or None."""

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """Write the local op into ``local`` and return its node."""


def statistics_bytes(rule: Rule, op: OpView, chosen: OpLayouts) -> int:
    """Bytes that every rank tells every other inside the op, beside its operands; most rules have no ``statistics``."""
    statistics = getattr(rule, "statistics", None)
    return 0 if statistics is None else int(statistics(op, chosen))


def parts_of(rule: Rule, op: OpView, chosen: OpLayouts) -> list[float] | None:
    """By rank, the part of the op's arithmetic that it does; None: as much as it owns of the tokens."""
    parts = getattr(rule, "parts", None)
    return None if parts is None else parts(op, chosen)


RULES: dict[str, Callable[[OpView], Rule | None]] = {}
"""Rule factories by the name of the op; see :func:`register_rule`."""


def register_rule(*names: str) -> Callable[[Callable[[OpView], Rule | None]], Callable[[OpView], Rule | None]]:
    """Register a rule factory for ops by their names without overload: "permute" of ATen, "mylib::my_op" of others.

    The factory sees the call and may decline with None. Open to users: registering a name again replaces its rule.
    """

    def register(factory: Callable[[OpView], Rule | None]) -> Callable[[OpView], Rule | None]:
        for name in names:
            RULES[name] = factory
        return factory

    return register


def find_rule(op: OpView) -> Rule | None:
    """The rule for a call, or None; of numbers to a number there is none, for neither has a dim that holds tokens."""
    if not any(operand.shape for operand in op.operands) and not any(op.out_shapes):
        return None
    factory = RULES.get(op.name if op.namespace == "aten" else f"{op.namespace}::{op.name}")
    if factory is None:
        import torch

        tags = op.node.target.tags  # type: ignore[union-attr]
        if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags:
            return None  # a rank that draws for its own rows alone draws other numbers
        factory = RULES["__pointwise__"]
    return factory(op)
