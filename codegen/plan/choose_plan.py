"""The planner: how one attention site runs, chosen by price among everything that is legal.

Enumerates meshes Ulysses x ring, the axis that crosses machines, schedules, bundles and chunkings; prices each with the
simulator on the topology; picks the cheapest. Ulysses, ring and USP as their users run them are points of this space,
so the pick is never priced above them. Every candidate that was not taken keeps its reason.

Searching stops early where it can: no candidate ends before its own compute and its own bytes over the bandwidth, so
one whose bound is above the best price so far is turned down without a simulation. On many ranks a second bound, of the
calls, messages and waits that every rank makes, turns down nearly all that is left (bounds.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from sfcompile.codegen.plan.bounds import Bounds, bounds, more_waits
from sfcompile.codegen.plan.simulator import Timeline
from sfcompile.codegen.plan.step import price
from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.builders import REGISTERED, build
from sfcompile.codegen.schedule.mesh import ACROSS, Mesh
from sfcompile.errors import MeshError, ScheduleError
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology

PARTS = ((1, 2), (2, 1), (2, 2), (1, 4), (4, 4))
"""Chunkings tried on the best candidates: (Q parts, KV parts)."""
REFINED = 3
"""How many of the best candidates are cut into parts."""
PRICED_ALL = 64
"""Up to so many ranks a price costs little, and the table has one for whatever traffic does not rule out."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a site; ``across`` is the mesh's outer axis (codegen/schedule/mesh.py and builders.py)."""

    kind: str
    ulysses: int
    ring: int
    across: str = "ulysses"
    lanes: int = 1
    q_parts: int = 1
    kv_parts: int = 1

    def mesh(self, topology: Topology) -> Mesh:
        """Where the candidate puts each rank of a topology, whose size is ``ulysses * ring``."""
        return Mesh.of(topology, self.ulysses, self.ring, self.across, self.lanes)

    def schedule(self, site: AttentionSite, topology: Topology) -> AttentionSchedule:
        """What all ranks do for a site, built anew (slow on many ranks) and not yet proved."""
        return build(self.kind, site, self.mesh(topology), self.q_parts, self.kv_parts)

    @property
    def degrees(self) -> tuple[int, int]:
        """Ulysses and ring degree as a user counts them: an all-gather splits no heads."""
        return (1, self.ulysses * self.ring) if self.kind == "allgather" else (self.ulysses, self.ring)

    def __str__(self) -> str:
        ulysses, ring = self.degrees
        text = f"{self.kind} {ulysses}x{ring}"
        if self.kind != "allgather" and ulysses > 1 and ring > 1:
            text += f" {self.across} across"
        if self.kind == "allgather" and self.ring > 1:
            text += " by machine"
        if self.lanes > 1:
            text += f" by {self.lanes}"
        if (self.q_parts, self.kv_parts) != (1, 1):
            text += f" {self.q_parts}Q {self.kv_parts}KV"
        return text


@dataclass(frozen=True)
class Priced:
    """A candidate and what it costs a layer; ``reason`` says why it was not taken, and is empty for the one that was.

    ``seconds`` is None if it was not simulated: not legal, or its bound is above the best.
    """

    candidate: Candidate
    reason: str
    seconds: float | None = None
    exposed_s: float = 0.0
    limit_s: float = 0.0
    inside_bytes: int = 0
    across_bytes: int = 0
    heap_bytes: int = 0


@dataclass(frozen=True)
class SitePlan:
    """The plan of one site: the pick, and every row of the search, best first."""

    best: Candidate
    rows: tuple[Priced, ...]

    @property
    def price(self) -> Priced:
        """The pick's row."""
        return self.rows[0]

    def __str__(self) -> str:
        head = (
            f"{'plan':<38}{'ms/layer':>9}{'exposed':>9}{'limit':>9}{'across MiB':>11}{'inside MiB':>11}{'heap MiB':>9}"
            "  why not"
        )
        return "\n".join([head, *(_line(row) for row in self.rows)])


def _line(row: Priced) -> str:
    if row.seconds is None:
        return f"{str(row.candidate):<38}{'-':>9}{'-':>9}{'-':>9}{'-':>11}{'-':>11}{'-':>9}  {row.reason}"
    return (
        f"{str(row.candidate):<38}{row.seconds * 1e3:>9.3f}{row.exposed_s * 1e3:>9.3f}{row.limit_s * 1e3:>9.3f}"
        f"{row.across_bytes / 2**20:>11.1f}{row.inside_bytes / 2**20:>11.1f}{row.heap_bytes / 2**20:>9.1f}"
        f"  {row.reason or '<- taken'}"
    )


def plan_site(
    site: AttentionSite,
    topology: Topology,
    other_s: float = 0.0,
    mesh: Mapping[str, int] | None = None,
    schedule: str = "auto",
    layers: int = 1,
) -> SitePlan:
    """The cheapest legal way to run a site; kept, so that layers and compiles of the same shape ask once.

    Args:
        site: for all ranks of the topology.
        other_s: seconds that a rank computes between two sites.
        mesh: degrees that the user asked for, or None.
        schedule: "auto", or what the user asked for: "torus", "ulysses", "ring", "usp" or a registered one.
        layers: how many attentions like it follow each other; prices are means over them.

    Raises:
        MeshError: nothing legal is left; says why for each.
    """
    asked = None if mesh is None else (mesh["ulysses"], mesh["ring"])
    return _plan(
        replace(site, name="site"), topology, round(other_s, 9), asked, schedule, layers if site.parts > 1 else 1
    )


@lru_cache(maxsize=256)
def _plan(
    site: AttentionSite,
    topology: Topology,
    other_s: float,
    asked: tuple[int, int] | None,
    schedule: str,
    layers: int,
) -> SitePlan:
    refused: list[Priced] = []
    legal: list[_Legal] = []
    for candidate in candidates(topology):
        reason = _refuse(candidate, site, topology, asked, schedule)
        if reason:
            refused.append(Priced(candidate, reason))
            continue
        candidate = replace(candidate, q_parts=site.parts, kv_parts=site.parts)
        try:
            built = _built(candidate, site, topology)
        except (MeshError, ScheduleError) as error:
            refused.append(Priced(candidate, error.what))
            continue
        # In parts, the compute between attentions may run under the traffic too.
        legal.append(_Legal(candidate, built, bounds(built, topology), other_s if site.parts == 1 else 0.0))
    if not legal:
        raise _nothing_left(site, topology, asked, schedule, refused)
    priced = _cheapest(legal, refused, lambda built: price(built, topology, other_s, layers))
    if site.parts == 1 and topology.num_ranks > 1:
        priced += _refined(priced[:REFINED], refused, site, topology, other_s)
    priced.sort(key=lambda entry: entry[0].seconds)
    least = priced[0][0].seconds
    rows = [_priced(line, candidate, built, least) for line, candidate, built in priced]
    rows[0] = replace(rows[0], reason="")
    return SitePlan(priced[0][1], (*rows, *refused))


@dataclass(frozen=True)
class _Legal:
    """A candidate that may be taken, and what its price cannot be below: ``before_s`` and the larger bound."""

    candidate: Candidate
    built: AttentionSchedule
    bounds: Bounds
    before_s: float

    @property
    def traffic_s(self) -> float:
        return self.before_s + self.bounds.traffic_s

    @property
    def least_s(self) -> float:
        return self.before_s + self.bounds.least_s


_PricedSchedule = tuple[Timeline, Candidate, AttentionSchedule]


def _cheapest(
    legal: Sequence[_Legal], refused: list[Priced], timed: Callable[[AttentionSchedule], Timeline]
) -> list[_PricedSchedule]:
    """Price what may be among the REFINED best; best first. The others join ``refused`` with the bound that says so.

    On few ranks everything is priced that traffic does not rule out, for the table that people read. On many, those of
    small bounds go first and one that cannot be among the REFINED best is ruled out by them: the best are the same.
    """
    by_traffic = sorted(legal, key=lambda entry: entry.traffic_s)
    few = legal[0].built.mesh.num_ranks <= PRICED_ALL
    prices: dict[int, Timeline] = {}  # by the place in by_traffic, which decides between equal prices
    for at in range(len(legal)) if few else sorted(range(len(legal)), key=lambda at: by_traffic[at].least_s):
        best = min((line.seconds for line in prices.values()), default=math.inf)
        if by_traffic[at].traffic_s > best:
            continue
        seconds = sorted(line.seconds for known, line in prices.items() if by_traffic[known].traffic_s <= best)
        if few or len(seconds) < REFINED or by_traffic[at].least_s <= seconds[REFINED - 1]:
            prices[at] = timed(by_traffic[at].built)
    best = min(line.seconds for line in prices.values())
    for at, entry in enumerate(by_traffic):
        if entry.traffic_s > best:
            prices.pop(at, None)
        if at not in prices:
            refused.append(_ruled_out(entry.candidate, entry.traffic_s, entry.least_s, best))
    order = sorted(prices, key=lambda at: (prices[at].seconds, at))
    return [(prices[at], by_traffic[at].candidate, by_traffic[at].built) for at in order]


def _ruled_out(candidate: Candidate, traffic_s: float, least_s: float, best: float) -> Priced:
    if traffic_s > best:
        return Priced(candidate, f"its compute and traffic alone take {traffic_s * 1e3:.3f} ms")
    return Priced(candidate, f"its compute, calls, messages and waits alone take {least_s * 1e3:.3f} ms")


def _refined(
    best: Sequence[_PricedSchedule], refused: list[Priced], site: AttentionSite, topology: Topology, other_s: float
) -> list[_PricedSchedule]:
    """The best candidates with their chunks cut into parts, priced; on many ranks only what may be the best of all."""
    few = topology.num_ranks <= PRICED_ALL
    least = best[0][0].seconds
    priced: list[_PricedSchedule] = []
    for _, candidate, whole in best:
        for q_parts, kv_parts in PARTS:
            cut = replace(candidate, q_parts=q_parts, kv_parts=kv_parts)
            if cut.kind == "allgather" and q_parts > 1:
                continue
            if not few and cut.kind not in REGISTERED:
                waits_s = more_waits(whole, q_parts, kv_parts) * topology.wait_s
                least_s = other_s + bounds(whole, topology).work_s + waits_s
                if least_s > least:
                    refused.append(_ruled_out(cut, 0.0, least_s, least))
                    continue
            try:
                built = _built(cut, site, topology)
            except (MeshError, ScheduleError) as error:
                refused.append(Priced(cut, error.what))
                continue
            least_s = other_s + bounds(built, topology).least_s
            if not few and least_s > least:
                refused.append(_ruled_out(cut, 0.0, least_s, least))
                continue
            priced.append((price(built, topology, other_s), cut, built))
            least = min(least, priced[-1][0].seconds)
    return priced


def _built(candidate: Candidate, site: AttentionSite, topology: Topology) -> AttentionSchedule:
    """The candidate's schedule; one of a builder from outside is proved before it is priced."""
    built = candidate.schedule(site, topology)
    if candidate.kind in REGISTERED:
        check(built)
    return built


def forget_plans() -> None:
    """Plan anew from now on: the set of candidates has changed."""
    _plan.cache_clear()


def candidates(topology: Topology) -> Iterator[Candidate]:
    """Every mesh, placement and schedule of so many ranks, uncut."""
    ranks, machines = topology.num_ranks, topology.num_machines
    for ulysses in (u for u in range(1, ranks + 1) if ranks % u == 0):
        ring = ranks // ulysses
        both = machines > 1 and ulysses > 1 and ring > 1
        for across in ACROSS if both else ACROSS[:1]:
            if ulysses == ranks:
                kind = "ulysses"
            elif ulysses == 1:
                kind = "ring"
            else:
                kind = "tas" if both and across == "ulysses" else "usp"
            yield Candidate(kind, ulysses, ring, across)
            for name in REGISTERED:
                yield Candidate(name, ulysses, ring, across)
            if ulysses == 1:
                continue
            yield Candidate("torus", ulysses, ring, across)
            lanes = ulysses // machines
            if across == "ulysses" and 1 < lanes < ulysses and ulysses % machines == 0:
                yield Candidate("torus", ulysses, ring, across, lanes)
    yield Candidate("allgather", ranks, 1)
    if 1 < machines < ranks and ranks % machines == 0:
        yield Candidate("allgather", machines, ranks // machines)


def _refuse(
    candidate: Candidate, site: AttentionSite, topology: Topology, asked: tuple[int, int] | None, schedule: str
) -> str:
    """Why a candidate is not legal, or not what the user asked for; empty if it is."""
    splits_heads = candidate.kind != "allgather" and candidate.kind not in REGISTERED
    if splits_heads and candidate.ulysses > site.heads:
        return f"{site.heads} heads for {candidate.ulysses} Ulysses ranks"
    if asked is not None and candidate.degrees != asked:
        return f"mesh asked for: ulysses {asked[0]} x ring {asked[1]}"
    if asked is not None and candidate.kind == "allgather":
        return "a mesh was asked for"
    usp = candidate.kind in ("usp", "tas") and (candidate.across == "ring" or topology.num_machines == 1)
    splits = any(topology.num_ranks % u == 0 for u in range(2, site.heads + 1))
    # A torus of one group is a ring: taken for it if heads cannot be split, or if that mesh was asked for.
    one_group = candidate.ulysses == 1 and candidate.kind == "ring" and (not splits or asked == candidate.degrees)
    wanted = {
        "auto": True,
        "torus": candidate.kind == "torus" or one_group,
        "ulysses": candidate.kind == "ulysses",
        "ring": candidate.kind == "ring",
        "usp": usp or topology.num_ranks == 1,
    }
    return "" if wanted.get(schedule, candidate.kind == schedule) else f"schedule asked for: {schedule}"


def _nothing_left(
    site: AttentionSite, topology: Topology, asked: tuple[int, int] | None, schedule: str, refused: list[Priced]
) -> MeshError:
    wish = f"schedule={schedule!r}" + (f" with mesh ulysses {asked[0]} x ring {asked[1]}" if asked else "")
    reasons = sorted({row.reason for row in refused if "asked for" not in row.reason})
    return MeshError(
        f"{wish} is not possible for attention with {site.heads} heads on {topology.num_ranks} ranks of "
        f"{topology.num_machines} machines",
        "; ".join(reasons) or "no mesh of these ranks is of that kind",
        f"use ulysses <= {site.heads}, or leave schedule and mesh to the planner",
    )


def _priced(line: Timeline, candidate: Candidate, built: AttentionSchedule, best: float) -> Priced:
    reason = f"{line.seconds / best:.2f} x the best"
    if line.exposed > 0.25 * line.seconds:
        reason += f", {line.exposed / line.seconds:.0%} of it exposed"
    return Priced(
        candidate, reason, line.seconds, line.exposed, line.limit_s, line.inside_bytes, line.across_bytes,
        2 * built.heap_bytes,
    )  # fmt: skip
