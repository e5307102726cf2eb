"""The simulator: exact on small cases by hand, against an event queue, bytes, limits, contention, two-sided costs."""

from __future__ import annotations

import heapq
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from random_sites import attention_site, gather_site, random_case

from sfcompile.codegen.plan.simulator import CODED_AS_BYTES, Compute, Phase, Work, simulate
from sfcompile.codegen.plan.step import layer
from sfcompile.codegen.schedule.builders import BUILDERS, build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.options import Wire
from sfcompile.runtime.program.instructions import Attend, Forward, Push, Wait
from sfcompile.runtime.program.phases import ATTEND
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology

PLAIN: dict[str, Any] = {
    "flops_per_s": 1.0, "memory_bytes_per_s": 1e18, "local_bytes_per_s": 1.0, "local_latency_s": 0.0,
    "network_bytes_per_s": 1.0, "network_latency_s": 0.0, "launch_s": 0.0, "message_s": 0.0,
    "copy_bytes_per_s": None, "wait_s": 0.0, "pairing_s": 0.0,
}  # fmt: skip


def topology(machines: int, inside: int, **constants: Any) -> Topology:
    return Topology.grid(machines, inside, **{**PLAIN, **constants})


def site(ranks: int, heads: int = 4, tokens: int = 24) -> AttentionSite:
    return attention_site(ranks, heads, tokens, head_dim=8)


def mesh(top: Topology, ulysses: int, across: str = "ulysses") -> Mesh:
    return Mesh.of(top, ulysses, top.num_ranks // ulysses, across)


# ---------------------------------------------------------------------- by hand


def test_one_rank_computes_and_nothing_else() -> None:
    top = topology(1, 1)
    line = simulate(layer(build("torus", site(1), mesh(top, 1)), 1, before_s=3.0), top)
    flops = 4 * 4 * 24 * 24 * 8
    assert line.seconds == line.limit_s == 3.0 + flops
    assert line.exposed == 0.0 and line.inside_bytes == line.across_bytes == 0


def test_a_gather_takes_its_bytes_over_the_bandwidth_and_a_latency() -> None:
    """Two ranks on two machines swap shards of 60 bytes at 2 bytes a second."""
    top = topology(2, 1, network_bytes_per_s=2.0, network_latency_s=5.0)
    line = simulate(layer(build("", gather_site(2, tokens=5), mesh(top, 1)), 1), top)
    nbytes = [2 * n * 3 * 4 for n in (2, 3)]
    assert line.seconds == max(nbytes) / 2.0 + 5.0
    assert line.across_bytes == sum(nbytes) and line.limit_s == max(nbytes) / 2.0


def test_ranks_behind_one_card_share_it() -> None:
    """Ulysses over two machines: with one card for two ranks everything that crosses takes twice as long."""
    times = []
    for cards in (1, 2):
        top = topology(2, 2, nics_per_machine=cards, flops_per_s=1e18, local_bytes_per_s=1e18)
        schedule = build("usp", site(4), mesh(top, 2))
        times.append(simulate(layer(schedule, 1), top).seconds)
    assert times[0] == pytest.approx(2 * times[1], rel=0.01)


@pytest.mark.parametrize(("wire", "share"), [("bf16", 1 / 2), ("fp8", (8 + 4) / 32)])
def test_a_smaller_wire_is_sent_sooner(wire: str, share: float) -> None:
    """Rows of 8 elements of fp32: 32 bytes, 16 as bf16, 12 as fp8 with a factor."""
    top = topology(2, 1, flops_per_s=1e18)
    plain = simulate(layer(build("ulysses", site(2), mesh(top, 2)), 1), top)
    schedule = build("ulysses", replace(site(2), wire=Wire(*[wire] * 4)), mesh(top, 2))
    sooner = simulate(layer(schedule, 1), top)
    assert sooner.seconds == pytest.approx(share * plain.seconds)
    assert sooner.across_bytes == share * plain.across_bytes == schedule.bytes_by_link(top)[1]


@pytest.mark.parametrize("kind", ["ulysses", "allgather", "ring"])
def test_coding_costs_a_cpu_time_for_each_element_that_is_coded(kind: str) -> None:
    """On links that cost nothing. What is sent to several ranks is encoded once, what is sent on not at all."""
    top = topology(4, 1, flops_per_s=1e18, network_bytes_per_s=1e18, copy_bytes_per_s=1.0)
    built = build(kind, site(4), mesh(top, 1 if kind == "ring" else 4))
    coded = build(kind, replace(site(4), wire=Wire(*["fp8"] * 4)), built.mesh)
    elements = 6 * 8  # of a head and a rank
    sent, came = {"ulysses": (12, 12), "allgather": (8, 24), "ring": (8, 24)}[kind]  # such chunks, at every rank
    beside = [simulate(layer(each, 1), top).busy_s - _copies(each, top) for each in (built, coded)]
    assert beside[0] == pytest.approx(0.0)
    assert beside[1] == pytest.approx(CODED_AS_BYTES["fp8"] * elements * (sent + came))


def _copies(schedule: Schedule, top: Topology) -> Any:
    """What ranks copy anyway: their own part of q, k and v, what they send, and outputs that come home."""
    own = 3 * 6 * 8 * 4 * (4 if schedule.mesh.ulysses == 1 or schedule.kind == "allgather" else 1)
    moved = np.zeros(top.num_ranks)
    for arrival in schedule.origin.arrivals:  # every rank sends as much as it gets
        moved += schedule.arrival_bytes(arrival) * (2 if arrival.tensor == "o" else 1)
    return own + moved


def test_puts_under_compute_are_hidden() -> None:
    """A transfer of t seconds under t seconds of other work exposes only what comes after."""
    top = topology(2, 1, flops_per_s=1e18)
    schedule = build("ulysses", site(2), mesh(top, 2))
    bare = simulate(layer(schedule, 1), top)
    puts = bare.exposed * 3 / 4  # q, k, v; o comes later
    work = layer(schedule, 1)
    attend = next(i for i, each in enumerate(work) if isinstance(each, Phase) and each.phase == ATTEND)
    hidden = simulate([*work[:attend], Compute(puts, "under the puts"), *work[attend:]], top)
    assert hidden.exposed == pytest.approx(bare.exposed / 4)
    assert hidden.seconds == pytest.approx(bare.seconds)


def test_torus_hides_what_ulysses_exposes() -> None:
    """Four machines, compute and traffic in balance: staging hides most of it, and nothing beats the limit."""
    top = topology(4, 1, network_bytes_per_s=100.0, flops_per_s=3e3)
    staged = simulate(layer(build("torus", site(4, tokens=96), mesh(top, 4)), 1), top)
    blocking = simulate(layer(build("ulysses", site(4, tokens=96), mesh(top, 4)), 1), top)
    assert staged.across_bytes == blocking.across_bytes
    assert staged.exposed < 0.5 * blocking.exposed
    assert staged.limit_s <= staged.seconds < blocking.seconds


def test_two_sided_messages_wait_for_their_receiver() -> None:
    top = topology(2, 1, flops_per_s=1e18, pairing_s=7.0, two_sided_rate=0.5)
    schedule = build("ulysses", site(2), mesh(top, 2))
    one, two = (simulate(layer(schedule, 1), top, two_sided) for two_sided in (False, True))
    # Half the rate, and four groups of messages (q, k, v, o) that meet first.
    assert two.seconds == pytest.approx(2 * one.seconds + 2 * 7.0, rel=0.5) and two.seconds > 2 * one.seconds


def test_two_sided_messages_slow_compute_down() -> None:
    top = topology(1, 4, local_bytes_per_s=10.0, flops_per_s=1e2, slowdown=0.5)
    schedule = build("ring", site(4), mesh(top, 1))
    calm = simulate(layer(schedule, 1), replace(top, slowdown=0.0), two_sided=True)
    slowed = simulate(layer(schedule, 1), top, two_sided=True)
    assert (slowed.compute_s > 1.1 * calm.compute_s).all()


def test_a_sender_that_copies_pays_with_its_own_time() -> None:
    top = topology(2, 2, copy_bytes_per_s=10.0)
    schedule = build("torus", site(4), mesh(top, 2))
    line = simulate(layer(schedule, 1), top)
    assert (line.busy_s > 0).all()
    touched = simulate(layer(schedule, 1), replace(top, touch_bytes_per_s=10.0))
    assert (touched.busy_s > line.busy_s).all()


# ---------------------------------------------------------------------- against an event queue


class EventQueue:
    """The same model the plain way: one event at a time in order of time; a message starts when both its ends are free,
    those of one sender in their order, those that wait for one receiver in order of their readiness."""

    def __init__(self, schedule: Schedule, top: Topology) -> None:
        self.schedule, self.top = schedule, top
        ranks = range(top.num_ranks)
        self.lines = [[step for steps in schedule.program(r).phases.values() for step in steps] for r in ranks]
        self.arrivals = [{a.slot: a for a in schedule.program(r).arrivals} for r in ranks]
        self.at = [0 for _ in ranks]
        self.arrived: list[dict[int, float]] = [{} for _ in ranks]
        self.blocked: dict[int, tuple[int, float]] = {}
        self.busy: set[tuple[str, int]] = set()
        self.waiting: dict[tuple[str, int], list[tuple[float, int, int, int, float]]] = defaultdict(list)
        self.cards = top.nic_of()
        self.queue: list[tuple[float, int, int, Any]] = []
        self.count = 0

    def post(self, when: float, kind: int, what: Any) -> None:
        self.count += 1
        heapq.heappush(self.queue, (when, kind, self.count, what))

    def run(self) -> float:
        for rank in range(self.top.num_ranks):
            self.post(0.0, 1, rank)
        end = 0.0
        while self.queue:
            now, kind, _, what = heapq.heappop(self.queue)
            if kind == 0:
                self.complete(now, *what)
            elif kind == 1:
                end = max(end, now)
                self.step(now, what)
            else:
                self.serve(now)
        assert not self.blocked and all(n == len(line) for n, line in zip(self.at, self.lines, strict=True))
        return end

    def step(self, now: float, rank: int) -> None:
        if self.at[rank] == len(self.lines[rank]):
            return
        step = self.lines[rank][self.at[rank]]
        if isinstance(step, Wait):
            if step.slot not in self.arrived[rank]:
                self.blocked[rank] = (step.slot, now)
                return
            now = max(now, self.arrived[rank][step.slot])
        elif isinstance(step, Attend):
            now += self.attention(rank, step)
        else:
            self.send(now, rank, step)
        self.at[rank] += 1
        self.post(now, 1, rank)

    def attention(self, rank: int, step: Attend) -> float:
        site = self.schedule.site
        assert isinstance(site, AttentionSite)
        start, stop = self.schedule.heads(rank)
        rows = sum(b - a for a, b in (self.schedule.rows("q", c) for c in step.q))
        columns = sum(b - a for a, b in (self.schedule.rows("k", c) for c in step.kv))
        width = site.head_dim + site.v_head_dim
        return 2 * site.batch * (stop - start) * rows * columns * width / self.top.flops_per_s

    def send(self, now: float, rank: int, step: Any) -> None:
        dst = step.q.src if isinstance(step, Push) else step.dst
        slot = step.to_slot if isinstance(step, Forward) else step.slot
        nbytes = float(np.prod(self.schedule.shape(dst, self.arrivals[dst][slot]))) * 4
        way = ("rank", rank) if self.top.same_machine(rank, dst) else ("card", self.cards[rank])
        self.waiting[way].append((now, rank, dst, slot, nbytes))
        self.post(now, 2, None)

    def serve(self, now: float) -> None:
        """Start every message that can start: first come, first served."""
        heads = sorted((queue[0], way) for way, queue in self.waiting.items() if queue)
        for (_, _, dst, slot, nbytes), way in heads:
            local = way[0] == "rank"
            into = ("into rank", dst) if local else ("into card", self.cards[dst])
            if way in self.busy or into in self.busy:
                continue
            self.waiting[way].pop(0)
            self.busy |= {way, into}
            top = self.top
            done = now + nbytes / (top.local_bytes_per_s if local else top.network_bytes_per_s)
            latency = top.local_latency_s if local else top.network_latency_s
            self.post(done, 0, (way, into, dst, slot, latency))

    def complete(
        self, now: float, way: tuple[str, int], into: tuple[str, int], dst: int, slot: int, late: float
    ) -> None:
        self.busy -= {way, into}
        self.arrived[dst][slot] = now + late
        if dst in self.blocked and self.blocked[dst][0] == slot:
            self.post(max(now + late, self.blocked.pop(dst)[1]), 1, dst)
        self.post(now, 2, None)


def by_event_queue(schedule: Schedule, top: Topology) -> float:
    return EventQueue(schedule, top).run()


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize(("machines", "inside", "ulysses", "across"), [
    (2, 2, 2, "ulysses"), (2, 2, 4, "ulysses"), (3, 2, 2, "ring"), (4, 1, 4, "ulysses"), (1, 4, 2, "ulysses"),
])  # fmt: skip
@pytest.mark.parametrize("rate", [20.0, 200.0, 5000.0])
def test_the_sweep_agrees_with_an_event_queue(
    kind: str, machines: int, inside: int, ulysses: int, across: str, rate: float
) -> None:
    """Even sites run in step and both give the same seconds, unless neighbours' messages go different ways."""
    top = topology(
        machines, inside, network_bytes_per_s=rate, local_bytes_per_s=10 * rate, flops_per_s=3e3, network_latency_s=0.5
    )
    schedule = build(kind, site(top.num_ranks, heads=4, tokens=48), mesh(top, ulysses, across))
    mixed = inside > 1 and ulysses > machines
    error = 0.10 if mixed else 1e-6
    assert simulate(layer(schedule, 1), top).seconds == pytest.approx(by_event_queue(schedule, top), rel=error)


def test_on_uneven_sites_the_sweep_is_close() -> None:
    """Shards of wildly different length (some empty) leave step; the approximation stays within a few percent."""
    errors = []
    for seed in range(40):
        case = random_case(seed)
        top = topology(case.mesh.num_ranks, 1, network_bytes_per_s=300.0, flops_per_s=2e3)
        schedule = replace(case.schedule(), site=replace(case.site, causal=False))
        errors.append(simulate(layer(schedule, 1), top).seconds / by_event_queue(schedule, top) - 1.0)
    assert np.mean(np.abs(errors)) < 0.05 and np.max(np.abs(errors)) < 0.35, errors


# ---------------------------------------------------------------------- bytes, spans, scale


@pytest.mark.parametrize("kind", BUILDERS)
def test_bytes_are_those_of_the_schedule(kind: str) -> None:
    top = topology(2, 3)
    schedule = build(kind, site(6), mesh(top, 3), 2, 2)
    line = simulate(layer(schedule, 1), top)
    assert (line.inside_bytes, line.across_bytes) == schedule.bytes_by_link(top)


def test_spans_tell_the_whole_story() -> None:
    top = topology(2, 2, network_bytes_per_s=100.0, flops_per_s=1e3)
    schedule = build("torus", site(4), mesh(top, 2))
    line = simulate(layer(schedule, 1, before_s=1.0), top, record=True)
    for rank in range(4):
        mine = [span for span in line.spans if span.rank == rank]
        computing = sum(s.stop_s - s.start_s for s in mine if s.lane == "compute")
        waiting = sum(s.stop_s - s.start_s for s in mine if s.lane == "wait")
        assert computing == pytest.approx(line.compute_s[rank]) and waiting == pytest.approx(line.exposed_s[rank])
    assert sum(s.nbytes for s in line.spans if s.lane == "network") == line.across_bytes
    assert sum(s.nbytes for s in line.spans if s.lane == "send") == line.inside_bytes
    assert simulate(layer(schedule, 1, before_s=1.0), top).seconds == line.seconds


def test_layers_in_a_row_reuse_slots() -> None:
    top = topology(2, 1)
    schedule = build("torus", site(2), mesh(top, 2))
    steps: list[Work] = [step for epoch in (1, 2, 3) for step in layer(schedule, epoch, before_s=2.0)]
    assert [type(step) for step in steps[:2]] == [Compute, Phase]
    one, three = simulate(steps[: len(steps) // 3], top), simulate(steps, top)
    assert three.seconds == pytest.approx(3 * one.seconds) and three.across_bytes == 3 * one.across_bytes


def test_a_thousand_ranks() -> None:
    """128 machines of 8 in seconds that are printed, not asserted."""
    top = Topology.parse("128x8:a100-efa")
    schedule = build("torus", site(1024, heads=24, tokens=102400), Mesh.of(top, 8, 128))
    start = time.perf_counter()
    line = simulate(layer(schedule, 1), top)
    print(f"{schedule.title}: {time.perf_counter() - start:.2f} s to simulate 1024 ranks")
    assert line.seconds >= line.limit_s > 0 and line.compute_s.shape == (1024,)
