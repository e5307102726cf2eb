"""Predict when every rank does what: a discrete-event simulation of schedules on a topology.

All ranks run one program (codegen/schedule/schedule.py), and a schedule that passed the checker has every put before
its wait on the line. So one sweep along the line, with the clocks of all ranks as one vector, meets every event after
those it depends on: no event queue is needed, and a thousand ranks cost little more than four. A schedule may have
groups of ranks: each runs it for itself, beside the others.

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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfcompile.codegen.plan.links import Links, Vector
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.runtime.program.formats import BF16, FP8, SAME
from sfcompile.runtime.program.instructions import Arrival, Attend, Chunk, Forward, Instruction, Push, Put, Wait
from sfcompile.runtime.program.spans import Span
from sfcompile.runtime.program.topology import Topology


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
            return step.part == self.part
        assert isinstance(step, (Wait, Forward))
        chunk = next(a.chunk for a in self.schedule.origin.arrivals if a.slot == step.slot)
        return chunk.part == self.part


Work = Compute | Phase


@dataclass(frozen=True)
class Mark:
    """Where all ranks are after one stretch of work: their clocks, and what they have computed and waited so far."""

    clock: Vector
    compute_s: Vector
    exposed_s: Vector


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
        marks: after each stretch of work.
        spans: every event, if asked for.
    """

    seconds: float
    compute_s: Vector
    exposed_s: Vector
    busy_s: Vector
    inside_bytes: int
    across_bytes: int
    limit_s: float
    marks: tuple[Mark, ...] = field(default=(), repr=False)
    spans: list[Span] = field(default_factory=list, repr=False)

    @property
    def exposed(self) -> float:
        """Seconds that the most blocked rank waits."""
        return float(self.exposed_s.max(initial=0.0))


def simulate(
    line: Sequence[Work], topology: Topology, two_sided: bool = False, record: bool | range = False
) -> Timeline:
    """Run stretches of work on every rank.

    Args:
        line: in program order, the same on every rank; schedules must have passed the checker.
        topology: ranks, links and rates.
        two_sided: messages pair sender and receiver (NCCL) instead of one-sided puts.
        record: keep every event as a span (slower); a range: only those of this stretch of the line.
    """
    sweep = _Sweep(topology, two_sided)
    marks = []
    for at, work in enumerate(line):
        sweep.recording = record if isinstance(record, bool) else at in record
        if isinstance(work, Compute):
            sweep.compute(np.full(topology.num_ranks, work.seconds), work.name)
        else:
            sweep.phase(work)
        marks.append(Mark(sweep.clock, sweep.compute_s, sweep.exposed_s))
    return sweep.timeline(tuple(marks))


class _Facts:
    """Sizes of one schedule, computed once. Vectors are by rank of the job, whose groups all run the schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.arrivals = {arrival.slot: arrival for arrival in schedule.origin.arrivals}
        ranks = range(sum(map(len, schedule.groups)))
        members = [schedule.members(rank) for rank in ranks]
        # Of each rank of the job: its place in the mesh, and the rank at every place of its group's mesh.
        self._place = np.array([place for place, _ in members], dtype=np.int64)
        self._group = np.array([group for _, group in members], dtype=np.int64)
        self.nbytes = {
            slot: self._of_job(schedule.arrival_bytes(a)).astype(np.float64) for slot, a in self.arrivals.items()
        }
        self.coded_bytes = {slot: self._coded_bytes(a) for slot, a in self.arrivals.items()}
        self.attention = schedule if isinstance(schedule, AttentionSchedule) else None
        self.staged = self.attention is not None and self.attention.staged
        self.heads = None if self.attention is None else self._of_job(self.attention.head_counts("q"))
        self._rows: dict[tuple[str, tuple[Chunk, ...]], Vector] = {}
        self._after: dict[int, NDArray[np.int64]] = {}

    def _coded_bytes(self, arrival: Arrival) -> Vector:
        """What a CPU could copy instead of encoding or decoding an arrival (runtime/program/formats.py)."""
        schedule = self.schedule
        written = schedule.site.written(arrival.tensor)
        if written == SAME:
            return np.zeros_like(self.nbytes[arrival.slot])
        assert isinstance(schedule, AttentionSchedule)
        elements = schedule.arrival_bytes(arrival, SAME) / schedule.site.dtype.itemsize
        return self._of_job(elements * CODED_AS_BYTES[written])

    def _of_job(self, by_place: NDArray[Any]) -> NDArray[Any]:
        return by_place[self._place] if self._place.size else by_place

    def ranks_after(self, offset: int) -> NDArray[np.int64]:
        """Where an offset leads, for every rank of the job."""
        if offset not in self._after:
            after = self.schedule.mesh.ranks_after(offset)
            if self._place.size:
                after = np.take_along_axis(self._group, after[self._place][:, None], axis=1)[:, 0]
            self._after[offset] = after
        return self._after[offset]

    def heads_of(self, offset: int) -> int:
        """Which heads the rank at an offset computes, as a number: of its Ulysses group, or 0 if all compute all."""
        split = self.attention is not None and self.attention.split_heads
        return self.schedule.mesh.step(offset)[0] if split else 0

    def rows(self, tensor: str, chunks: tuple[Chunk, ...]) -> Vector:
        """Tokens of some chunks together, at every rank."""
        key = tensor, chunks
        if key not in self._rows:
            assert self.attention is not None
            mesh = self.schedule.mesh
            counts = [self.attention.row_counts(tensor, c.part)[mesh.ranks_after(c.src)] for c in chunks]
            self._rows[key] = self._of_job(np.sum(counts, axis=0)).astype(np.float64)
        return self._rows[key]

    def own_bytes(self, tensor: str) -> Vector:
        """Bytes of the part of a tensor that stays with its rank."""
        schedule = self.attention
        if schedule is None:
            return self._of_job(np.zeros(self.schedule.mesh.num_ranks))
        parts = schedule.q_parts if tensor == "q" else schedule.kv_parts
        rows = np.sum([schedule.row_counts(tensor, p) for p in range(parts)], axis=0)
        row_bytes = float(schedule.width(tensor) * schedule.site.dtype.itemsize)
        sizes: Vector = schedule.site.batch * schedule.head_counts(tensor) * rows * row_bytes
        return self._of_job(sizes)


CODED_AS_BYTES = {BF16: 4.0, FP8: 27.0}
"""To encode or to decode an element takes a CPU as long as to copy so many bytes, whatever the model's dtype.

Measured on 2026-11-29 by benchmarks/coding_cost.py, which tells it in copies of the chunk.
"""


@dataclass(frozen=True)
class _Message:
    """One message per rank, of one instruction."""

    ready: Vector
    dst: NDArray[np.int64]
    nbytes: Vector
    step: Instruction
    alone: bool


class _Sweep:
    def __init__(self, topology: Topology, two_sided: bool) -> None:
        self.topology = topology
        self.two_sided = two_sided
        ranks = topology.num_ranks
        self.clock = np.zeros(ranks)
        self.compute_s, self.exposed_s, self.busy_s = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
        self.alone_s = np.zeros(ranks)
        self.flying_until = np.zeros(ranks)
        self.streams = np.zeros(ranks)  # when each rank's lone two-sided message between machines ends
        self.links = Links(topology, two_sided)
        self.unposted: dict[tuple[int, int], _Message] = {}
        self.posts: list[Vector] = []  # clocks at the start of the last two attention calls
        self.arrived: dict[tuple[int, int], Vector] = {}
        self.crossed: dict[tuple[int, int], NDArray[np.bool_]] = {}
        self.touched: set[tuple[int, Chunk]] = set()
        self.bytes = [0, 0]
        self.recording = False
        self.spans: list[Span] = []
        self._facts: dict[int, _Facts] = {}

    def timeline(self, marks: tuple[Mark, ...]) -> Timeline:
        limit = max(float(self.alone_s.max(initial=0.0)), self.links.least_s())
        seconds = float(self.clock.max(initial=0.0))
        inside, across = self.bytes
        return Timeline(
            seconds, self.compute_s, self.exposed_s, self.busy_s, inside, across, min(limit, seconds), marks, self.spans
        )

    # ------------------------------------------------------------------ work

    def compute(self, seconds: Vector, name: str, alone: Vector | None = None) -> None:
        self.alone_s += seconds if alone is None else alone
        if self.two_sided and self.topology.slowdown:
            under = np.minimum(seconds, np.maximum(0.0, self.flying_until - self.clock))
            seconds = seconds + under * self.topology.slowdown / (1.0 - self.topology.slowdown)
        self._record("compute", name, self.clock, self.clock + seconds)
        self.clock = self.clock + seconds
        self.compute_s = self.compute_s + seconds  # marks keep the vectors of before

    def phase(self, call: Phase) -> None:
        schedule = call.schedule
        if id(schedule) not in self._facts:
            self._facts[id(schedule)] = _Facts(schedule)
        facts = self._facts[id(schedule)]
        top = self.topology
        if call.phase.startswith("put_") and top.copy_bytes_per_s is not None:
            share = 1 if call.part == -1 else schedule.site.parts
            self._busy(facts.own_bytes(call.phase[-1]) / share / top.copy_bytes_per_s)
        peer: int | None = None  # messages to one peer in a row go out, and meet the receiver, together
        coded: set[tuple[str, int, int]] = set()  # ranks that compute the same heads are sent one encoding
        for step in schedule.origin.phases[call.phase]:
            if not call.has(step):
                continue
            match step:
                case Put(_, _, dst, slot) | Forward(_, dst, slot) | Push(Chunk(dst), slot):
                    code = top.copy_bytes_per_s is not None and not isinstance(step, Forward)
                    if isinstance(step, Put):
                        chunk = step.tensor, step.part, facts.heads_of(dst)
                        code &= chunk not in coded
                        coded.add(chunk)
                    self._send(facts, call.epoch, step, dst, slot, dst != peer, code)
                    peer = dst
                case Wait(slot, _):
                    self._wait(facts, call.epoch, slot)
                case Attend():
                    self._attend(facts, call.epoch, step)
                    peer = None

    def _busy(self, seconds: Vector | float) -> None:
        self.clock = self.clock + seconds
        self.busy_s += seconds

    def _send(
        self,
        facts: _Facts,
        epoch: int,
        step: Put | Forward | Push,
        offset: int,
        slot: int,
        first: bool,
        code: bool = False,
    ) -> None:
        """Issue the message of a step at every rank.

        Args:
            first: no message to the same peer stands right before it.
            code: the sender's CPU encodes it, if it travels encoded.
        """
        top, schedule = self.topology, facts.schedule
        dst = facts.ranks_after(offset)
        nbytes = facts.nbytes[slot][dst]
        crosses = self.links.route(dst).crosses
        if self.two_sided and first:
            self._busy(top.pairing_s)
            ready = np.maximum(self.clock, self.clock[dst])
        else:
            ready = self.clock
        message_s = top.message_s if first else 0.0
        ready = ready + message_s
        if code and top.copy_bytes_per_s is not None:
            ready = ready + facts.coded_bytes[slot][dst] / top.copy_bytes_per_s
        if top.copy_bytes_per_s is not None:  # this thread copies: into the peer's memory, or into a send buffer
            ready = ready + np.where(crosses, nbytes / top.copy_bytes_per_s, 0.0)
        if top.touch_bytes_per_s is not None:
            ready = ready + np.where(crosses, nbytes / top.touch_bytes_per_s, 0.0)
        # Outside an exchange of all with all, a rank sends to one peer at a time.
        alone = facts.staged or isinstance(step, Forward) or schedule.mesh.step(offset)[0] == 0
        message = _Message(ready, dst, nbytes, step, alone)
        if self.two_sided and facts.staged:
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
        if self.recording:
            for rank in range(top.num_ranks):
                lane = "network" if crosses[rank] else "send"
                what = Span(rank, lane, str(message.step), start[rank], end[rank], int(nbytes[rank]), int(dst[rank]))
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
        if self.recording:
            self._record("wait", f"wait {facts.schedule.slots[slot].name}", self.clock, self.clock + blocked)
        self.exposed_s = self.exposed_s + blocked
        self.clock = self.clock + blocked
        cost = np.full(top.num_ranks, top.wait_s)
        if top.touch_bytes_per_s is not None:
            cost += np.where(self.crossed.pop((epoch, slot)), facts.nbytes[slot] / top.touch_bytes_per_s, 0.0)
        if top.copy_bytes_per_s is not None:
            cost += facts.coded_bytes[slot] / top.copy_bytes_per_s
            if facts.arrivals[slot].tensor in ("o", "x"):
                cost += facts.nbytes[slot] / top.copy_bytes_per_s
        self._busy(cost)

    def _attend(self, facts: _Facts, epoch: int, step: Attend) -> None:
        assert facts.attention is not None and facts.heads is not None
        top, site = self.topology, facts.attention.site
        self.posts = [*self.posts[-1:], self.clock]
        heads = site.batch * facts.heads
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
        self.compute(seconds, str(step) if self.recording else "", alone)

    def _record(self, lane: str, name: str, start: Vector, stop: Vector) -> None:
        if self.recording:
            self.spans += [
                Span(rank, lane, name, float(a), float(b))
                for rank, (a, b) in enumerate(zip(start, stop, strict=True))
                if b > a
            ]
