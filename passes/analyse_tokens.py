"""Find the token axes: seed a label per query and key position of every attention and follow them through the graph.

Where two vectors of labels meet on the same place of the same value they are united element by element, so joint
text and image axes, segments, registers and references come out by themselves; no model is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from sfcompile.passes.analyse_attention import Site
from sfcompile.passes.labels import LabelSpace
from sfcompile.passes.layout import Key, Layout
from sfcompile.passes.op_rules import Rule, Side, find_rule
from sfcompile.passes.op_view import OpView
from sfcompile.runtime.ops import COMMUNICATION


@dataclass
class Tokens:
    """What the analysis found.

    ``layouts[value][key]`` are the places where tokens sit in a value; ``ops`` the calls that have a rule;
    ``clashes`` the ops at which two vectors could not be united (a shifted copy of the same tokens).
    """

    space: LabelSpace = field(default_factory=LabelSpace)
    layouts: dict[fx.Node, dict[Key, Layout]] = field(default_factory=dict)
    views: dict[fx.Node, OpView] = field(default_factory=dict)
    rules: dict[fx.Node, Rule] = field(default_factory=dict)
    clashes: list[fx.Node] = field(default_factory=list)


def seeds_of(sites: Sequence[Site], axis: str = "tokens") -> list[tuple[fx.Node, int]]:
    """Where to start: the query dim and the key dim of every attention, or with ``axis="batch"`` its batch dim.

    The batch axis is followed by the same rules: what they call tokens are then samples.
    """
    if axis == "batch":
        return [(site.q, 0) for site in sites if site.q.meta["val"].dim() == 4]
    return [(value, value.meta["val"].dim() - 2) for site in sites for value in (site.q, site.k)]


def analyse_tokens(graph: fx.Graph, seeds: Sequence[tuple[fx.Node, int]]) -> Tokens:
    """Label the token positions of every value reachable from the seeds ``(value, dim)``."""
    tokens = Tokens()
    readers: dict[fx.Node, list[tuple[fx.Node, Side]]] = {}
    for node in graph.nodes:
        op = OpView.of(node)
        if op is None or node.target in COMMUNICATION:
            continue
        tokens.views[node] = op
        rule = find_rule(op)
        if rule is None:
            continue
        tokens.rules[node] = rule
        for operand in op.operands:
            readers.setdefault(operand.node, []).append((node, ("in", operand.index)))
        for j, output in enumerate(op.outputs):
            if output is not None:
                readers.setdefault(output, []).append((node, ("out", j)))

    queue: deque[tuple[fx.Node, Layout]] = deque()

    def add(value: fx.Node, layout: Layout, origin: fx.Node) -> None:
        known = tokens.layouts.setdefault(value, {})
        if layout.key not in known:
            known[layout.key] = layout
            queue.append((value, layout))
        elif not tokens.space.unite(known[layout.key].runs, layout.runs):
            tokens.clashes.append(origin)

    for value, dim in seeds:
        add(value, Layout(dim, tokens.space.fresh(int(value.meta["val"].shape[dim]))), value)
    while queue:
        value, layout = queue.popleft()
        for node, side in readers.get(value, ()):
            op, rule = tokens.views[node], tokens.rules[node]
            for (kind, index), found in rule.spread(op, tokens.space, side, layout):
                target = op.operands[index].node if kind == "in" else op.outputs[index]
                if target is not None:
                    add(target, found, node)
    return tokens
