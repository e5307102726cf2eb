"""Choose how every sharded attention of a graph runs: one plan per distinct site (codegen/plan/choose_plan.py)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from sfcompile.codegen.plan.choose_plan import SitePlan, plan_site
from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.errors import MeshError
from sfcompile.passes.analyse_attention import Site
from sfcompile.passes.analyse_tokens import Tokens
from sfcompile.passes.choose_layouts import Layouts, choose_layouts
from sfcompile.passes.graph.attention_site import attention_site
from sfcompile.passes.graph.cost import seconds
from sfcompile.passes.graph.layout import OpLayouts
from sfcompile.passes.rules.attention import Attention
from sfcompile.runtime.program.sites import AttentionSite, GatherSite, ReshardSite
from sfcompile.runtime.program.topology import Topology

Agree = Callable[[Callable[[], Any]], Any]

_WORTH = 0.97
"""Tokens are cut into parts if that is predicted to take at most so much of the time."""
_WORTH_MORE = 0.99
"""And into more parts, if that is predicted to take at most so much of the time with fewer."""


@dataclass(frozen=True)
class Choices:
    """The plans of a graph.

    Attributes:
        plans: per geometry of a site.
        counts: how many attentions share it.
        exchange_s: per attention node, predicted seconds beyond its share of the compute.
        sites: one site per geometry, with the name of the first attention of that kind.
        other_s: what a rank computes between two attentions.
        batch: into how many parts the batch is split, each for a group of ranks; ``topology`` is that of one group.
        notes: prices of other splits of the batch, and why some are not possible.
        parts: into how many parts a rank's tokens are cut, so that one is computed while another travels.
        whole: what to do if this graph cannot be cut into parts.
    """

    topology: Topology
    plans: Mapping[tuple[Any, ...], SitePlan] = field(default_factory=dict)
    counts: Mapping[tuple[Any, ...], int] = field(default_factory=dict)
    exchange_s: Mapping[fx.Node, float] = field(default_factory=dict)
    sites: Mapping[tuple[Any, ...], AttentionSite] = field(default_factory=dict)
    other_s: float = 0.0
    batch: int = 1
    notes: tuple[str, ...] = ()
    parts: int = 1
    whole: Choices | None = None

    def schedule(self, site: AttentionSite | GatherSite | ReshardSite) -> Schedule:
        """The schedule of a site of this graph."""
        if not isinstance(site, AttentionSite):
            return build("gather", site, Mesh.of(self.topology, 1, self.topology.num_ranks))
        return self.plans[site.geometry()].best.schedule(site, self.topology)

    @property
    def main(self) -> SitePlan | None:
        """The plan on which the graph spends most."""
        if not self.plans:
            return None
        return self.plans[max(self.plans, key=lambda key: self.counts[key] * (self.plans[key].price.seconds or 0.0))]

    def __str__(self) -> str:
        halves = f" in {self.parts} parts" if self.parts > 1 else ""
        return "\n".join(f"{self.counts[key]} x {plan.best}{halves}" for key, plan in self.plans.items())


def sharded_attentions(
    tokens: Tokens, layouts: Layouts, sites: Sequence[Site], parts: int = 1
) -> dict[fx.Node, AttentionSite]:
    """The attentions whose q, k and v can be sharded over tokens, as sites for all ranks.

    With several ``parts``: none, if some rank has too few tokens (or rows of them) for so many.
    """
    found = {}
    owners = layouts.owners if parts == 1 else layouts.owners.split(parts)
    for site in sites:
        op, rule = tokens.views[site.node], tokens.rules.get(site.node)
        chosen = OpLayouts(
            [layouts.chosen.get(operand.node) for operand in op.operands],
            [layouts.chosen.get(output) if output is not None else None for output in op.outputs],
            owners,
        )
        if isinstance(rule, Attention) and rule.torus(op, chosen):
            found[site.node] = made = attention_site(op, chosen, site.q.meta["val"].dtype, parts)
            if parts > 1 and _has_empty_part(made):
                return {}
    return found


def _has_empty_part(site: AttentionSite) -> bool:
    each = [(rank, part) for rank in range(len(site.q_positions)) for part in range(site.parts)]
    spans = [site.rows(queries, rank, site.parts, part) for queries in (True, False) for rank, part in each]
    return any(start == stop for start, stop in spans)


def choose_schedules(
    tokens: Tokens,
    layouts: Layouts,
    sites: Sequence[Site],
    topology: Topology,
    mesh: Mapping[str, int] | None = None,
    schedule: str = "auto",
    agree: Agree = lambda plan: plan(),
    split_batch: bool = True,
    parts: Sequence[int] = (),
) -> Choices:
    """Plan every distinct attention, between two of which a rank computes its share of everything else.

    A batch axis needs no traffic in attention: groups of ranks may take whole samples each, and shard tokens inside.

    Args:
        mesh, schedule: what the user asked for (codegen/plan/choose_plan.py); ``mesh`` may hold a "batch" degree.
        split_batch: whether the batch may be split; not if it was split before.
        parts: into how many parts a rank's tokens may be cut; the cheapest is taken, or none.
        agree: calls its argument on one rank and gives every rank the result, so that all run one plan.

    Raises:
        MeshError: what the user asked for is not possible for some attention; names it.
    """
    attentions = sharded_attentions(tokens, layouts, sites)
    other = sum(seconds(op, topology) for node, op in tokens.views.items() if node not in attentions)
    other_s = other / topology.num_ranks / max(1, len(attentions))
    splits: dict[int, dict[fx.Node, AttentionSite]] = {1: attentions}
    refused: list[str] = []
    for batch in _batches(attentions, topology, mesh, schedule, refused) if split_batch else ():
        inner = choose_layouts(tokens, sites, topology.num_ranks // batch)
        found = sharded_attentions(tokens, inner, sites)
        splits[batch] = {node: replace(site, batch=site.batch // batch) for node, site in found.items()}
    asked = int(mesh.get("batch", 1)) if mesh is not None and split_batch else 0
    if asked > 1 and asked not in splits:
        raise MeshError(
            f"mesh={dict(mesh or {})} splits the batch {asked} ways", "; ".join(refused), "leave batch out of the mesh"
        )

    cuts: dict[int, dict[fx.Node, AttentionSite]] = {}
    if topology.num_machines > 1 and topology.copy_bytes_per_s is not None:  # the executor's; kernels take tokens whole
        cuts = {count: sharded_attentions(tokens, layouts, sites, count) for count in parts}

    def plan() -> tuple[int, list[SitePlan], int, list[SitePlan], list[str]]:
        priced = {
            batch: [
                plan_site(site, topology.subset(groups_of(topology, batch)[0]), other_s, mesh, schedule)
                for site in _distinct(split).values()
            ]
            for batch, split in splits.items()
            if not asked or batch == asked
        }
        prices = {batch: _step(splits[batch], plans) for batch, plans in priced.items()}
        best = min(prices, key=lambda batch: (prices[batch], batch))
        said = []
        count, pieces, least = 1, [], prices[best]
        for number, cut in cuts.items() if best == 1 else ():
            if not cut:
                continue
            times = Counter(site.geometry() for site in cut.values())
            made = [
                plan_site(site, topology, other_s, mesh, schedule, times[key]) for key, site in _distinct(cut).items()
            ]
            price_s = _step(cut, made)
            said.append(f"tokens in {number} parts: {price_s * 1e3:.3f} ms a step, whole {prices[1] * 1e3:.3f} ms")
            if price_s <= (_WORTH if count == 1 else _WORTH_MORE) * least:
                count, pieces, least = number, made, price_s
        rows = [f"batch split {batch} ways: {seconds * 1e3:.3f} ms a step" for batch, seconds in prices.items()]
        return best, priced[best], count, pieces, [*(rows if len(rows) > 1 else []), *said, *refused]

    batch, made, count, pieces, notes = agree(plan)
    group = topology.subset(groups_of(topology, batch)[0])
    whole = _choices(tokens, splits[batch], made, topology, group, other_s, batch, notes)
    if count == 1:
        return whole
    split = _choices(tokens, cuts[count], pieces, topology, group, other_s, batch, notes)
    return replace(split, parts=count, whole=whole)


def _choices(
    tokens: Tokens,
    sites: Mapping[fx.Node, AttentionSite],
    made: Sequence[SitePlan],
    topology: Topology,
    group: Topology,
    other_s: float,
    batch: int,
    notes: Sequence[str],
) -> Choices:
    distinct = _distinct(sites)
    counts = Counter(site.geometry() for site in sites.values())
    plans = dict(zip(distinct, made, strict=True))
    exchange: dict[fx.Node, float] = {}
    for node, site in sites.items():
        share = seconds(tokens.views[node], topology) / topology.num_ranks
        exchange[node] = max(0.0, (plans[site.geometry()].price.seconds or 0.0) - other_s - share)
    return Choices(group, plans, counts, exchange, distinct, other_s, batch, tuple(notes))


def groups_of(topology: Topology, batch: int) -> list[tuple[int, ...]]:
    """The ranks of each of ``batch`` groups: whole machines, or equal parts of one."""
    ranks = sorted(range(topology.num_ranks), key=lambda rank: (topology.machine_of[rank], rank))
    size = topology.num_ranks // batch
    return [tuple(ranks[at : at + size]) for at in range(0, topology.num_ranks, size)]


def _batches(
    attentions: Mapping[fx.Node, AttentionSite],
    topology: Topology,
    mesh: Mapping[str, int] | None,
    schedule: str,
    refused: list[str],
) -> list[int]:
    """Ways to split the batch, beyond not at all; fills ``refused`` with why not for the others."""
    ranks, machines = topology.num_ranks, topology.num_machines
    samples = math.gcd(*(site.batch for site in attentions.values()))
    asked = mesh.get("batch", 1) if mesh is not None else None
    if samples < 2 or (asked is None and schedule != "auto") or asked == 1:
        if asked is not None and asked > 1:
            refused.append(f"a batch of {max(samples, 1)} cannot be split")
        return []
    found = []
    for batch in range(2, min(samples, ranks) + 1):
        even = ranks % batch == 0 and samples % batch == 0
        if even and machines % batch and (batch % machines or ranks // machines % (batch // machines)):
            refused.append(f"batch split {batch} ways: groups would share machines unevenly")
        elif even:
            found.append(batch)
        elif asked == batch:
            refused.append(f"a batch of {samples} on {ranks} ranks cannot be split {batch} ways")
    return found if asked is None else [batch for batch in found if batch == asked]


def _distinct(split: Mapping[fx.Node, AttentionSite]) -> dict[tuple[Any, ...], AttentionSite]:
    found: dict[tuple[Any, ...], AttentionSite] = {}
    for site in split.values():
        found.setdefault(site.geometry(), site)
    return found


def _step(split: Mapping[fx.Node, AttentionSite], plans: Sequence[SitePlan]) -> float:
    counts = Counter(site.geometry() for site in split.values())
    return sum(counts[key] * (plan.price.seconds or 0.0) for key, plan in zip(_distinct(split), plans, strict=True))
