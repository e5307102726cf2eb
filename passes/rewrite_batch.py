"""Give each group of ranks its own samples: the same analysis and rewriting, with the batch as the axis.

Where links between machines would only slow everything down, several groups of machines each do the same: such a
*copy* of the job needs nothing of the others, and its ranks are the job from here on. One chunk that holds nothing goes
to each other copy in every call: with the mark of the call on it, so that copies of different inputs are an error.

The samples of a batch (a guidance pair, say) never look at each other, so a group that has its own needs no traffic
until the output is gathered. What comes out is an ordinary captured graph of a part of the batch, with the gathers at
its end; the token passes then shard that over the ranks of the group.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from sfcompile.passes import choose_schedules
from sfcompile.passes.analyse_attention import analyse_attention
from sfcompile.passes.analyse_tokens import analyse_tokens, seeds_of
from sfcompile.passes.choose_layouts import choose_layouts
from sfcompile.passes.choose_schedules import groups_of
from sfcompile.passes.graph.cost import flops, gather_seconds
from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Ownership
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import is_getitem, is_tensor
from sfcompile.passes.place_min_cut import place_min_cut
from sfcompile.passes.rewrite_local import rewrite_local
from sfcompile.passes.rules.attention import Attention
from sfcompile.passes.state import COPIES, Group, Layouts, Placement, State, Tokens
from sfcompile.runtime.program.topology import Topology


def run(state: State) -> bool:
    """The pass: if the plan splits the ranks, fills ``group`` and puts its graph, topology and rank into the state.

    Where it turns out that a split costs more than that all compute everything, or that to gather what is read whole
    between layers takes longer than attentions save, it is planned without that split. (Frames that are folded into the
    batch of one attention are tokens of the next, whose batch is pixels.)

    Returns:
        Whether the passes above shall run once more, for the group's graph.
    """
    while state.choices.batch * state.choices.copies > 1:
        groups = groups_of(state.topology, state.choices.batch * state.choices.copies)
        group = _split(state, groups) if state.choices.batch > 1 else _copy(state, groups)
        if group is not None:
            # From here on the job is this group and the model is its part of the batch.
            mine = next(ranks for ranks in groups if state.rank in ranks)
            state.group, state.asked = group, replace(state.asked, split_batch=False, copies=False)
            state.gm, state.topology, state.rank = group.gm, state.topology.subset(mine), mine.index(state.rank)
            return True
        if state.asked.mesh is not None:
            state.asked = replace(state.asked, split_batch=False)
        else:
            state.asked = replace(state.asked, not_batch=(*state.asked.not_batch, state.choices.batch))
        choose_schedules.run(state)
    return False


def _copy(state: State, groups: list[tuple[int, ...]]) -> Group:
    """A group that computes what every other group computes: the graph as it is, and nothing to gather."""
    mine = next(g for g, ranks in enumerate(groups) if state.rank in ranks)
    owners = Ownership(LabelSpace(), (), (), len(groups))
    local = LocalGraph(state.mode, owners, mine, f"{state.program}-copy")
    rewrite_local(state.gm, Tokens(), Layouts({}, owners, ()), Placement(), local)
    local.meet(COPIES, len(groups))
    return Group(
        gm=fx.GraphModule(local.root, local.graph, "StreamFusionCopy"),
        program=local.program,
        sites=tuple(local.sites),
        groups=tuple(groups),
        share=1.0,
        num_machines=state.topology.num_machines,
        left={},
        notes=state.choices.notes,
        copies=len(groups),
    )


def _split(state: State, groups: list[tuple[int, ...]]) -> Group | None:
    """The part of the batch of this rank's group; None if it costs less that it is not split."""
    graph, count = state.gm.graph, state.choices.batch
    sites = analyse_attention(graph)
    tokens = analyse_tokens(graph, seeds_of(sites, "batch"))
    layouts = choose_layouts(tokens, sites, count, "batch")
    for value, layout in list(layouts.chosen.items()):
        # Every group must get a graph of the same shapes: one sample for two groups stays with both.
        if len({layouts.owners.count(layout.runs, g) for g in range(count)}) > 1:
            del layouts.chosen[value]
    heads = state.topology.subset(tuple(ranks[0] for ranks in groups[:count]))
    forced = state.asked.shard_everything or state.asked.batch > 1
    placement = place_min_cut(graph, tokens, layouts, heads, forced)
    if not placement.needs or any(_meets(tokens, placement, site.node) for site in sites):
        return None
    if not forced and _gathering_s(graph, tokens, layouts, placement, heads) > state.choices.saved_s:
        return None
    return _group(state, groups, tokens, layouts, placement)


def _gathering_s(graph: fx.Graph, tokens: Tokens, layouts: Layouts, placement: Placement, heads: Topology) -> float:
    """Seconds of gathering, between all groups, what is made in parts of the batch and read whole inside the graph."""
    total = 0.0
    for value in graph.nodes:
        if not is_tensor(value) or not placement.sharded(value):
            continue
        whole = False
        for user in value.users:
            needs = placement.needs.get(user)
            if needs is not None:
                reads = zip(tokens.views[user].operands, needs, strict=True)
                whole |= any(operand.node is value and need is None for operand, need in reads)
            else:
                whole |= user.op != "output" and not is_getitem(user)
        if whole:
            total += gather_seconds(value, heads, layouts.owners.shares(layouts.chosen[value]))
    return total


def _meets(tokens: Tokens, placement: Placement, attention: fx.Node) -> bool:
    """Whether what counts as a batch are tokens of an attention: frames in the batch that attend to one another."""
    rule = tokens.rules.get(attention)
    if attention not in placement.needs or not isinstance(rule, Attention):
        return False
    return rule.torus(tokens.views[attention], placement.chosen[attention])


def _group(
    state: State, groups: list[tuple[int, ...]], tokens: Tokens, layouts: Layouts, placement: Placement
) -> Group:
    count = state.choices.batch
    mine = next(g for g, ranks in enumerate(groups) if state.rank in ranks) % count
    local = LocalGraph(state.mode, layouts.owners, mine, f"{state.program}-batch")
    rewrite_local(state.gm, tokens, layouts, placement, local)
    if state.choices.copies > 1:
        local.meet(COPIES, state.choices.copies)
    total = sum(flops(op) for op in tokens.views.values())
    own = sum(flops(op) / (count if node in placement.needs else 1) for node, op in tokens.views.items())
    return Group(
        gm=fx.GraphModule(local.root, local.graph, "StreamFusionBatch"),
        program=local.program,
        sites=tuple(local.sites),
        groups=tuple(groups),
        share=own * count / max(total, 1.0),
        num_machines=state.topology.num_machines,
        left={node: (tokens.views[node], why) for node, why in placement.reasons.items() if node in tokens.views},
        notes=state.choices.notes,
        copies=state.choices.copies,
    )
