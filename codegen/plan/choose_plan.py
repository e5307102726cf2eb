"""The planner: how one attention site runs, chosen by price among everything that is legal.

Enumerates meshes Ulysses x ring, the axis that crosses machines, schedules, bundles and chunkings; prices each with the
simulator on the topology; picks the cheapest. Ulysses, ring and USP as their users run them are points of this space,
so the pick is never priced above them. Every candidate that was not taken keeps its reason.

Searching stops early where it can: no candidate ends before its own compute and its own bytes over the bandwidth, so
one whose bound is above the best price so far is turned down without a simulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

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
    legal: list[tuple[float, Candidate, AttentionSchedule]] = []
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
        before_s = other_s if site.parts == 1 else 0.0
        legal.append((before_s + least_seconds(built, topology), candidate, built))
    if not legal:
        raise _nothing_left(site, topology, asked, schedule, refused)
    priced: list[tuple[Timeline, Candidate, AttentionSchedule]] = []
    for bound, candidate, built in sorted(legal, key=lambda entry: entry[0]):
        best = min((line.seconds for line, _, _ in priced), default=float("inf"))
        if bound > best:
            refused.append(Priced(candidate, f"its compute and traffic alone take {bound * 1e3:.3f} ms"))
        else:
            priced.append((price(built, topology, other_s, layers), candidate, built))
    priced.sort(key=lambda entry: entry[0].seconds)
    for _, candidate, _ in priced[:REFINED]:
        if topology.num_ranks == 1 or site.parts > 1:
            break
        for q_parts, kv_parts in PARTS:
            cut = replace(candidate, q_parts=q_parts, kv_parts=kv_parts)
            if cut.kind == "allgather" and q_parts > 1:
                continue
            try:
                built = _built(cut, site, topology)
            except (MeshError, ScheduleError) as error:
                refused.append(Priced(cut, error.what))
                continue
            priced.append((price(built, topology, other_s), cut, built))
    priced.sort(key=lambda entry: entry[0].seconds)
    least = priced[0][0].seconds
    rows = [_priced(line, candidate, built, least) for line, candidate, built in priced]
    rows[0] = replace(rows[0], reason="")
    return SitePlan(priced[0][1], (*rows, *refused))


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


def least_seconds(schedule: AttentionSchedule, topology: Topology) -> float:
    """No run of a schedule ends before its busiest rank has computed and its busiest link has carried its bytes."""
    site = schedule.site
    parts = range(schedule.q_parts)
    queries = np.zeros(topology.num_ranks)
    groups = range(schedule.mesh.ulysses) if schedule.split_heads else range(1)
    for a in groups:
        origin = schedule.mesh.ranks_after(schedule.mesh.offset(a, 0))
        queries += np.sum([schedule.row_counts("q", part) for part in parts], axis=0)[origin]
    keys = sum(int(schedule.row_counts("k", part).sum()) for part in range(schedule.kv_parts))
    flops = 2.0 * site.batch * schedule.head_counts("q") * queries * keys * (site.head_dim + site.v_head_dim)
    compute = float(flops.max(initial=0.0)) / (topology.attention_flops_per_s or topology.flops_per_s)
    if site.causal:
        compute /= 2
    inside, across = schedule.bytes_by_link(topology)
    cards = len(set(topology.nic_of()))
    links = max(inside / topology.num_ranks / topology.local_bytes_per_s, across / cards / topology.network_bytes_per_s)
    return max(compute, links)


def _priced(line: Timeline, candidate: Candidate, built: AttentionSchedule, best: float) -> Priced:
    reason = f"{line.seconds / best:.2f} x the best"
    if line.exposed > 0.25 * line.seconds:
        reason += f", {line.exposed / line.seconds:.0%} of it exposed"
    return Priced(
        candidate, reason, line.seconds, line.exposed, line.limit_s, line.inside_bytes, line.across_bytes,
        2 * built.heap_bytes,
    )  # fmt: skip
