"""Give each group of ranks its own samples: the same analysis and rewriting, with the batch as the axis.

The samples of a batch (a guidance pair, say) never look at each other, so a group that has its own needs no traffic
until the output is gathered. What comes out is an ordinary captured graph of a part of the batch, with the gathers at
its end; the token passes then shard that over the ranks of the group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.passes.analyse_attention import analyse_attention
from sfcompile.passes.analyse_tokens import analyse_tokens, seeds_of
from sfcompile.passes.choose_layouts import choose_layouts
from sfcompile.passes.graph.cost import flops
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import FakeMode, OpView
from sfcompile.passes.place_min_cut import place_min_cut
from sfcompile.passes.rewrite_local import rewrite_local
from sfcompile.runtime.program.topology import Topology


@dataclass(frozen=True)
class BatchPart:
    """One group's graph, the name and schedules of its gathers, and how evenly the work was split.

    ``share`` is a group's FLOPs over an equal part: 1.0 is perfect. ``num_machines`` are those of the whole job.
    ``left`` are the ops that mix samples, or have no rule, with the reason: every group computes them for all samples.
    """

    gm: fx.GraphModule
    program: str
    schedules: list[Schedule]
    share: float
    num_machines: int
    left: dict[fx.Node, tuple[OpView, str]]


def rewrite_batch(
    gm: fx.GraphModule,
    mode: FakeMode,
    topology: Topology,
    groups: list[tuple[int, ...]],
    rank: int,
    program: str,
    shard_everything: bool,
) -> BatchPart | None:
    """The part of the batch that ``rank``'s group computes; None if it costs less that all compute everything.

    Args:
        groups: the ranks of each group, all of one size.
        shard_everything: see place_min_cut.py.
    """
    parts = len(groups)
    part = next(g for g, group in enumerate(groups) if rank in group)
    sites = analyse_attention(gm.graph)
    tokens = analyse_tokens(gm.graph, seeds_of(sites, "batch"))
    layouts = choose_layouts(tokens, sites, parts, "batch")
    for value, layout in list(layouts.chosen.items()):
        # Every group must get a graph of the same shapes: one sample for two groups stays with both.
        if len({layouts.owners.count(layout.runs, p) for p in range(parts)}) > 1:
            del layouts.chosen[value]
    heads = topology.subset(tuple(group[0] for group in groups))
    placement = place_min_cut(gm.graph, tokens, layouts, heads, shard_everything)
    if not placement.needs:
        return None
    local = LocalGraph(mode, layouts.owners, part, program)
    rewrite_local(gm, tokens, layouts, placement, local)
    total = sum(flops(op) for op in tokens.views.values())
    mine = sum(flops(op) / (parts if node in placement.needs else 1) for node, op in tokens.views.items())
    # Ranks of equal place in their groups hold equal shards: they exchange samples among themselves.
    peers = tuple(zip(*groups, strict=True))
    mesh = Mesh(1, parts, tuple(range(parts)))
    schedules = [replace(build("gather", site, mesh), groups=peers) for site in local.sites]
    return BatchPart(
        fx.GraphModule(local.root, local.graph, "StreamFusionBatch"),
        program,
        schedules,
        mine * parts / max(total, 1.0),
        topology.num_machines,
        {node: (tokens.views[node], reason) for node, reason in placement.reasons.items() if node in tokens.views},
    )
