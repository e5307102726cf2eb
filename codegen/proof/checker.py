"""Proof that a schedule is right, for any number of ranks at once: it reads the origin's program only.

All ranks run the same program seen from their own place in the mesh (codegen/schedule/schedule.py), so a fact about the
origin's program holds for every rank, and a fact about the origin and the rank at offset ``d`` holds for every pair
that far apart. Let the *line* be the origin's instructions in the order put phases, attend, collect. What is proved,
and why it is enough:

    signals    Every arrival is put exactly once: the origin's put to offset ``d`` into slot ``s`` is, seen from there,
               a put by ``-d`` of chunk ``c - d``; it must be what the receiver's table says of ``s``. Every arrival is
               waited for exactly once, so no signal is lost and no byte arrives unasked.
    deadlock   Every put stands before its wait on the line. Then the ranks cannot block each other: take the blocked
               rank whose wait stands earliest on the line; the put that it waits for stands earlier still, on a rank
               that is not blocked before it. (The condition is also necessary: a wait at or before its put on the line
               makes rank p wait for rank p - d, that one for p - 2d, ... and the mesh is finite.)
    contents   An instruction reads a slot only after its wait, and as what the arrival table says it is. A chunk sent
               on round the ring has the heads of its receiver, who sits in the same group.
    pairs      Each query chunk that the origin attends meets every key chunk exactly once. Heads split: there is just
               one such query chunk per group (and part), so over all ranks each pair is computed once per head slice;
               not split: only the rank's own queries. An output is pushed, or stays, after its last pair.
    reuse      No slot is put twice in an epoch, so within an epoch nothing is overwritten. Across epochs: a writer of
               epoch e + 2 first sees ``done >= e`` of the receiver (runtime/wires/transport.py), which sets it after
               collect, that is after all its reads of epoch e. All reads stand in the phases of their epoch, but for
               those of a network card, which ends them with the receiver's wait: where NVSHMEM carries, a writer sees
               ``done >= e`` of all ranks (codegen/engines/device_engine.py). And since every arrival is waited for
               before ``done``, whether it is read or not, nothing of epoch e comes later.
    wanted     What a rank wants of an exchange is covered once, by its own shard and by arrivals. Where weights
               come together in the bank, these lie there on every rank in their order, without gaps. The own shard is
               written when it is put, so after this rank's last read of the epoch that had the bank before.
    sizes      Slots do not overlap; each holds the largest chunk that any rank receives in it.

In tests a run of every rank with vector clocks is held against this (tests/support/symbolic_run.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.exchange import ExchangeSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.schedule.weight_gather import Assembled
from sfcompile.errors import ScheduleError
from sfcompile.runtime.program.instructions import Attend, Chunk, Forward, Instruction, Push, Put, Wait
from sfcompile.runtime.program.intervals import count
from sfcompile.runtime.program.phases import STARTS
from sfcompile.runtime.program.sites import ExchangeSite


@dataclass(frozen=True)
class Proof:
    """What was proved, counted over all ranks in one epoch."""

    ranks: int
    puts: int
    waits: int
    pairs: int


def check(schedule: Schedule) -> Proof:
    """Check one schedule, for all its ranks and any number of epochs.

    Raises:
        ScheduleError: names the instruction.
    """
    check_slots(schedule)
    line = _Line(schedule)
    line.check_puts()
    line.check_reads()
    if isinstance(schedule, AttentionSchedule):
        line.check_pairs(schedule)
    line.check_sizes()
    if isinstance(schedule, Assembled):
        check_places(schedule)
    elif isinstance(schedule, ExchangeSchedule):
        line.check_wanted(schedule.site)
    ranks = schedule.mesh.num_ranks
    return Proof(ranks, ranks * len(line.puts), ranks * len(line.waits), ranks * line.num_pairs)


def check_slots(schedule: Schedule) -> None:
    """Slots do not overlap.

    Raises:
        ScheduleError: with the slots and their bytes.
    """
    spans = sorted((slot.offset, slot.offset + slot.nbytes, slot.name) for slot in schedule.slots if slot.nbytes)
    for (_, end, left), (start, _, right) in zip(spans, spans[1:], strict=False):
        if start < end:
            raise wrong(f"slot {right} begins at byte {start}, inside slot {left}, which ends at byte {end}")


def check_places(schedule: Assembled) -> None:
    """On every rank the rows of all ranks, its own too, lie in the bank once, apart, and fill it: weight after weight,
    each in the order of its rows.

    The origin is looked at: it gets the parts of each rank behind it once. So does every other rank, for what an offset
    leads to from a rank is each rank once; and rows lie alike in every bank, for their place is that of their owner.

    Raises:
        ScheduleError: with the rank and the bytes or rows.
    """
    size, parts = schedule.site.dtype.itemsize, range(len(schedule.weights))
    come = Counter((arrival.chunk.src, arrival.chunk.part) for arrival in schedule.program(0).arrivals)
    for rank in range(schedule.mesh.num_ranks):
        for part in parts:
            times = come[rank, part] + (rank == 0)
            if times != 1:
                raise wrong(f"rank 0: the rows of weight {part} that rank {rank} owns are {times} times in the bank")
    at = 0
    for start, nbytes in sorted(
        (first * size, length * size) for runs in schedule.site.owned for first, length in runs
    ):
        if start != at:
            raise wrong(f"rows begin at byte {start} of the bank, those before them end at byte {at}")
        at += nbytes
    if at != schedule.heap_bytes:
        raise wrong(f"{at} bytes of rows in a bank of {schedule.heap_bytes}")
    before = 0  # elements of the weights before this one
    for part, weight in enumerate(schedule.weights):
        width = math.prod(weight.shape[1:])
        for rank, runs in enumerate(schedule.site.owned):
            first, stop = weight.rows(rank)
            if runs[part] != (before + first * width, (stop - first) * width):
                raise wrong(
                    f"rank {rank}: rows {first} to {stop} of weight {part}, {width} elements each, lie at {runs[part]}"
                )
        before += weight.shape[0] * width


def wrong(what: str) -> ScheduleError:
    """The error of a schedule that must not run."""
    return ScheduleError(
        what, "running it could hang or give wrong numbers", "this is a mistake in the builder: report it"
    )


@dataclass(frozen=True)
class _Step:
    """One instruction and where it stands on the line."""

    at: int
    phase: str
    do: Instruction

    def __str__(self) -> str:
        return f"{self.phase}: {self.do}"


class _Line:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.mesh = schedule.mesh
        self.split_heads = isinstance(schedule, AttentionSchedule) and schedule.split_heads
        self.arrivals = {arrival.slot: arrival for arrival in schedule.origin.arrivals}
        if len(self.arrivals) != len(schedule.origin.arrivals):
            raise wrong("two arrivals share a slot")
        phases = schedule.origin.phases
        names = [name for name in phases if name in STARTS] + [name for name in phases if name not in STARTS]
        steps = [(name, step) for name in names for step in phases[name]]
        self.steps = [_Step(at, name, step) for at, (name, step) in enumerate(steps)]
        self.puts: dict[int, _Step] = {}  # slot at the receiver -> the put that fills it
        self.waits: dict[int, _Step] = {}
        self.done: Counter[tuple[Chunk, Chunk]] = Counter()
        self.num_pairs = 0

    # ------------------------------------------------------------------ signals and deadlock

    def check_puts(self) -> None:
        """Every arrival is put once, waited for once, and put before the wait."""
        for step in self.steps:
            match step.do:
                case Put(_, _, dst, slot) | Forward(_, dst, slot):
                    self._check_put(step, dst, slot)
                case Push(q, slot):
                    self._check_put(step, q.src, slot)
                case Wait(slot, src):
                    arrival = self.arrivals.get(slot)
                    if arrival is None or arrival.src != src:
                        raise wrong(f"{step}: the arrival table says {arrival}")
                    if slot in self.waits:
                        raise wrong(f"{step}: the slot is waited for twice")
                    self.waits[slot] = step
            if isinstance(step.do, Put) != (step.phase in STARTS):
                raise wrong(f"{step}: put phases hold puts of own tensors and nothing else")
        for slot, arrival in self.arrivals.items():
            if slot not in self.puts:
                raise wrong(f"nobody puts {arrival}: its signal never comes")
            if slot not in self.waits:
                raise wrong(f"nobody waits for {arrival}")
            if self.puts[slot].at >= self.waits[slot].at:
                raise wrong(
                    f"deadlock: {self.waits[slot]} stands before {self.puts[slot]} that fills the slot one step on"
                )

    def _check_put(self, step: _Step, dst: int, slot: int) -> None:
        if slot in self.puts:
            raise wrong(f"{step}: the slot is also filled by {self.puts[slot]}")
        arrival = self.arrivals.get(slot)
        tensor, chunk = self._content(step)
        seen = Chunk(self.mesh.add(chunk.src, self.mesh.back(dst)), chunk.part)
        if arrival is None or (arrival.src, arrival.tensor, arrival.chunk) != (self.mesh.back(dst), tensor, seen):
            raise wrong(f"{step}: sends {tensor}{seen} (seen from the receiver), its arrival table says {arrival}")
        if dst == 0:
            raise wrong(f"{step}: a rank puts into its own slot")
        same_group = self.mesh.step(dst)[0] == 0 or not self.split_heads
        if isinstance(step.do, Forward) and not same_group:
            raise wrong(f"{step}: the receiver computes other heads than this rank")
        self.puts[slot] = step

    def _content(self, step: _Step) -> tuple[str, Chunk]:
        """What a put sends, seen from the sender."""
        match step.do:
            case Put(tensor, part, _, _):
                return tensor, Chunk(0, part)
            case Forward(slot, _, _):
                return self._read(step, slot, ("k", "v", "x"))
            case Push(q, _):
                return "o", q
        raise wrong(f"{step}: is no put")

    def _read(self, step: _Step, slot: int, tensors: Iterable[str]) -> tuple[str, Chunk]:
        """The arrival that a step reads, which it must have waited for."""
        arrival, wait = self.arrivals.get(slot), self.waits.get(slot)
        if arrival is None or wait is None or wait.at > step.at:
            raise wrong(f"{step}: reads slot {slot} without having waited for it")
        if arrival.tensor not in tensors:
            raise wrong(f"{step}: reads {arrival} as {' or '.join(tensors)}")
        return arrival.tensor, arrival.chunk

    # ------------------------------------------------------------------ contents and pairs

    def check_reads(self) -> None:
        """Attention reads the chunks that it names; what has arrived is read by somebody."""
        used: set[int] = set()
        for step in self.steps:
            if isinstance(step.do, Forward):
                used.add(step.do.slot)
            elif isinstance(step.do, Attend):
                used |= self._check_attend(step, step.do)
        for slot, arrival in self.arrivals.items():
            if arrival.tensor in ("q", "k", "v") and slot not in used:
                raise wrong(f"nobody reads {arrival}: its bytes are sent for nothing")

    def _check_attend(self, step: _Step, do: Attend) -> set[int]:
        used: set[int] = set()
        for tensor, slots, chunks in (("q", do.q_slots, do.q), ("k", do.k_slots, do.kv), ("v", do.v_slots, do.kv)):
            if len(slots) != len(chunks):
                raise wrong(f"{step}: {len(slots)} slots for {len(chunks)} chunks of {tensor}")
            for slot, chunk in zip(slots, chunks, strict=True):
                content = chunk if slot is None and chunk.src == 0 else None
                if slot is not None:
                    content = self._read(step, slot, (tensor,))[1]
                    used.add(slot)
                if content != chunk:
                    raise wrong(f"{step}: slot {slot} holds {tensor}{content}, not {tensor}{chunk}")
        return used

    def check_pairs(self, schedule: AttentionSchedule) -> None:
        """Every pair once; outputs complete before they move."""
        keys = [Chunk(src, p) for src in range(self.mesh.num_ranks) for p in range(schedule.kv_parts)]
        known = set(keys)
        seen: dict[Chunk, set[Chunk]] = {}
        pushed: dict[Chunk, _Step] = {}
        for step in self.steps:
            if isinstance(step.do, Attend):
                self._count(step, step.do, seen, pushed, known)
            elif isinstance(step.do, Push):
                self._complete(f"{step}", step.do.q, seen, keys)
                pushed[step.do.q] = step
        for q in self._queries(schedule.q_parts, seen):
            self._complete("collect", q, seen, keys)
            if q.src != 0 and q not in pushed:
                raise wrong(f"the output of Q{q} is never pushed home")

    def _count(
        self, step: _Step, do: Attend, seen: dict[Chunk, set[Chunk]], pushed: dict[Chunk, _Step], known: set[Chunk]
    ) -> None:
        keys = set(do.kv)
        if len(keys) != len(do.kv) or len(set(do.q)) != len(do.q) or not keys <= known:
            raise wrong(f"{step}: names a chunk twice, or one that does not exist")
        for q in do.q:
            met = seen.setdefault(q, set())
            twice = met & keys
            if twice:
                raise wrong(f"{step}: Q{q} x KV{min(twice)} is attended twice")
            if q in pushed:
                raise wrong(f"{step}: Q{q} is attended after its output has left by {pushed[q]}")
            met |= keys
            self.num_pairs += len(keys)

    def _complete(self, when: str, q: Chunk, seen: dict[Chunk, set[Chunk]], keys: Sequence[Chunk]) -> None:
        met = seen.get(q, set())
        if len(met) != len(keys):
            missing = next(kv for kv in keys if kv not in met)
            raise wrong(f"{when}: the output of Q{q} is without KV{missing}: that pair is never attended before it")

    def _queries(self, parts: int, seen: dict[Chunk, set[Chunk]]) -> list[Chunk]:
        """The query chunks that the origin has to attend: one of every group and part, its own among them."""
        groups = range(self.mesh.ulysses) if self.split_heads else range(1)
        queries = [Chunk(self.mesh.offset(a, 0), p) for a in groups for p in range(parts)]
        odd = sorted(set(seen) - set(queries))
        if odd:
            raise wrong(f"Q{odd[0]} is attended here, but another rank of its group already attends it")
        home = {(a.src, a.chunk) for a in self.arrivals.values() if a.tensor == "o"}
        for a in groups:
            for p in range(parts):
                if a and (self.mesh.offset(a, 0), Chunk(0, p)) not in home:
                    raise wrong(f"the output of part {p} for the heads of group {a} never comes home")
        return queries

    # ------------------------------------------------------------------ sizes

    def check_sizes(self) -> None:
        """Each slot holds the largest chunk that any rank receives in it."""
        for arrival in self.arrivals.values():
            slot, size = self.schedule.slots[arrival.slot], int(self.schedule.arrival_bytes(arrival).max(initial=0))
            if size > slot.nbytes or slot.offset % self.schedule.site.dtype.itemsize:
                raise wrong(f"a chunk of {size} bytes in slot {slot.name} of {slot.nbytes} bytes")

    # ------------------------------------------------------------------ exchanges

    def check_wanted(self, site: ExchangeSite) -> None:
        """What every rank wants comes from somewhere, once."""
        sources = [0, *(arrival.src for arrival in self.arrivals.values())]
        # If everybody wants everything and hears from everybody, one rank stands for all.
        alike = site.is_gather and len(sources) == self.mesh.num_ranks
        for rank in range(1 if alike else self.mesh.num_ranks):
            if 0 in site.wanted_shape(rank):
                continue
            chunks = [site.chunk(self.mesh.rank_after(rank, offset), rank)[1] for offset in sources]
            runs = sorted(run for placed in chunks for run in placed)
            whole = site.rows if site.into != site.dim else count(site.wanted[rank])
            apart = all(a + n <= b for (a, n), (b, _) in zip(runs, runs[1:], strict=False))
            if not apart or count(tuple(runs)) != whole:
                raise wrong(f"rank {rank} wants {whole} positions of {site.name}, {count(tuple(runs))} come")
