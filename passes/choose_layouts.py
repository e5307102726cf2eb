"""Choose one layout for every value, and who owns which token.

A value may carry tokens in several places (a mask over queries and keys; frames and space). It is sharded in one of
them: the place whose axis carries the most attention work, so that values agree with their neighbours.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from sfcompile.passes.analyse_attention import Site
from sfcompile.passes.analyse_tokens import Tokens
from sfcompile.passes.labels import Runs
from sfcompile.passes.layout import Layout, Ownership


@dataclass(frozen=True)
class Layouts:
    """The chosen layout per value, the ownership of labels, and the axes found: ``(tokens, segments, flops)``."""

    chosen: dict[fx.Node, Layout]
    owners: Ownership
    axes: tuple[tuple[int, int, float], ...]


def choose_layouts(tokens: Tokens, sites: Sequence[Site], num_ranks: int, axis: str = "tokens") -> Layouts:
    """Cut the label line into segments, give them owners, and pick one layout per value.

    Args:
        axis: what the labels of ``tokens`` stand for: "tokens" or "batch" (analyse_tokens.py).
    """
    vectors = {
        layout.runs: tokens.space.roots(layout.runs)
        for places in tokens.layouts.values()
        for layout in places.values()
        if layout.runs
    }
    edges = sorted({edge for runs in vectors.values() for first, n in runs for edge in (first, first + n)})
    covered = sorted({run for runs in vectors.values() for run in runs})
    segments = _segments(edges, covered)
    starts = [first for first, _ in segments]
    parent = list(range(len(segments)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def first_segment(runs: Runs) -> int:
        return bisect_right(starts, runs[0][0]) - 1

    for runs in vectors.values():
        home = find(first_segment(runs))
        for first, n in runs:
            for i in range(bisect_left(starts, first), bisect_left(starts, first + n)):
                root = find(i)
                parent[max(root, home)] = home = min(root, home)
    weight: dict[int, float] = {}
    for site in sites:
        dim = site.q.meta["val"].dim() - 2 if axis == "tokens" else 0
        layout = tokens.layouts[site.q].get((dim, 1, 1))
        if layout is not None and layout.runs:
            root = find(first_segment(vectors[layout.runs]))
            weight[root] = weight.get(root, 0.0) + site.flops

    chosen: dict[fx.Node, Layout] = {}
    for value, places in tokens.layouts.items():
        usable = [layout for layout in places.values() if layout.runs]
        if usable:
            chosen[value] = max(
                usable, key=lambda layout: (weight.get(find(first_segment(vectors[layout.runs])), 0.0), -layout.dim)
            )
    axes = [find(i) for i in range(len(segments))]
    owners = Ownership(tokens.space, segments, axes, num_ranks)
    summary = tuple(
        (sum(n for (_, n), a in zip(segments, axes, strict=True) if a == root), axes.count(root), flops)
        for root, flops in sorted(weight.items(), key=lambda item: -item[1])
    )
    return Layouts(chosen, owners, summary)


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
