"""Choose one layout for every value, and who owns which token.

A value may carry tokens in several places (a mask over queries and keys; frames and space). It is sharded in one of
them: the place whose axis carries the most attention work, so that values agree with their neighbours. The axes of a
grid at several sizes count together (``_kin``): what is sharded by rows at one size is sharded by rows at all.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

from torch import fx

from sfcompile.passes.graph.cost import flops
from sfcompile.passes.graph.layout import Layout, Ownership
from sfcompile.passes.rules.pad import Padding
from sfcompile.passes.rules.per_head import PerHead
from sfcompile.passes.state import Layouts, Site, State, Tokens, maker_of
from sfcompile.runtime.program.intervals import Runs


def run(state: State) -> None:
    """The pass: fills ``layouts``."""
    state.layouts = choose_layouts(state.tokens, state.sites, state.topology.num_ranks)


def choose_layouts(
    tokens: Tokens,
    sites: Sequence[Site],
    num_ranks: int,
    axis: str = "tokens",
    prefer: Mapping[fx.Node, Layout] | None = None,
) -> Layouts:
    """Cut the label line into segments, give them owners, and pick one layout per value.

    Args:
        axis: what the labels of ``tokens`` stand for: "tokens" or "batch" (analyse_tokens.py).
        prefer: layouts to take for some values (choose_axes.py).
    """
    line = _LabelLine(tokens)
    attention: dict[int, float] = {}
    for site in sites:
        dim = site.q.meta["val"].dim() - 2 if axis == "tokens" else 0
        layout = tokens.layouts[site.q].get((dim, 1, 1, 1))
        if layout is not None and layout.runs:
            attention[line.axis(layout)] = attention.get(line.axis(layout), 0.0) + site.flops
    weight = dict(attention)
    for node, rule in tokens.rules.items():
        if axis == "tokens" and isinstance(rule, PerHead):
            for value, dim in rule.seeds(tokens.views[node])[:1]:  # tokens of its queries
                layout = tokens.layouts.get(value, {}).get((dim, 1, 1, 1))
                if layout is not None and layout.runs:
                    weight[line.axis(layout)] = weight.get(line.axis(layout), 0.0) + flops(tokens.views[node])
    for value, dim, cost in tokens.rows:
        layout = tokens.layouts[value].get((dim, 1, 1, 1))
        if layout is not None and layout.runs:
            # Rows of products count only where no attention says which axis to follow.
            weight[line.axis(layout)] = weight.get(line.axis(layout), 0.0) + 1e-9 * cost

    kin = _kin(tokens, line)
    of_kin: dict[int, float] = {}
    for root, work in weight.items():
        of_kin[kin.get(root, root)] = of_kin.get(kin.get(root, root), 0.0) + work

    def rank_of(layout: Layout) -> tuple[float, float, int, int]:
        root = line.axis(layout)
        return of_kin.get(kin.get(root, root), 0.0), weight.get(root, 0.0), -layout.grain, -layout.dim

    chosen: dict[fx.Node, Layout] = {}
    for value, places in tokens.layouts.items():
        usable = [layout for layout in places.values() if layout.runs]
        if prefer is not None and value in prefer:
            chosen[value] = prefer[value]
        elif usable:
            chosen[value] = max(usable, key=rank_of)
    grains = _grains(tokens, chosen, line, num_ranks)
    loose = _tokens_beside_padding(tokens, line) - grains.keys()
    owners = Ownership(tokens.space, line.segments, line.axes, num_ranks, grains, tokens.held, loose)
    for value, layout in list(chosen.items()):
        if not owners.fits(layout):  # rows with several owners: the next best place, or none
            fitting = [place for place in tokens.layouts[value].values() if place.runs and owners.fits(place)]
            if fitting:
                chosen[value] = max(fitting, key=rank_of)
            else:
                del chosen[value]
    summary = tuple(
        (sum(n for (_, n), a in zip(line.segments, line.axes, strict=True) if a == root), line.axes.count(root), work)
        for root, work in sorted(attention.items(), key=lambda item: -item[1])
    )
    return Layouts(chosen, owners, summary, kin)


def along(tokens: Tokens, value: fx.Node, dim: int) -> dict[fx.Node, Layout]:
    """The values that have rows along a seed (a dim of a value) or its kin, each with its finest such layout."""
    line = _LabelLine(tokens)
    kin = _kin(tokens, line)
    axis = line.axis(tokens.layouts[value][dim, 1, 1, 1])
    having: dict[fx.Node, Layout] = {}
    for other, places in tokens.layouts.items():
        for layout in places.values():
            if layout.runs and kin.get(line.axis(layout), line.axis(layout)) == kin.get(axis, axis):
                if other not in having or layout.grain < having[other].grain:
                    having[other] = layout
    return having


class _LabelLine:
    """The line of labels, cut into segments wherever the labels of some value begin or end.

    Segments that lie together in one value are of one axis, named after the first of them (union-find).

    Attributes:
        vectors: the labels of every layout, united ones under one name, by the layout's runs.
        segments: first label and length of each.
        axes: the axis of each segment.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.vectors: dict[Runs, Runs] = {
            layout.runs: tokens.space.roots(layout.runs)
            for places in tokens.layouts.values()
            for layout in places.values()
            if layout.runs
        }
        vectors = self.vectors.values()
        edges = sorted({edge for runs in vectors for first, n in runs for edge in (first, first + n)})
        covered = sorted({run for runs in vectors for run in runs})
        self.segments = _segments(edges, covered)
        self._starts = [first for first, _ in self.segments]
        self._parent = list(range(len(self.segments)))
        for runs in vectors:
            home = self._find(self._first(runs))
            for i in self.within(runs):
                root = self._find(i)
                self._parent[max(root, home)] = home = min(root, home)
        self.axes = [self._find(i) for i in range(len(self.segments))]

    def _find(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def _first(self, runs: Runs) -> int:
        return bisect_right(self._starts, runs[0][0]) - 1

    def within(self, runs: Runs) -> list[int]:
        """The segments that lie in some runs of labels."""
        spans = ((bisect_left(self._starts, first), bisect_left(self._starts, first + n)) for first, n in runs)
        return [i for start, stop in spans for i in range(start, stop)]

    def axis(self, layout: Layout) -> int:
        """The axis that a layout lies on."""
        return self._find(self._first(self.vectors[layout.runs]))

    def axis_of(self, runs: Runs) -> int | None:
        """The axis of a vector of root labels; None if no value holds it."""
        held = self.within(runs)
        return self._find(held[0]) if held else None


def _kin(tokens: Tokens, line: _LabelLine) -> dict[int, int]:
    """By axis the first of its kin: axes that run along the same direction of a grid, at other sizes of it.

    Kin are the pairs that rules name, and axes that share a dim of some value of such a grid.
    """
    parent: dict[int, int] = {}

    def find(axis: int) -> int:
        while parent.get(axis, axis) != axis:
            axis = parent[axis]
        return axis

    def unite(axes: list[int]) -> None:
        for axis in axes[1:]:
            a, b = find(axes[0]), find(axis)
            parent[max(a, b)] = min(a, b)

    for pair in tokens.space.kin:
        unite([axis for runs in pair if (axis := line.axis_of(tokens.space.roots(runs))) is not None])
    if parent:
        for places in tokens.layouts.values():
            by_dim: dict[int, list[int]] = {}
            for layout in places.values():
                if layout.runs and layout.outer == 1:
                    by_dim.setdefault(layout.dim, []).append(line.axis(layout))
            for axes in by_dim.values():
                unite(axes)
    return {axis: find(axis) for axis in parent}


def _grains(tokens: Tokens, chosen: Mapping[fx.Node, Layout], line: _LabelLine, num_ranks: int) -> dict[int, int]:
    """Segments to be cut between rows of a grid only, by first label.

    That costs evenness and pays where work (convolutions over the grid) can be sharded in no other way: the FLOPs of
    ops whose value holds the tokens as rows, against the FLOPs that the busiest rank computes more of what is sharded
    along that segment.
    """
    gain: dict[tuple[int, int], float] = {}
    work: dict[int, float] = {}
    for op in tokens.views.values():
        cost = flops(op)
        layout = next((chosen[out] for out in op.outputs if out is not None and out in chosen), None)
        if not cost or layout is None:
            continue
        for i in line.within(line.vectors[layout.runs]):
            part = cost * line.segments[i][1] / layout.tokens
            work[i] = work.get(i, 0.0) + part
            if layout.grain > 1:
                gain[i, layout.grain] = gain.get((i, layout.grain), 0.0) + part
    grains: dict[int, int] = {}
    for (i, grain), saved in sorted(gain.items(), key=lambda item: -item[1]):
        first, length = line.segments[i]
        rows = -(-(length // grain) // num_ranks) * grain
        waste = (rows - -(-length // num_ranks)) * num_ranks / length
        # In units of an even share: replicated, this work is num_ranks instead of 1; the rest becomes 1 + waste.
        if first not in grains and length % grain == 0 and saved * (num_ranks - 1) > work[i] * waste:
            grains[first] = grain
    for pair in tokens.space.kin:  # rows of grids of several sizes: all are cut in proportion
        for runs in pair:
            for i in line.within(tokens.space.roots(runs)):
                grains.setdefault(line.segments[i][0], 1)
    return grains


def _tokens_beside_padding(tokens: Tokens, line: _LabelLine) -> set[int]:
    """The first labels of segments that are glued as padding and yet tokens of a value that nobody padded.

    A mask or a table of positions is padded because more tokens are joined to those that it has (a time token, say):
    what pads it stands for tokens on which as much is computed as on all others.
    """
    glued = {i for first, n, _, _ in tokens.space.glued for i in line.within(tokens.space.roots(((first, n),)))}
    if not glued:
        return set()
    among = {runs: glued.intersection(line.within(roots)) for runs, roots in line.vectors.items()}
    holding = {
        value: {i for layout in places.values() if layout.runs for i in among[layout.runs]}
        for value, places in tokens.layouts.items()
    }
    own: set[int] = set()
    for value, held in holding.items():
        maker = maker_of(value)
        op = tokens.views.get(maker)
        if op is None:
            own |= held  # an input
        elif op.operands and not isinstance(tokens.rules.get(maker), Padding):
            own |= held.difference(*(holding.get(operand.node, ()) for operand in op.operands))
    return {line.segments[i][0] for i in own}


def _segments(edges: Sequence[int], covered: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Elementary intervals between edges that lie in some run."""
    out: list[tuple[int, int]] = []
    reach = -1
    at = 0
    for lo, hi in zip(edges, edges[1:], strict=False):
        while at < len(covered) and covered[at][0] <= lo:
            reach = max(reach, covered[at][0] + covered[at][1])
            at += 1
        if reach >= hi:
            out.append((lo, hi - lo))
    return out
