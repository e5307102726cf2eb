"""Choose how every sharded attention of a graph runs: one plan per distinct site (choose_plan.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sfcompile.codegen.builders import build
from sfcompile.codegen.mesh import Mesh
from sfcompile.codegen.schedule import Schedule
from sfcompile.codegen.sites import AttentionSite, GatherSite
from sfcompile.passes.analyse_attention import Site
from sfcompile.passes.analyse_cost import seconds
from sfcompile.passes.analyse_tokens import Tokens
from sfcompile.passes.attention_site import attention_site
from sfcompile.passes.choose_layouts import Layouts
from sfcompile.passes.choose_plan import SitePlan, plan_site
from sfcompile.passes.op_rules import Chosen
from sfcompile.passes.op_rules_attention import Attention
from sfcompile.runtime.topology import Topology

Agree = Callable[[Callable[[], list[SitePlan]]], list[SitePlan]]


@dataclass(frozen=True)
class Choices:
    """The plans of a graph.

    Attributes:
        plans: per geometry of a site.
        counts: how many attentions share it.
        exchange_s: per attention node, predicted seconds beyond its share of the compute.
        sites: one site per geometry, with the name of the first attention of that kind.
        other_s: what a rank computes between two attentions.
    """

    topology: Topology
    plans: Mapping[tuple[Any, ...], SitePlan] = field(default_factory=dict)
    counts: Mapping[tuple[Any, ...], int] = field(default_factory=dict)
    exchange_s: Mapping[fx.Node, float] = field(default_factory=dict)
    sites: Mapping[tuple[Any, ...], AttentionSite] = field(default_factory=dict)
    other_s: float = 0.0

    def schedule(self, site: AttentionSite | GatherSite) -> Schedule:
        """The schedule of a site of this graph."""
        if isinstance(site, GatherSite):
            return build("gather", site, Mesh.of(self.topology, 1, self.topology.num_ranks))
        return self.plans[site.geometry()].best.schedule(site, self.topology)

    @property
    def main(self) -> SitePlan | None:
        """The plan on which the graph spends most."""
        if not self.plans:
            return None
        return self.plans[max(self.plans, key=lambda key: self.counts[key] * (self.plans[key].price.seconds or 0.0))]

    def __str__(self) -> str:
        return "\n".join(f"{self.counts[key]} x {plan.best}" for key, plan in self.plans.items())


def sharded_attentions(tokens: Tokens, layouts: Layouts, sites: Sequence[Site]) -> dict[fx.Node, AttentionSite]:
    """The attentions whose q, k and v can be sharded over tokens, as sites for all ranks."""
    found = {}
    for site in sites:
        op, rule = tokens.views[site.node], tokens.rules.get(site.node)
        chosen = Chosen(
            [layouts.chosen.get(operand.node) for operand in op.operands],
            [layouts.chosen.get(output) if output is not None else None for output in op.outputs],
            layouts.owners,
        )
        if isinstance(rule, Attention) and rule.torus(op, chosen):
            found[site.node] = attention_site(op, chosen, site.q.meta["val"].dtype)
    return found


def choose_schedules(
    tokens: Tokens,
    layouts: Layouts,
    sites: Sequence[Site],
    topology: Topology,
    mesh: Mapping[str, int] | None = None,
    schedule: str = "auto",
    agree: Agree = lambda plan: plan(),
) -> Choices:
    """Plan every distinct attention, between two of which a rank computes its share of everything else.

    Args:
        mesh, schedule: what the user asked for (choose_plan.py).
        agree: calls its argument on one rank and gives every rank the result, so that all run one plan.

    Raises:
        MeshError: what the user asked for is not possible for some attention; names it.
    """
    attentions = sharded_attentions(tokens, layouts, sites)
    other = sum(seconds(op, topology) for node, op in tokens.views.items() if node not in attentions)
    other_s = other / topology.num_ranks / max(1, len(attentions))
    distinct: dict[tuple[Any, ...], AttentionSite] = {}
    for site in attentions.values():
        distinct.setdefault(site.geometry(), site)
    counts = Counter(site.geometry() for site in attentions.values())
    made = agree(lambda: [plan_site(site, topology, other_s, mesh, schedule) for site in distinct.values()])
    plans = dict(zip(distinct, made, strict=True))
    exchange: dict[fx.Node, float] = {}
    for node, site in attentions.items():
        key = site.geometry()
        share = seconds(tokens.views[node], topology) / topology.num_ranks
        exchange[node] = max(0.0, (plans[key].price.seconds or 0.0) - other_s - share)
    return Choices(topology, plans, counts, exchange, distinct, other_s)
