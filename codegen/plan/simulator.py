"""Predict when every rank does what: a discrete-event simulation of schedules on a topology.

All ranks run one program (codegen/schedule/schedule.py), and a schedule that passed the checker has every put before
its wait on the line. So one sweep along the line, with the clocks of all ranks as one vector, meets every event after
those it depends
on: no event queue is needed, and a thousand ranks cost little more than four.

    rank       one compute stream: attention calls, waits, the sender's part of messages, in program order
    port       each rank's port inside its machine, each way: one message at a time
    card       each network card, each way: one message at a time, first come first served among the ranks behind it
    message    starts when the sender has issued it and the way is free at both ends; arrives a latency after its end

Approximation, stated once: messages of one instruction are served by readiness; those of an earlier instruction go
before those of a later one. On symmetric programs ranks run in step and that is the true order (tests/codegen compare
it with an event queue).

Two-sided messages (what NCCL send/recv do): sender and receiver must both have reached the instruction, both pay
``pairing_s``, links reach ``two_sided_rate`` of their bandwidth and compute loses ``slowdown`` while bytes flow.
Outside an exchange of all with all, a rank sends to one peer at a time, at most ``pair_bytes_per_s`` between machines.
Staged schedules double-buffer their receives: those of a stage are posted when the stage before the last begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.runtime.program.instructions import Attend, Chunk, Forward, Instruction, Push, Put, Wait
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.spans import Span
from sfcompile.runtime.program.topology import Topology

Vector = NDArray[np.float64]
T = TypeVar("T", float, Vector)


@dataclass(frozen=True)
class Compute:
    """Work between sites: seconds of every rank."""

    seconds: float
    name: str = "compute"


@dataclass(frozen=True)
class Phase:
    """One phase of a site's epoch, for one part of the tokens or (-1) all; epochs number the site calls of a run."""

    schedule: Schedule
    epoch: int
    phase: str
    part: int = -1

    def has(self, step: Instruction) -> bool:
        """Whether an instruction of the phase belongs to the part."""
        if self.part == -1:
            return True
        if isinstance(step, Put):
            return step.piece == self.part
        chunk = next(a.chunk for a in self.schedule.origin.arrivals if isinstance(step, Wait) and a.slot == step.slot)
        return chunk.piece == self.part


Step = Compute | Phase


@dataclass(frozen=True)
class Timeline:
    """What a run is predicted to take. Seconds and bytes; vectors are by rank.

    Attributes:
        seconds: when the last rank ends.
        compute_s: time each rank computes.
        exposed_s: time each rank is blocked in waits.
        busy_s: what messages cost each rank's compute stream.
        inside_bytes, across_bytes: bytes moved inside machines and between machines, all ranks.
        limit_s: no schedule of this work and these bytes ends sooner: the larger of the busiest rank's compute alone
            and the busiest link's bytes over its bandwidth.
        spans: every event, if asked for.
    """

    seconds: float
    compute_s: Vector
    exposed_s: Vector
    busy_s: Vector
    inside_bytes: int
    across_bytes: int
    limit_s: float
    spans: list[Span] = field(default_factory=list, repr=False)

    @property
    def exposed(self) -> float:
        """Seconds that the most blocked rank waits."""
        return float(self.exposed_s.max(initial=0.0))


def layer(schedule: Schedule, epoch: int, before_s: float = 0.0, under_s: float = 0.0) -> list[Step]:
    """One transformer layer around an attention site.

    Args:
        before_s: compute before q, k and v exist.
        under_s: compute between the puts and the attention (projections of another stream, norms, an MLP).
    """
    phases = [Phase(schedule, epoch, name) for name in schedule.origin.phases]
    puts = [phase for phase in phases if phase.phase.startswith("put_") or phase.phase == "gather_start"]
    steps: list[Step] = [Compute(before_s, "layer"), *puts, Compute(under_s, "under the puts"), *phases[len(puts) :]]
    return [step for step in steps if not (isinstance(step, Compute) and step.seconds == 0.0)]


def pipelined(schedule: Schedule, layers: int, before_s: float) -> list[Step]:
    """Layers whose tokens come in parts: a part's outputs are collected and its next q, k and v computed and sent
    while the other parts are still on their way.

    Args:
        before_s: compute between two attentions, all parts together.
    """
    parts = schedule.site.parts if isinstance(schedule.site, AttentionSite) else 1
    steps: list[Step] = []
    for epoch in range(1, layers + 1):
        for part in range(parts):
            if epoch > 1:
                steps.append(Phase(schedule, epoch - 1, "collect", part))
            if before_s:
                steps.append(Compute(before_s / parts, "layer"))
            steps += [Phase(schedule, epoch, name, part) for name in ("put_k", "put_v", "put_q")]
        steps.append(Phase(schedule, epoch, "attend"))
    return [*steps, *(Phase(schedule, layers, "collect", part) for part in range(parts))]


def price(schedule: Schedule, topology: Topology, before_s: float, layers: int = 1) -> Timeline:
    """One layer of so many, on average. If tokens come in parts, layers overlap: the first is simulated alone, all
    others are what the second of two adds, so that few layers pay for filling and draining and many hardly do.
    """
    if not isinstance(schedule.site, AttentionSite) or schedule.site.parts == 1:
        return simulate(layer(schedule, 1, before_s), topology)
    one = simulate(pipelined(schedule, 1, before_s), topology)
    if layers == 1:
        return one
    two = simulate(pipelined(schedule, 2, before_s), topology)

    def mean(first: T, both: T) -> T:
        made: T = (first + (layers - 1) * (both - first)) / layers
        return made

    return replace(
        two, seconds=mean(one.seconds, two.seconds), compute_s=mean(one.compute_s, two.compute_s),
        exposed_s=mean(one.exposed_s, two.exposed_s), busy_s=mean(one.busy_s, two.busy_s),
        inside_bytes=one.inside_bytes, across_bytes=one.across_bytes, limit_s=mean(one.limit_s, two.limit_s),
    )  # fmt: skip


def simulate(steps: Sequence[Step], topology: Topology, two_sided: bool = False, record: bool = False) -> Timeline:
    """Run steps on every rank.

    Args:
        steps: in program order, the same on every rank; schedules must have passed the checker.
        topology: ranks, links and rates.
        two_sided: messages pair sender and receiver (NCCL) instead of one-sided puts.
        record: keep every event as a span (slower).
    """
    sweep = _Sweep(topology, two_sided, record)
    for step in steps:
        if isinstance(step, Compute):
            sweep.compute(np.full(topology.num_ranks, step.seconds), step.name)
        else:
            sweep.phase(step)
    return sweep.timeline()


class _Links:
    """Ports and cards: when each is free, and how many bytes went through."""

    def __init__(self, topology: Topology, two_sided: bool) -> None:
        ranks = topology.num_ranks
        self.topology = topology
        self.machine = np.array(topology.machine_of)
        cards = np.unique(np.array(topology.nic_of()), return_inverse=True)[1]
        self.cards = cards
        count = int(cards.max(initial=0)) + 1
        self.port_out, self.port_in = np.zeros(ranks), np.zeros(ranks)
        self.card_out, self.card_in = np.zeros(count), np.zeros(count)
        self.port_bytes = np.zeros((2, ranks))
        self.card_bytes = np.zeros((2, count))
        rate = topology.two_sided_rate if two_sided else 1.0
        self.local_rate = topology.local_bytes_per_s * rate
        self.network_rate = topology.network_bytes_per_s * rate

    def send(self, ready: Vector, dst: NDArray[np.int64], nbytes: Vector) -> tuple[Vector, Vector, NDArray[np.bool_]]:
        """``(start, end, crosses)`` of one message per sender; ``dst`` is a permutation of the ranks."""
        crosses = self.machine[dst] != self.machine
        start, end = ready.copy(), ready.copy()
        local = np.flatnonzero(~crosses)
        if local.size:
            to = dst[local]
            start[local] = np.maximum(ready[local], np.maximum(self.port_out[local], self.port_in[to]))
            end[local] = start[local] + nbytes[local] / self.local_rate
            self.port_out[local] = end[local]
            self.port_in[to] = end[local]
            self.port_bytes[0, local] += nbytes[local]
            self.port_bytes[1, to] += nbytes[local]
        far = np.flatnonzero(crosses)
        if far.size:
            self._cross(far, ready, dst, nbytes, start, end)
        return start, end, crosses

    def _cross(
        self, far: NDArray[np.int64], ready: Vector, dst: NDArray[np.int64], nbytes: Vector, start: Vector, end: Vector
    ) -> None:
        order = far[np.lexsort((ready[far], self.cards[far]))]
        cards = self.cards[order]
        first = np.flatnonzero(np.diff(cards, prepend=-1))
        turn = np.arange(order.size) - np.repeat(first, np.diff(np.append(first, order.size)))
        for k in range(int(turn.max()) + 1):
            senders = order[turn == k]
            out, to = self.cards[senders], self.cards[dst[senders]]
            # Two senders of one turn may meet at one card: then one after the other, by readiness.
            groups = [senders] if np.unique(to).size == to.size else [
                np.array([who]) for who in senders[np.argsort(ready[senders], kind="stable")]
            ]  # fmt: skip
            for who in groups:
                out, to = self.cards[who], self.cards[dst[who]]
                start[who] = np.maximum(ready[who], np.maximum(self.card_out[out], self.card_in[to]))
                end[who] = start[who] + nbytes[who] / self.network_rate
                self.card_out[out] = end[who]
                self.card_in[to] = end[who]
        np.add.at(self.card_bytes[0], self.cards[far], nbytes[far])
        np.add.at(self.card_bytes[1], self.cards[dst[far]], nbytes[far])

    def least_s(self) -> float:
        """Seconds that the busiest link needs for its bytes at full bandwidth."""
        local = self.port_bytes.max(initial=0.0) / self.topology.local_bytes_per_s
        return float(max(local, self.card_bytes.max(initial=0.0) / self.topology.network_bytes_per_s))


class _Facts:
    """Sizes of one schedule for all ranks, computed once."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.arrivals = {arrival.slot: arrival for arrival in schedule.origin.arrivals}
        self.nbytes = {slot: schedule.arrival_bytes(a).astype(np.float64) for slot, a in self.arrivals.items()}
        self._rows: dict[tuple[str, tuple[Chunk, ...]], Vector] = {}

    def rows(self, tensor: str, chunks: tuple[Chunk, ...]) -> Vector:
        """Tokens of some chunks together, at every rank."""
        key = tensor, chunks
        if key not in self._rows:
            mesh = self.schedule.mesh
            counts = [self.schedule.row_counts(tensor, c.piece)[mesh.ranks_after(c.src)] for c in chunks]
            self._rows[key] = np.sum(counts, axis=0).astype(np.float64)
        return self._rows[key]

    def own_bytes(self, tensor: str) -> Vector:
        """Bytes of the part of a tensor that stays with its rank."""
        site = self.schedule.site
        if not isinstance(site, AttentionSite):
            return np.zeros(self.schedule.mesh.num_ranks)
        pieces = self.schedule.q_pieces if tensor == "q" else self.schedule.kv_pieces
        rows = np.sum([self.schedule.row_counts(tensor, p) for p in range(pieces)], axis=0)
        width = site.v_head_dim if tensor == "v" else site.head_dim
        sizes: Vector = site.batch * self.schedule.head_counts(tensor) * rows * float(width * site.dtype.itemsize)
        return sizes


@dataclass(frozen=True)
class _Message:
    """One message per rank, of one instruction."""

    ready: Vector
    dst: NDArray[np.int64]
    nbytes: Vector
    name: str
    alone: bool


class _Sweep:
    def __init__(self, topology: Topology, two_sided: bool, record: bool) -> None:
        self.topology = topology
        self.two_sided = two_sided
        ranks = topology.num_ranks
        self.clock = np.zeros(ranks)
        self.compute_s, self.exposed_s, self.busy_s = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
        self.alone_s = np.zeros(ranks)
        self.flying_until = np.zeros(ranks)
        self.streams = np.zeros(ranks)  # when each rank's lone two-sided message between machines ends
        self.links = _Links(topology, two_sided)
        self.unposted: dict[tuple[int, int], _Message] = {}
        self.posts: list[Vector] = []  # clocks at the start of the last two attention calls
        self.arrived: dict[tuple[int, int], Vector] = {}
        self.crossed: dict[tuple[int, int], NDArray[np.bool_]] = {}
        self.touched: set[tuple[int, Chunk]] = set()
        self.bytes = [0, 0]
        self.spans: list[Span] | None = [] if record else None
        self._facts: dict[int, _Facts] = {}

    def timeline(self) -> Timeline:
        limit = max(float(self.alone_s.max(initial=0.0)), self.links.least_s())
        seconds = float(self.clock.max(initial=0.0))
        inside, across = self.bytes
        return Timeline(
            seconds, self.compute_s, self.exposed_s, self.busy_s, inside, across, min(limit, seconds), self.spans or []
        )

    # ------------------------------------------------------------------ steps

    def compute(self, seconds: Vector, name: str, alone: Vector | None = None) -> None:
        self.alone_s += seconds if alone is None else alone
        if self.two_sided and self.topology.slowdown:
            under = np.minimum(seconds, np.maximum(0.0, self.flying_until - self.clock))
            seconds = seconds + under * self.topology.slowdown / (1.0 - self.topology.slowdown)
        self._record("compute", name, self.clock, self.clock + seconds)
        self.clock = self.clock + seconds
        self.compute_s += seconds

    def phase(self, call: Phase) -> None:
        schedule = call.schedule
        facts = self._facts.setdefault(id(schedule), _Facts(schedule))
        top = self.topology
        if call.phase.startswith("put_") and top.copy_bytes_per_s is not None:
            share = 1 if call.part == -1 else getattr(schedule.site, "parts", 1)
            self._busy(facts.own_bytes(call.phase[-1]) / share / top.copy_bytes_per_s)
        peer: int | None = None  # messages to one peer in a row go out, and meet the receiver, together
        for step in schedule.origin.phases[call.phase]:
            if not call.has(step):
                continue
            match step:
                case Put(_, _, dst, slot) | Forward(_, dst, slot) | Push(Chunk(dst), slot):
                    alone = schedule.staged or isinstance(step, Forward) or schedule.mesh.step(dst)[0] == 0
                    self._send(facts, call.epoch, dst, slot, str(step), dst != peer, alone)
                    peer = dst
                case Wait(slot, _):
                    self._wait(facts, call.epoch, slot)
                case Attend():
                    self._attend(facts, call.epoch, step)
                    peer = None

    def _busy(self, seconds: Vector | float) -> None:
        self.clock = self.clock + seconds
        self.busy_s += seconds

    def _send(self, facts: _Facts, epoch: int, offset: int, slot: int, name: str, first: bool, alone: bool) -> None:
        top = self.topology
        dst = facts.schedule.mesh.ranks_after(offset)
        nbytes = facts.nbytes[slot][dst]
        crosses = self.links.machine[dst] != self.links.machine
        if self.two_sided and first:
            self._busy(top.pairing_s)
            ready = np.maximum(self.clock, self.clock[dst])
        else:
            ready = self.clock
        message_s = top.message_s if first else 0.0
        ready = ready + message_s
        if top.copy_bytes_per_s is not None:  # this thread copies: into the peer's memory, or into a send buffer
            ready = ready + np.where(crosses, nbytes / top.copy_bytes_per_s, 0.0)
        if top.touch_bytes_per_s is not None:
            ready = ready + np.where(crosses, nbytes / top.touch_bytes_per_s, 0.0)
        message = _Message(ready, dst, nbytes, name, alone)
        if self.two_sided and facts.schedule.staged:
            # Its receive is posted a stage ahead: the transfer is timed at its wait.
            self.unposted[epoch, slot] = message
            self._busy(message_s)
            return
        start, end = self._transfer(epoch, slot, message)
        after = ready
        if top.copy_bytes_per_s is not None:
            after = np.where(crosses, ready, end)
        elif self.two_sided:
            after = self.clock + message_s
            self.flying_until = np.maximum(self.flying_until, end)
            self.flying_until[dst] = np.maximum(self.flying_until[dst], end)
        self._busy(after - self.clock)

    def _transfer(self, epoch: int, slot: int, message: _Message) -> tuple[Vector, Vector]:
        """Send over the links: ``(start, end)`` by sender; notes the arrivals."""
        top, dst, nbytes = self.topology, message.dst, message.nbytes
        start, end, crosses = self.links.send(message.ready, dst, nbytes)
        if top.copy_bytes_per_s is not None:
            end = np.where(crosses, end, np.maximum(end, start + nbytes / top.copy_bytes_per_s))
        if self.two_sided and message.alone and top.pair_bytes_per_s is not None:
            slow = np.maximum(start, self.streams) + nbytes / top.pair_bytes_per_s
            end = np.where(crosses, np.maximum(end, slow), end)
            self.streams = np.where(crosses, end, self.streams)
        arrival = np.empty(top.num_ranks)
        arrival[dst] = end + np.where(crosses, top.network_latency_s, top.local_latency_s)
        came = np.empty(top.num_ranks, dtype=bool)
        came[dst] = crosses
        self.arrived[epoch, slot], self.crossed[epoch, slot] = arrival, came
        self.bytes[0] += int(nbytes[~crosses].sum())
        self.bytes[1] += int(nbytes[crosses].sum())
        if self.spans is not None:
            for rank in range(top.num_ranks):
                lane = "network" if crosses[rank] else "send"
                what = Span(rank, lane, message.name, start[rank], end[rank], int(nbytes[rank]), int(dst[rank]))
                self.spans.append(what)
        return start, end

    def _wait(self, facts: _Facts, epoch: int, slot: int) -> None:
        top = self.topology
        late = self.unposted.pop((epoch, slot), None)
        if late is not None:
            posted = self.posts[0] if len(self.posts) == 2 else np.zeros(top.num_ranks)
            ready = np.maximum(late.ready, posted[late.dst])
            self._transfer(epoch, slot, replace(late, ready=ready))
        arrival = self.arrived.pop((epoch, slot))
        blocked = np.maximum(0.0, arrival - self.clock)
        if self.spans is not None:
            self._record("wait", f"wait {facts.schedule.slots[slot].name}", self.clock, self.clock + blocked)
        self.exposed_s += blocked
        self.clock = self.clock + blocked
        cost = np.full(top.num_ranks, top.wait_s)
        if top.touch_bytes_per_s is not None:
            cost += np.where(self.crossed.pop((epoch, slot)), facts.nbytes[slot] / top.touch_bytes_per_s, 0.0)
        if top.copy_bytes_per_s is not None and facts.arrivals[slot].tensor in ("o", "x"):
            cost += facts.nbytes[slot] / top.copy_bytes_per_s
        self._busy(cost)

    def _attend(self, facts: _Facts, epoch: int, step: Attend) -> None:
        top, site = self.topology, facts.schedule.site
        assert isinstance(site, AttentionSite)
        self.posts = [*self.posts[-1:], self.clock]
        heads = site.batch * facts.schedule.head_counts("q")
        queries = facts.rows("q", step.q)
        flops = 2.0 * heads * queries * facts.rows("k", step.kv) * (site.head_dim + site.v_head_dim)
        if site.causal:
            flops = flops / 2  # over all pairs; single chunks see more or less
        alone = flops / (top.attention_flops_per_s or top.flops_per_s)
        rows = heads * queries
        seconds = alone * (1.0 + top.attention_rows / np.maximum(rows, 1.0)) + top.launch_s
        merged = tuple(chunk for chunk in step.q if (epoch, chunk) in self.touched)
        if merged:  # two partial outputs in fp32 are read, one is written
            moved = 3.0 * 4 * heads * facts.rows("q", merged) * (site.v_head_dim + 1)
            seconds = seconds + moved / top.memory_bytes_per_s
        self.touched.update((epoch, chunk) for chunk in step.q)
        self.compute(seconds, str(step), alone)

    def _record(self, lane: str, name: str, start: Vector, stop: Vector) -> None:
        if self.spans is not None:
            self.spans += [
                Span(rank, lane, name, float(a), float(b))
                for rank, (a, b) in enumerate(zip(start, stop, strict=True))
                if b > a
            ]
