"""Choose, where an attention leaves a choice, along which of its axes it is sharded.

Models that attend over space and over time by turns fold the other axis into the batch: (B F, S) and (B S, F). Sharded
along its batch an attention needs no traffic at all, but then somebody must switch the sharded dim of the hidden states
between a spatial and a temporal block, by an all-to-all. What is tried:

* the token axis with the most attention work for every value, as choose_layouts.py does by itself;
* each batch axis, with its kin (the rows of a grid at its other sizes), for every value that has it;
* for every attention its batch axis: a value then goes with the attention that alone it feeds, else with the last one
  before it, so that the hidden states are switched once between two blocks;
* the same with convolutions beside the attentions, along such a batch axis too: images that are frames of a video are
  convolved without a halo, and switched where the attention over time begins and ends;
* where much is computed on grids whose rows ranks cannot share evenly (few frames), another dim of the grid
  (analyse_tokens.py) for every value that has it: attention then runs on tokens of every frame on every rank.

This file proposes the ways; pipeline.py says what prices them: each is planned and cut (choose_schedules.py,
place_min_cut.py), and the cheapest in seconds is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from torch import fx

from sfcompile.passes.analyse_tokens import folded_seeds
from sfcompile.passes.choose_layouts import along, choose_layouts
from sfcompile.passes.graph.cost import flops
from sfcompile.passes.graph.layout import Layout
from sfcompile.passes.rules.windows import Windowed
from sfcompile.passes.state import Layouts, Site, State, Tokens

Preference = Mapping[fx.Node, Layout]
"""Per value the layout that it shall have, of those that it can have."""


def ways(state: State) -> list[Layouts]:
    """The layouts to choose from: first those that are chosen already, then one for each preference.

    Only the first where the batch shall be split: the rest is chosen for the part of the batch that a group gets.
    """
    if state.asked.split_batch and state.asked.batch > 1:
        return [state.layouts]
    tokens, sites, ranks = state.tokens, state.sites, state.topology.num_ranks
    preferred = preferences(state.gm.graph, tokens, sites, state.layouts)
    preferred += [along(tokens, value, dim) for value, dim in tokens.turned]
    return [state.layouts, *(choose_layouts(tokens, sites, ranks, prefer=preference) for preference in preferred)]


def preferences(graph: fx.Graph, tokens: Tokens, sites: Sequence[Site], layouts: Layouts) -> list[Preference]:
    """Every preference worth a price."""
    having = _by_axis(tokens, layouts)
    attended = {axis for site in sites if (axis := _token_axis(site, tokens, layouts)) is not None}
    allowed = attended | {
        layouts.owners.axis_of(tokens.layouts[q][dim, 1, 1, 1].runs) for q, dim in folded_seeds(graph, sites)
    }
    axes: dict[fx.Node, int] = {}
    for site in sites:
        possible = [axis for axis in _batch_axes(site, tokens, layouts) if axis in allowed]
        if possible:
            axes[site.node] = max(possible, key=lambda axis: (axis in attended, len(having[axis]), axis))
    if not axes:
        return []
    families = _by_axis(tokens, layouts, layouts.kin)
    out: list[Preference] = [
        families[family] for family in dict.fromkeys(layouts.kin.get(axis, axis) for axis in axes.values())
    ]
    attentions = {site.node for site in sites}
    if len(set(axes.values())) > 1 or len(axes) < len(sites):
        out.append(_by_turns(graph, attentions, axes, having))
    convolved = _convolutions(tokens, layouts, axes)
    if convolved:
        out.append(_by_turns(graph, attentions | set(convolved), axes | convolved, having))
    return out


def _by_turns(
    graph: fx.Graph, anchors: Collection[fx.Node], axes: Mapping[fx.Node, int], having: Mapping[int, Preference]
) -> Preference:
    """Every value along the axis of the anchor that it goes with, where it has that axis."""
    return {
        value: having[axes[anchor]][value]
        for value, anchor in regions(graph, anchors).items()
        if anchor in axes and value in having[axes[anchor]]
    }


def _convolutions(tokens: Tokens, layouts: Layouts, axes: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """Convolutions whose images are along the axis of some attention's batch, each with that axis."""
    wanted, convolved = Counter(axes.values()), dict[fx.Node, int]()
    for node, rule in tokens.rules.items():
        if not isinstance(rule, Windowed) or not flops(tokens.views[node]):
            continue
        possible = [
            axis
            for layout in tokens.layouts.get(node, {}).values()
            if layout.dim == 0 and layout.positions >= layouts.owners.num_ranks and layout.grain == 1
            if (axis := layouts.owners.axis_of(layout.runs)) in wanted
        ]
        if possible:
            convolved[node] = max(possible, key=lambda axis: (wanted[axis], axis))
    return convolved


def _batch_axes(site: Site, tokens: Tokens, layouts: Layouts) -> list[int]:
    """The axes along an attention's batch that hold enough for all ranks.

    Whole samples are for rewrite_batch.py: here frames or pixels must be folded in.
    Followed is one along which another attention looks (frames for space, space for frames), else what most values
    have.
    """
    ndim, ranks = site.q.meta["val"].dim(), layouts.owners.num_ranks
    return [
        layouts.owners.axis_of(layout.runs)
        for layout in tokens.layouts.get(site.q, {}).values()
        if layout.dim < ndim - 3 and layout.positions >= ranks and layout.grain == 1
    ]


def _token_axis(site: Site, tokens: Tokens, layouts: Layouts) -> int | None:
    layout = tokens.layouts.get(site.q, {}).get((site.q.meta["val"].dim() - 2, 1, 1, 1))
    return layouts.owners.axis_of(layout.runs) if layout is not None and layout.runs else None


def _by_axis(
    tokens: Tokens, layouts: Layouts, kin: Mapping[int, int] = MappingProxyType({})
) -> dict[int, dict[fx.Node, Layout]]:
    """Per axis (or the first of its ``kin``) the values that have it, each with its finest layout along that axis."""
    having: dict[int, dict[fx.Node, Layout]] = {}
    for value, places in tokens.layouts.items():
        for layout in places.values():
            if layout.runs:
                axis = layouts.owners.axis_of(layout.runs)
                there = having.setdefault(kin.get(axis, axis), {})
                if value not in there or layout.grain < there[value].grain:
                    there[value] = layout
    return having


def regions(graph: fx.Graph, anchors: Collection[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The anchor (an attention, say) that each value goes with: the one that alone it feeds, else the last before it
    (or the first)."""
    feeds: dict[fx.Node, fx.Node | None] = {}
    for node in reversed(graph.nodes):
        if node in anchors:
            continue
        fed = {user if user in anchors else feeds.get(user) for user in node.users}
        feeds[node] = next(iter(fed)) if len(fed) == 1 else None
    last = next((node for node in graph.nodes if node in anchors), None)
    region: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in anchors:
            last = node
        goes_with = node if node in anchors else feeds.get(node) or last
        if goes_with is not None:
            region[node] = goes_with
    return region
