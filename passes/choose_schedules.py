"""Choose how every sharded attention of a graph runs: one plan per distinct site (codegen/plan/choose_plan.py).

A plan is found per geometry of a site. Beyond that three things are decided for the whole graph, each by the predicted
seconds of all its attentions:

* the *batch*: attention needs no traffic along it, so groups of ranks may take whole samples each, and shard the tokens
  inside a group (rewrite_batch.py carries that out);
* *copies*: where links between machines are the bottleneck, several groups of whole machines may each compute the same,
  so that more machines are never predicted to be slower than fewer (rewrite_batch.py too);
* *parts*: a rank's tokens may be cut into parts, so that one part travels while another is computed (order_puts.py).

``_ways`` lists what is possible, the same on every rank; ``_decide`` prices it and picks, on one rank for all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from sfcompile.codegen.plan.choose_plan import SitePlan, plan_site
from sfcompile.codegen.plan.doubts import doubts
from sfcompile.codegen.plan.step import price
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
_EVEN = 1.005
"""Where parts take at most so much of the time, but not so little, ranks that compute ``_FASTER`` times as fast decide:
what is measured of compute errs low, by up to 1.7 on crowded cores, since other work only takes away. The faster ranks
compute, the more traffic is left to hide; if they are as slow as measured, little is lost."""
_FASTER = 1.5

Attentions = Mapping[fx.Node, AttentionSite]
"""The attentions of a graph that are sharded over tokens, as sites for all ranks (of one group)."""

Split = tuple[int, int]
"""Into how many parts the batch is split, and how many copies of that there are: groups are their product."""
WHOLE: Split = (1, 1)


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
        of_group: the attentions of one of so many groups; that of a split it knows is not asked for twice.
        batches: into how many parts the batch may be split, beyond not at all.
        copies: how many groups of whole machines may compute the same, beyond one.
        cuts: per number of parts the attentions in so many parts; none: tokens are not cut.
        refused: why the batch cannot be split otherwise.
        other_s: seconds that a rank computes between two attentions.
        compute_s: seconds that a rank computes in all, if nothing travelled.
    """

    of_group: Callable[[int], Attentions]
    batches: tuple[int, ...]
    copies: tuple[int, ...]
    cuts: Mapping[int, Attentions]
    refused: tuple[str, ...]
    other_s: float
    compute_s: float
    known: dict[Split, Attentions] = field(default_factory=dict)

    def split(self, split: Split) -> Attentions:
        """The attentions of one group of a split."""
        if split not in self.known:
            batch, copies = split
            of_all = self.of_group(batch * copies)
            self.known[split] = {node: replace(site, batch=site.batch // batch) for node, site in of_all.items()}
        return self.known[split]


@dataclass(frozen=True)
class _Decision:
    """What one rank decided for all: it travels between ranks, so it names no node of a graph.

    Attributes:
        split: into how many parts the batch is split, and how often all is computed.
        plans: one per distinct site of that split.
        parts: into how many parts a rank's tokens are cut.
        part_plans: one per distinct site of that cut; none if tokens stay whole.
        notes: prices of what was not taken.
        saved_s: what the split saves in attentions.
    """

    split: Split
    plans: list[SitePlan]
    parts: int
    part_plans: list[SitePlan]
    notes: tuple[str, ...]
    saved_s: float


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
    batch, copies = decision.split
    planned = Choices(
        topology.subset(groups_of(topology, batch * copies)[0]),
        other_s=ways.other_s * copies,
        batch=batch,
        copies=copies,
        saved_s=decision.saved_s,
        notes=decision.notes,
    )
    group_ranks = topology.num_ranks // copies
    shares = {site.node: seconds(tokens.views[site.node], topology) / group_ranks for site in sites}
    whole = _with_plans(planned, ways.split(decision.split), decision.plans, shares)
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
    refused: list[str] = []
    batches = _batches(attentions, topology, asked, refused) if asked.split_batch else []
    if asked.split_batch and asked.batch > 1 and asked.batch not in batches:
        raise MeshError(
            f"mesh={dict(asked.mesh or {})} splits the batch {asked.batch} ways",
            "; ".join(refused),
            "leave batch out of the mesh",
        )
    cuts: dict[int, Attentions] = {}
    if topology.num_machines > 1 and not topology.of_gpus:  # kernels take tokens whole
        cuts = {parts: sharded_attentions(tokens, layouts, sites, parts, asked.wire) for parts in asked.parts}
        cuts = {parts: cut for parts, cut in cuts.items() if cut}

    def of_group(groups: int) -> Attentions:
        inner = choose_layouts(tokens, sites, topology.num_ranks // groups)
        return sharded_attentions(tokens, inner, sites, wire=asked.wire)

    other_s = other / topology.num_ranks / max(1, len(attentions))
    compute_s = sum(seconds(op, topology) for op in tokens.views.values()) / topology.num_ranks
    copies = _copies(topology, asked) if attentions else ()
    return _Ways(of_group, tuple(batches), copies, cuts, tuple(refused), other_s, compute_s, {WHOLE: attentions})


def _copies(topology: Topology, asked: Asked) -> tuple[int, ...]:
    """How many equal groups of whole machines, of two ranks at least, could compute the same each."""
    if not asked.copies or asked.mesh is not None or asked.schedule != "auto" or asked.shard_everything:
        return ()
    ranks, machines = topology.num_ranks, topology.num_machines
    if len(set(Counter(topology.machine_of).values())) > 1:
        return ()
    return tuple(count for count in range(2, machines + 1) if machines % count == 0 and ranks // count > 1)


def _decide(ways: _Ways, topology: Topology, asked: Asked) -> _Decision:
    forced = asked.batch if asked.split_batch and asked.mesh is not None else None
    plans: dict[Split, list[SitePlan]] = {}
    step_s: dict[Split, float] = {}

    def add(split: Split) -> None:
        own, other_s = _group_topology(topology, split), ways.other_s * split[1]
        sites = _distinct(ways.split(split)).values()
        plans[split] = [plan_site(site, own, other_s, asked.mesh, asked.schedule) for site in sites]
        step_s[split] = _step(ways.split(split), plans[split])

    for batch in (1, *ways.batches):
        if forced is None or batch == forced:
            add((batch, 1))
    best = min(step_s, key=lambda split: (step_s[split], split))
    notes = [f"batch split {batch} ways: {cost * 1e3:.3f} ms a step" for (batch, _), cost in step_s.items()]
    notes = notes if len(notes) > 1 else []
    parts, part_plans, least = 1, [], step_s[best]
    taken: tuple[Attentions, Sequence[SitePlan]] = ways.split(best), plans[best]
    for count, cut in ways.cuts.items() if best == WHOLE else ():
        times = Counter(site.geometry() for site in cut.values())
        tried = [
            plan_site(site, topology, ways.other_s, asked.mesh, asked.schedule, times[key])
            for key, site in _distinct(cut).items()
        ]
        cost = _step(cut, tried)
        notes.append(f"tokens in {count} parts: {cost * 1e3:.3f} ms a step, whole {step_s[WHOLE] * 1e3:.3f} ms")
        worth = _WORTH if parts == 1 else _WORTH_MORE
        if cost <= worth * least or (
            cost <= _EVEN * least
            and _step_if_faster(cut, tried, topology, ways.other_s)
            <= worth * _step_if_faster(*taken, topology, ways.other_s)
        ):
            parts, part_plans, least, taken = count, tried, cost, (cut, tried)
    # So many copies take so many times the compute: where a step is nearer to its compute alone, none can win.
    for copies in ways.copies:
        for batch in (1, *ways.batches) if copies * ways.compute_s < _WORTH * least else ():
            if topology.num_ranks % (batch * copies) or topology.num_ranks == batch * copies:
                continue
            split = batch, copies
            add(split)
            notes.append(
                f"{copies} groups of machines, each computing all of it{_ways_words(batch)}: "
                f"{step_s[split] * 1e3:.3f} ms a step, otherwise {least * 1e3:.3f} ms"
            )
            if step_s[split] <= _WORTH * least:
                best, least, parts, part_plans = split, step_s[split], 1, []
    if parts == 1 and plans[best]:
        own = _group_topology(topology, best)
        heaviest = max(zip(_distinct(ways.split(best)).values(), plans[best], strict=True), key=_seconds)
        notes += doubts(heaviest[1], heaviest[0], own, ways.other_s * best[1])
    saved_s = step_s.get(WHOLE, math.inf) - step_s[best]
    return _Decision(best, plans[best], parts, part_plans, (*notes, *ways.refused), saved_s)


def _ways_words(batch: int) -> str:
    return f", the batch split {batch} ways" if batch > 1 else ""


def _group_topology(topology: Topology, split: Split) -> Topology:
    return topology.subset(groups_of(topology, split[0] * split[1])[0])


def _seconds(planned: tuple[AttentionSite, SitePlan]) -> float:
    return planned[1].price.seconds or 0.0


def groups_of(topology: Topology, count: int) -> list[tuple[int, ...]]:
    """The ranks of each of ``count`` groups: whole machines, or equal parts of one."""
    ranks = sorted(range(topology.num_ranks), key=lambda rank: (topology.machine_of[rank], rank))
    size = topology.num_ranks // count
    return [tuple(ranks[at : at + size]) for at in range(0, topology.num_ranks, size)]


def _batches(attentions: Attentions, topology: Topology, asked: Asked, refused: list[str]) -> list[int]:
    """Ways to split the batch, beyond not at all; fills ``refused`` with why not for the others."""
    ranks = topology.num_ranks
    samples = math.gcd(*(site.batch for site in attentions.values()))
    forced = asked.batch if asked.mesh is not None else None
    if samples < 2 or (forced is None and asked.schedule != "auto") or forced == 1:
        if forced is not None and forced > 1:
            none = "there is no attention that is sharded over tokens, and samples are split for those"
            refused.append(f"a batch of {samples} cannot be split" if attentions else none)
        return []
    possible = []
    for batch in range(2, min(samples, ranks) + 1):
        even = ranks % batch == 0 and samples % batch == 0
        if batch in asked.not_batch and forced is None:
            refused.append(f"batch split {batch} ways: what is gathered between its layers takes longer than it saves")
        elif even and not _share_evenly(topology, batch, forced is not None):
            refused.append(f"batch split {batch} ways: groups would share machines unevenly")
        elif even:
            possible.append(batch)
        elif forced == batch:
            refused.append(f"a batch of {samples} on {ranks} ranks cannot be split {batch} ways")
    return possible if forced is None else [batch for batch in possible if batch == forced]


def _share_evenly(topology: Topology, batch: int, forced: bool) -> bool:
    """Whether so many groups are whole machines, or equal parts of one, and each like the others: what is planned for
    the first is what all do. Where machines have unequal numbers of ranks they may be asked for all the same."""
    ranks, machines = topology.num_ranks, topology.num_machines
    if machines % batch and (batch % machines or ranks // machines % (batch // machines)):
        return False
    shares = [Counter(topology.subset(group).machine_of) for group in groups_of(topology, batch)]
    return forced or len({tuple(sorted(share.values())) for share in shares}) == 1


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


def _step_if_faster(attentions: Attentions, plans: Sequence[SitePlan], topology: Topology, other_s: float) -> float:
    """As :func:`_step`, of the same plans on ranks that compute ``_FASTER`` times as fast."""
    rates = {name: getattr(topology, name) for name in ("flops_per_s", "attention_flops_per_s", "memory_bytes_per_s")}
    faster = topology.with_constants({name: _FASTER * rate for name, rate in rates.items() if rate})
    counts, seconds = Counter(site.geometry() for site in attentions.values()), 0.0
    for (key, site), plan in zip(_distinct(attentions).items(), plans, strict=True):
        layers = counts[key] if site.parts > 1 else 1
        schedule = plan.best.schedule(site, topology)
        seconds += counts[key] * price(schedule, faster, other_s / _FASTER, layers).seconds
    return seconds
