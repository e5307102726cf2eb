"""Choose, where an attention leaves a choice, along which of its axes it is sharded.

Models that attend over space and over time by turns fold the other axis into the batch: (B F, S) and (B S, F). Sharded
along its batch an attention needs no traffic at all, but then somebody must switch the sharded dim of the hidden states
between a spatial and a temporal block, by an all-to-all. What is tried:

* the token axis with the most attention work for every value, as choose_layouts.py does by itself;
* each batch axis for every value that has it;
* for every attention its batch axis: a value then goes with the attention that alone it feeds, else with the last one
  before it, so that the hidden states are switched once between two blocks;
* where much is computed on grids whose rows ranks cannot share evenly (few frames), another dim of the grid
  (analyse_tokens.py) for every value that has it: attention then runs on tokens of every frame on every rank.

This file proposes the ways; pipeline.py says what prices them: each is planned and cut (choose_schedules.py,
place_min_cut.py), and the cheapest in seconds is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from sfcompile.passes.analyse_tokens import folded_seeds
from sfcompile.passes.choose_layouts import along, choose_layouts
from sfcompile.passes.graph.layout import Layout
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
    out: list[Preference] = [having[axis] for axis in dict.fromkeys(axes.values())]
    region = regions(graph, sites)
    by_turns = {
        value: having[axes[site]][value]
        for value, site in region.items()
        if site in axes and value in having[axes[site]]
    }
    if len(set(axes.values())) > 1 or len(axes) < len(sites):
        out.append(by_turns)
    return out


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


def _by_axis(tokens: Tokens, layouts: Layouts) -> dict[int, dict[fx.Node, Layout]]:
    """Per axis the values that have it, each with its finest layout along that axis."""
    having: dict[int, dict[fx.Node, Layout]] = {}
    for value, places in tokens.layouts.items():
        for layout in places.values():
            if layout.runs:
                there = having.setdefault(layouts.owners.axis_of(layout.runs), {})
                if value not in there or layout.grain < there[value].grain:
                    there[value] = layout
    return having


def regions(graph: fx.Graph, sites: Sequence[Site]) -> dict[fx.Node, fx.Node]:
    """The attention that each value goes with: the one that alone it feeds, else the last before it (or the first)."""
    attentions = {site.node for site in sites}
    feeds: dict[fx.Node, fx.Node | None] = {}
    for node in reversed(graph.nodes):
        if node in attentions:
            continue
        fed = {user if user in attentions else feeds.get(user) for user in node.users}
        feeds[node] = next(iter(fed)) if len(fed) == 1 else None
    last = sites[0].node if sites else None
    region: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in attentions:
            last = node
        goes_with = node if node in attentions else feeds.get(node) or last
        if goes_with is not None:
            region[node] = goes_with
    return region
