"""Choose how every sharded attention of a graph runs: one plan per distinct site (codegen/plan/choose_plan.py).

A plan is found per geometry of a site. Beyond that two things are decided for the whole graph, each by the predicted
seconds of all its attentions:

* the *batch*: attention needs no traffic along it, so groups of ranks may take whole samples each, and shard the tokens
  inside a group (rewrite_batch.py carries that out);
* *parts*: a rank's tokens may be cut into parts, so that one part travels while another is computed (order_puts.py).

``_ways`` lists what is possible, the same on every rank; ``_decide`` prices it and picks, on one rank for all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from sfcompile.codegen.plan.choose_plan import SitePlan, plan_site
from sfcompile.codegen.plan.doubts import doubts
from sfcompile.errors import MeshError
from sfcompile.options import AS_IT_IS, Wire
from sfcompile.passes.choose_layouts import choose_layouts
from sfcompile.passes.graph.attention_site import attention_site
from sfcompile.passes.graph.cost import seconds
from sfcompile.passes.rules.attention import Attention
from sfcompile.passes.state import Asked, Choices, Geometry, Layouts, Site, State, Tokens
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology

_WORTH = 0.97
"""Tokens are cut into parts if that is predicted to take at most so much of the time."""
_WORTH_MORE = 0.99
"""And into more parts, if that is predicted to take at most so much of the time with fewer."""

Attentions = Mapping[fx.Node, AttentionSite]
"""The attentions of a graph that are sharded over tokens, as sites for all ranks (of one group)."""


def run(state: State) -> None:
    """The pass: fills ``choices``. In a group's part of the batch they keep the notes on how the batch was split."""
    state.choices = choose_schedules(state.tokens, state.layouts, state.sites, state.topology, state.asked)
    if state.group is not None:
        state.choices = replace(state.choices, notes=state.group.notes)


def sharded_attentions(
    tokens: Tokens, layouts: Layouts, sites: Sequence[Site], parts: int = 1, wire: Wire = AS_IT_IS
) -> dict[fx.Node, AttentionSite]:
    """The attentions whose q, k and v can be sharded over tokens, as sites for all ranks.

    With several ``parts``: none, if some rank has too few tokens (or rows of them) for so many.
    """
    sharded: dict[fx.Node, AttentionSite] = {}
    owners = layouts.owners if parts == 1 else layouts.owners.split(parts)
    for site in sites:
        op, rule = tokens.views[site.node], tokens.rules.get(site.node)
        chosen = replace(layouts, owners=owners).of(op)
        if isinstance(rule, Attention) and rule.torus(op, chosen):
            if any(layout is not None and not owners.fits(layout) for layout in chosen.ins[:3]):
                return {}  # rows of a grid that parts would cut
            sharded[site.node] = attention_site(op, chosen, site.q.meta["val"].dtype, parts, wire)
            if parts > 1 and _has_empty_part(sharded[site.node]):
                return {}
    return sharded


def _has_empty_part(site: AttentionSite) -> bool:
    each = [(rank, part) for rank in range(len(site.q_positions)) for part in range(site.parts)]
    spans = [site.rows(queries, rank, site.parts, part) for queries in (True, False) for rank, part in each]
    return any(start == stop for start, stop in spans)


@dataclass(frozen=True)
class _Ways:
    """What is possible for a graph: every split of the batch, and every cut of the tokens of the whole batch.

    Attributes:
        splits: per number of groups the attentions of one group.
        cuts: per number of parts the attentions in so many parts; none: tokens are not cut.
        refused: why the batch cannot be split otherwise.
        other_s: seconds that a rank computes between two attentions.
    """

    splits: Mapping[int, Attentions]
    cuts: Mapping[int, Attentions]
    refused: tuple[str, ...]
    other_s: float


@dataclass(frozen=True)
class _Decision:
    """What one rank decided for all: it travels between ranks, so it names no node of a graph.

    Attributes:
        batch: into how many parts the batch is split.
        plans: one per distinct site of that split.
        parts: into how many parts a rank's tokens are cut.
        part_plans: one per distinct site of that cut; none if tokens stay whole.
        notes: prices of what was not taken.
    """

    batch: int
    plans: list[SitePlan]
    parts: int
    part_plans: list[SitePlan]
    notes: tuple[str, ...]


def choose_schedules(
    tokens: Tokens, layouts: Layouts, sites: Sequence[Site], topology: Topology, asked: Asked
) -> Choices:
    """Plan every distinct attention, between two of which a rank computes its share of everything else.

    Raises:
        MeshError: what the user asked for is not possible for some attention; names it.
    """
    ways = _ways(tokens, layouts, sites, topology, asked)
    decision = asked.agree(lambda: _decide(ways, topology, asked))
    assert isinstance(decision, _Decision)
    planned = Choices(
        topology.subset(groups_of(topology, decision.batch)[0]),
        other_s=ways.other_s,
        batch=decision.batch,
        notes=decision.notes,
    )
    shares = {site.node: seconds(tokens.views[site.node], topology) / topology.num_ranks for site in sites}
    whole = _with_plans(planned, ways.splits[decision.batch], decision.plans, shares)
    if decision.parts == 1:
        return whole
    cut = _with_plans(planned, ways.cuts[decision.parts], decision.part_plans, shares)
    return replace(cut, parts=decision.parts, whole=whole)


def _with_plans(
    choices: Choices, attentions: Attentions, plans: Sequence[SitePlan], shares: Mapping[fx.Node, float]
) -> Choices:
    """Choices with a plan per distinct attention; ``shares``: a rank's seconds of computing each."""
    sites = _distinct(attentions)
    plan_of = dict(zip(sites, plans, strict=True))
    exchange_s = {
        node: max(0.0, (plan_of[site.geometry()].price.seconds or 0.0) - choices.other_s - shares[node])
        for node, site in attentions.items()
    }
    counts = Counter(site.geometry() for site in attentions.values())
    return replace(choices, plans=plan_of, counts=counts, exchange_s=exchange_s, sites=sites)


def _ways(tokens: Tokens, layouts: Layouts, sites: Sequence[Site], topology: Topology, asked: Asked) -> _Ways:
    attentions = sharded_attentions(tokens, layouts, sites, wire=asked.wire)
    other = sum(seconds(op, topology) for node, op in tokens.views.items() if node not in attentions)
    splits: dict[int, Attentions] = {1: attentions}
    refused: list[str] = []
    for batch in _batches(attentions, topology, asked, refused) if asked.split_batch else ():
        inner = choose_layouts(tokens, sites, topology.num_ranks // batch)
        of_all = sharded_attentions(tokens, inner, sites, wire=asked.wire)
        splits[batch] = {node: replace(site, batch=site.batch // batch) for node, site in of_all.items()}
    if asked.split_batch and asked.batch > 1 and asked.batch not in splits:
        raise MeshError(
            f"mesh={dict(asked.mesh or {})} splits the batch {asked.batch} ways",
            "; ".join(refused),
            "leave batch out of the mesh",
        )
    cuts: dict[int, Attentions] = {}
    if topology.num_machines > 1 and topology.copy_bytes_per_s is not None:  # the executor's; kernels take tokens whole
        cuts = {parts: sharded_attentions(tokens, layouts, sites, parts, asked.wire) for parts in asked.parts}
        cuts = {parts: cut for parts, cut in cuts.items() if cut}
    return _Ways(splits, cuts, tuple(refused), other / topology.num_ranks / max(1, len(attentions)))


def _decide(ways: _Ways, topology: Topology, asked: Asked) -> _Decision:
    forced = asked.batch if asked.split_batch and asked.mesh is not None else None
    plans = {
        batch: [
            plan_site(site, topology.subset(groups_of(topology, batch)[0]), ways.other_s, asked.mesh, asked.schedule)
            for site in _distinct(split).values()
        ]
        for batch, split in ways.splits.items()
        if forced is None or batch == forced
    }
    step_s = {batch: _step(ways.splits[batch], plans[batch]) for batch in plans}
    best = min(step_s, key=lambda batch: (step_s[batch], batch))
    notes = [f"batch split {batch} ways: {cost * 1e3:.3f} ms a step" for batch, cost in step_s.items()]
    notes = notes if len(notes) > 1 else []
    parts, part_plans, least = 1, [], step_s[best]
    for count, cut in ways.cuts.items() if best == 1 else ():
        times = Counter(site.geometry() for site in cut.values())
        tried = [
            plan_site(site, topology, ways.other_s, asked.mesh, asked.schedule, times[key])
            for key, site in _distinct(cut).items()
        ]
        cost = _step(cut, tried)
        notes.append(f"tokens in {count} parts: {cost * 1e3:.3f} ms a step, whole {step_s[1] * 1e3:.3f} ms")
        if cost <= (_WORTH if parts == 1 else _WORTH_MORE) * least:
            parts, part_plans, least = count, tried, cost
    if parts == 1 and plans[best]:
        heaviest = max(zip(_distinct(ways.splits[best]).values(), plans[best], strict=True), key=_seconds)
        notes += doubts(heaviest[1], heaviest[0], topology.subset(groups_of(topology, best)[0]), ways.other_s)
    return _Decision(best, plans[best], parts, part_plans, (*notes, *ways.refused))


def _seconds(planned: tuple[AttentionSite, SitePlan]) -> float:
    return planned[1].price.seconds or 0.0


def groups_of(topology: Topology, batch: int) -> list[tuple[int, ...]]:
    """The ranks of each of ``batch`` groups: whole machines, or equal parts of one."""
    ranks = sorted(range(topology.num_ranks), key=lambda rank: (topology.machine_of[rank], rank))
    size = topology.num_ranks // batch
    return [tuple(ranks[at : at + size]) for at in range(0, topology.num_ranks, size)]


def _batches(attentions: Attentions, topology: Topology, asked: Asked, refused: list[str]) -> list[int]:
    """Ways to split the batch, beyond not at all; fills ``refused`` with why not for the others."""
    ranks, machines = topology.num_ranks, topology.num_machines
    samples = math.gcd(*(site.batch for site in attentions.values()))
    forced = asked.batch if asked.mesh is not None else None
    if samples < 2 or (forced is None and asked.schedule != "auto") or forced == 1:
        if forced is not None and forced > 1:
            refused.append(f"a batch of {max(samples, 1)} cannot be split")
        return []
    possible = []
    for batch in range(2, min(samples, ranks) + 1):
        even = ranks % batch == 0 and samples % batch == 0
        if even and machines % batch and (batch % machines or ranks // machines % (batch // machines)):
            refused.append(f"batch split {batch} ways: groups would share machines unevenly")
        elif even:
            possible.append(batch)
        elif forced == batch:
            refused.append(f"a batch of {samples} on {ranks} ranks cannot be split {batch} ways")
    return possible if forced is None else [batch for batch in possible if batch == forced]


def _distinct(attentions: Attentions) -> dict[Geometry, AttentionSite]:
    """One site per geometry, the first of its kind."""
    first: dict[Geometry, AttentionSite] = {}
    for site in attentions.values():
        first.setdefault(site.geometry(), site)
    return first


def _step(attentions: Attentions, plans: Sequence[SitePlan]) -> float:
    """Predicted seconds of all attentions and the compute before each; ``plans``: one per distinct attention."""
    counts = Counter(site.geometry() for site in attentions.values())
    return sum(
        counts[key] * (plan.price.seconds or 0.0) for key, plan in zip(_distinct(attentions), plans, strict=True)
    )
