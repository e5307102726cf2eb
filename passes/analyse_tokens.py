"""Find the token axes: seed a label per query and key position of every attention and follow them through the graph.

Where two vectors of labels meet on the same place of the same value they are united element by element, so joint
text and image axes, segments, registers and references come out by themselves; no model is known.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import fx

from sfcompile.passes.graph.cost import flops
from sfcompile.passes.graph.layout import Layout
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules.linked import Linked
from sfcompile.passes.rules.per_head import PerHead
from sfcompile.passes.rules.rule import Side, find_rule
from sfcompile.passes.rules.windows import Windowed
from sfcompile.passes.state import Site, State, Tokens
from sfcompile.runtime.program.intervals import Runs, count
from sfcompile.runtime.program.value_rows import ValueRows
from sfcompile.runtime.rank.ops import COMMUNICATION

_GRID_WORK = 0.05
"""Part of all FLOPs that must be done on a grid for another dim of it to be worth a look."""
_GRID_WASTE = 0.05
"""What another dim must save of an even share."""
_GRID_SEEDS = 2
"""How many such dims are tried: each is planned and priced."""


def run(state: State) -> None:
    """The pass: fills ``tokens`` from attentions' queries, keys and folded batches, grids, and rows of products."""
    graph = state.gm.graph
    seeds = [*seeds_of(state.sites), *seeds_of_rules(graph), *folded_seeds(graph, state.sites)]
    state.tokens = analyse_tokens(graph, seeds, state.topology.num_ranks, state.arrivals)


def seeds_of(sites: Sequence[Site], axis: str = "tokens") -> list[tuple[fx.Node, int]]:
    """Where to start: the query dim and the key dim of every attention, or with ``axis="batch"`` its batch dim.

    The batch axis is followed by the same rules: what they call tokens are then samples.
    """
    if axis == "batch":
        return [(site.q, 0) for site in sites if site.q.meta["val"].dim() == 4]
    return [(value, value.meta["val"].dim() - 2) for site in sites for value in (site.q, site.k)]


def seeds_of_rules(graph: fx.Graph) -> list[tuple[fx.Node, int]]:
    """Tokens of attentions that are no sites, but ops which only their rules know (rules/per_head.py)."""
    seeds: list[tuple[fx.Node, int]] = []
    for node in graph.nodes:
        op = OpView.of(node)
        rule = find_rule(op) if op is not None and op.namespace != "aten" else None
        if op is not None and isinstance(rule, PerHead):
            seeds += rule.seeds(op)
    return seeds


def folded_seeds(graph: fx.Graph, sites: Sequence[Site]) -> list[tuple[fx.Node, int]]:
    """Batch dims of attentions that hold more than samples (frames or pixels folded in): no graph input has that size.

    Attention along them needs no traffic, so they are axes like those of tokens (choose_axes.py).
    """
    samples = {int(n.meta["val"].shape[0]) for n in graph.nodes if n.op == "placeholder" and n.meta["val"].dim()}
    seeds: dict[int, tuple[fx.Node, int]] = {}
    for site in sites:
        batch = int(site.q.meta["val"].shape[0])
        if site.q.meta["val"].dim() == 4 and batch > 1 and batch not in samples:
            seeds.setdefault(batch, (site.q, 0))
    return list(seeds.values())


def analyse_tokens(
    graph: fx.Graph,
    seeds: Sequence[tuple[fx.Node, int]],
    rows_from: int = 0,
    arrivals: Mapping[fx.Node, ValueRows] = MappingProxyType({}),
) -> Tokens:
    """Label the token positions of every value reachable from the seeds ``(value, dim)``.

    Args:
        rows_from: where work is left that no seed reaches (a graph without attention, a graph break before it, an
            encoder of something else), label the rows of its results too if there are at least so many; and where
            work is done on a grid whose rows so many ranks cannot share evenly, label another dim of it. 0: never.
        arrivals: placeholders that come in shards. Those that are cut alike hold the same tokens, and their owners keep
            them.
    """
    analysis = _Analysis(graph)
    alike: dict[tuple[Runs, ...], list[tuple[fx.Node, int]]] = {}
    for value, cut in arrivals.items():
        alike.setdefault(cut.owned, []).append((value, cut.dim))
    for owned, values in alike.items():
        analysis.seed_owned(values, owned)
    for value, dim in seeds:
        analysis.seed(value, dim)
    if rows_from:
        analysis.seed_grids(rows_from)
        analysis.seed_rows(rows_from)
    return analysis.tokens


def _waste(rows: int, ranks: int) -> float:
    """What the busiest rank has of so many rows beyond an even share, in even shares."""
    return -(-rows // ranks) * ranks / rows - 1 if rows else math.inf


class _Analysis:
    def __init__(self, graph: fx.Graph) -> None:
        self.tokens = Tokens()
        self._readers: dict[fx.Node, list[tuple[fx.Node, Side]]] = {}
        self._queue: deque[tuple[fx.Node, Layout]] = deque()
        for node in graph.nodes:
            op = OpView.of(node)
            if op is None or node.target in COMMUNICATION:
                continue
            self.tokens.views[node] = op
            rule = find_rule(op)
            if rule is None:
                continue
            self.tokens.rules[node] = rule
            for operand in op.operands:
                self._readers.setdefault(operand.node, []).append((node, ("in", operand.index)))
            for j, output in enumerate(op.outputs):
                if output is not None:
                    self._readers.setdefault(output, []).append((node, ("out", j)))

    def seed(self, value: fx.Node, dim: int) -> None:
        """Fresh labels for a dim, followed wherever they go."""
        self._add(value, Layout(dim, self.tokens.space.fresh(int(value.meta["val"].shape[dim]))), value)
        self._follow()

    def seed_owned(self, values: Sequence[tuple[fx.Node, int]], owned: Sequence[Runs]) -> None:
        """The same fresh labels for a dim of several values, which ranks hold already."""
        labels = self.tokens.space.fresh(sum(count(runs) for runs in owned))
        self.tokens.held += [
            (labels[0][0] + first, length, rank) for rank, runs in enumerate(owned) for first, length in runs
        ]
        for value, dim in values:
            self._add(value, Layout(dim, labels), value)
        self._follow()

    def _follow(self) -> None:
        while self._queue:
            value, layout = self._queue.popleft()
            for node, side in self._readers.get(value, ()):
                op, rule = self.tokens.views[node], self.tokens.rules[node]
                for (kind, index), spread in rule.spread(op, self.tokens.space, side, layout):
                    target = op.operands[index].node if kind == "in" else op.outputs[index]
                    if target is not None:
                        self._add(target, spread, node)

    def _add(self, value: fx.Node, layout: Layout, origin: fx.Node) -> None:
        columns = math.prod(value.meta["val"].shape[layout.dim + 1 :])
        if layout.grain > 1 and columns % layout.grain and not isinstance(self.tokens.rules.get(origin), Windowed):
            # A table of rows without their columns is not the grid, and would carry labels out of it. A grid whose
            # columns are padded, or fewer, is one.
            return
        known = self.tokens.layouts.setdefault(value, {})
        if layout.key not in known:
            known[layout.key] = layout
            self._queue.append((value, layout))
        elif not self.tokens.space.unite(known[layout.key].runs, layout.runs):
            self.tokens.clashes.append(origin)

    def seed_grids(self, ranks: int) -> None:
        """Seed a second dim of grids whose rows do not divide, where much work is done on them (choose_axes.py).

        A grid is a value that holds tokens as rows and columns, or what a convolution makes: only rows of it, or only
        columns, can be cut.
        """
        tokens = self.tokens
        costs = {node: cost for node, op in tokens.views.items() if node in tokens.layouts and (cost := flops(op))}
        total = sum(map(flops, tokens.views.values()))
        uneven = [node for node in costs if self._least_waste(node, ranks) > _GRID_WASTE]
        if sum(costs[node] for node in uneven) < _GRID_WORK * total:
            return
        for node in sorted(uneven, key=lambda node: -costs[node]):
            waste, shape = self._least_waste(node, ranks), node.meta["val"].shape
            best = min(self._columns(node), key=lambda dim: _waste(int(shape[dim]), ranks), default=None)
            if best is not None and _waste(int(shape[best]), ranks) + _GRID_WASTE <= waste:
                self.seed(node, best)
                tokens.turned.append((node, best))
                if len(tokens.turned) == _GRID_SEEDS:
                    return

    def _least_waste(self, value: fx.Node, ranks: int) -> float:
        return min(_waste(layout.positions, ranks) for layout in self.tokens.layouts[value].values())

    def _columns(self, value: fx.Node) -> list[int]:
        """The other dims of a grid that carry no labels yet."""
        shape, places = value.meta["val"].shape, self.tokens.layouts[value].values()
        taken = {layout.dim for layout in places}
        if isinstance(self.tokens.rules.get(value), Windowed):
            return [dim for dim in range(2, len(shape)) if dim not in taken]
        columns = []
        for layout in places:
            inside = 1
            for dim in range(layout.dim + 1, len(shape)):
                if inside < layout.grain and layout.grain % (inside * int(shape[dim])) == 0:
                    columns += [dim] if dim not in taken else []
                    inside *= int(shape[dim])
        return columns

    def _adds_up_tokens(self, op: OpView, least: int) -> bool:
        """Whether an op sums over a dim of enough tokens."""
        rule = self.tokens.rules[op.node]
        if not isinstance(rule, Linked) or rule.summed is None:
            return False
        return any(
            rule.summed[operand.index][layout.dim] is not None and layout.positions >= least
            for operand in op.operands
            for layout in self.tokens.layouts.get(operand.node, {}).values()
        )

    def seed_rows(self, least: int) -> None:
        """Seed the results of products and convolutions that hold no tokens, or too few, the costliest first."""
        tokens = self.tokens
        costs = {node: flops(op) for node, op in tokens.views.items() if node in tokens.rules}
        for node in sorted((node for node in costs if costs[node]), key=lambda node: -costs[node]):
            op = tokens.views[node]
            if len(op.out_shapes) != 1 or isinstance(tokens.rules[node], PerHead):  # it says where its tokens are
                continue
            if any(layout.positions >= least for layout in tokens.layouts.get(node, {}).values()):
                continue
            if self._adds_up_tokens(op, least):
                continue  # ranks add up their own
            shape = op.out_shapes[0]
            convolution = op.name.startswith("conv")
            # Channels are never rows; frames or samples in the batch of a convolution are, if there are enough.
            rows = [d for d in range(len(shape)) if d != (1 if convolution else len(shape) - 1) and shape[d] >= least]
            if not rows:
                continue
            dim = 0 if convolution and rows[0] == 0 else max(rows, key=lambda d: shape[d])
            self.seed(node, dim)
            tokens.rows.append((node, dim, costs[node]))
