"""Every rank's instructions, run symbolically over several epochs: the explicit proof that a set of programs is right.

What is proved, for the instructions themselves and not for a model of them:

    pairs      each (Q chunk, KV chunk) pair is attended exactly once per head; outputs are complete before they move
    signals    a wait names the one rank that puts into its slot; each put is waited for; slots are apart
    deadlock   the ranks run to the end with waits that block
    contents   what an instruction reads from a slot is the chunk that it means, and it has waited for it
    reuse      no slot is overwritten while an earlier epoch may still be read

One run proves all interleavings. Conditions only turn from false to true (signals and ``done`` grow) and each word has
one writer, so a rank that can go on now can go on later too: greedy execution gets stuck exactly when some execution
does. Which put a wait sees does not depend on timing either, so the happens-before relation, kept here as vector
clocks, is the same in every execution: two accesses that it leaves unordered race in some execution, and none that it
orders can.

Orders modelled (runtime/wires/transport.py):  put(e) -> wait(e) of its slot;  finish(e) of the reader -> put(e + 2)
into its heap, for direct stores by the ``done`` word, for messages because the receive of e + 2 is posted after
finish(e).

This takes seconds beyond 16 ranks. The fast proof (codegen/proof/checker.py), which reads one rank's program, is held
against it; it also runs what that cannot read: programs that are not symmetric, and whole graphs of sites.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from sfcompile.codegen.proof.checker import check_slots, wrong
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.runtime.program.instructions import (
    Arrival,
    Attend,
    Chunk,
    Forward,
    Heads,
    Instruction,
    Push,
    Put,
    RankProgram,
    Wait,
)
from sfcompile.runtime.program.phases import ATTENTION, ENDS, EXCHANGE, STARTS
from sfcompile.runtime.program.sites import nbytes
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, bank_of

Call = tuple[int, str]
"""``(epoch, phase)``: what the graph calls, in its order."""

Content = tuple[str, Chunk, Heads | None]
"""What lies in a slot: tensor, chunk, heads."""


@dataclass(frozen=True)
class Ran:
    """What was run, counted over all ranks and epochs."""

    ranks: int
    epochs: int
    puts: int
    waits: int
    pairs: int


def phases_of(schedule: Schedule) -> tuple[str, ...]:
    """The phases of a site in the order of the graph."""
    return ATTENTION if isinstance(schedule, AttentionSchedule) else EXCHANGE


def in_turn(schedules: Sequence[Schedule]) -> list[Call]:
    """One site after the other."""
    return [(epoch, phase) for epoch, schedule in enumerate(schedules, 1) for phase in phases_of(schedule)]


def overlapped(schedules: Sequence[Schedule]) -> list[Call]:
    """As early as two banks allow: a site is put as soon as the site before the last has ended."""
    starts: list[list[Call]] = [[]]
    ends: list[list[Call]] = []
    for epoch, schedule in enumerate(schedules, 1):
        phases = phases_of(schedule)
        starts.append([(epoch, phase) for phase in phases if phase in STARTS])
        ends.append([(epoch, phase) for phase in phases if phase not in STARTS])
    calls = starts[1]
    for end, start in zip(ends, [*starts[2:], []], strict=True):
        calls = calls + start + end
    return calls


def check_layout(schedule: Schedule) -> None:
    """Slots do not overlap, chunks fit in them, and what a rank expects is what the others send it.

    Raises:
        ScheduleError: with the slot and its numbers.
    """
    dtype = schedule.site.dtype
    check_slots(schedule)
    sent: dict[tuple[int, int], list[int]] = {}
    programs = [schedule.program(rank) for rank in range(schedule.mesh.num_ranks)]
    for rank, program in enumerate(programs):
        for _, step in _steps(program):
            if (place := _target(step)) is not None:
                sent.setdefault(place, []).append(rank)
    for rank, program in enumerate(programs):
        for arrival in program.arrivals:
            slot, size = schedule.slots[arrival.slot], nbytes(*schedule.form(rank, arrival))
            if size > slot.nbytes or slot.offset % dtype.itemsize:
                raise wrong(f"rank {rank}: a chunk of {size} bytes in slot {slot.name} of {slot.nbytes} bytes")
            senders = sent.pop((rank, arrival.slot), [])
            if senders != [arrival.src]:
                raise wrong(f"rank {rank} slot {slot.name} expects rank {arrival.src}, but is put by ranks {senders}")
    for (rank, index), senders in sent.items():
        raise wrong(f"ranks {senders} put into slot {index} of rank {rank}, which expects nothing there")


def run_explicitly(schedule: Schedule, epochs: int = 4) -> Ran:
    """One schedule over and over, its calls in turn and overlapped, by messages and by direct stores; the last run.

    Args:
        epochs: 3 or more, so that banks are reused.

    Raises:
        ScheduleError: as :func:`check_layout` and :func:`check_calls`.
    """
    again = [schedule] * epochs
    check_layout(schedule)
    for calls in (in_turn(again), overlapped(again)):
        check_calls(again, calls, direct=False)
        ran = check_calls(again, calls)
    return ran


def check_calls(schedules: Sequence[Schedule], calls: Sequence[Call], direct: bool = True) -> Ran:
    """Run a whole program of sites symbolically on all ranks.

    Args:
        schedules: the site of epoch 1, 2, ...
        calls: the order of the phases, the same on every rank.
        direct: stores into the peer's heap; else messages.

    Raises:
        ScheduleError: names the rank, the epoch and the instruction.
    """
    return SymbolicRun(schedules, direct).of(calls)


@dataclass
class _Place:
    """One slot of one bank of one rank."""

    epoch: int = 0
    content: Content | None = None
    sender: int = -1
    written_by: tuple[int, int] = (0, 0)  # (rank, its time) of the last write
    released: list[int] = field(default_factory=list)  # the writer's clock at its signal
    reads: dict[int, int] = field(default_factory=dict)  # rank -> its time at its last read


@dataclass(frozen=True)
class _Moment:
    """One instruction of one rank, or ``open`` / ``finish`` of an epoch."""

    epoch: int
    phase: str
    do: Instruction | str

    def __str__(self) -> str:
        return f"epoch {self.epoch} {self.phase}: {self.do}"


class SymbolicRun:
    """All ranks of a program of sites, with a clock each."""

    def __init__(self, schedules: Sequence[Schedule], direct: bool) -> None:
        self.schedules = schedules
        self.direct = direct
        self.num_ranks = schedules[0].mesh.num_ranks
        self.programs = [[schedule.program(rank) for rank in range(self.num_ranks)] for schedule in schedules]
        self.arrivals = [[{a.slot: a for a in program.arrivals} for program in programs] for programs in self.programs]
        self.clocks = [[0] * self.num_ranks for _ in range(self.num_ranks)]
        self.places: dict[tuple[int, int, int], _Place] = {}
        self.done = [0] * self.num_ranks
        self.early: list[set[int]] = [set() for _ in range(self.num_ranks)]
        self.done_clocks: dict[tuple[int, int], list[int]] = {}  # (rank, epoch) -> clock when the epoch was given back
        self.open_clocks: dict[tuple[int, int], list[int]] = {}  # (rank, epoch) -> clock when it posted its receives
        self.waited: set[tuple[int, int, int]] = set()  # (rank, epoch, slot)
        self.attended: dict[tuple[int, int], Counter[tuple[Chunk, Chunk]]] = {}
        self.counts: Counter[str] = Counter()

    def of(self, calls: Sequence[Call]) -> Ran:
        """Run to the end; see :func:`check_calls`."""
        self.go([self.steps_of(rank, calls) for rank in range(self.num_ranks)])
        self.check_pairs()
        return Ran(self.num_ranks, len(self.schedules), self.counts["put"], self.counts["wait"], self.counts["pair"])

    def steps_of(self, rank: int, calls: Sequence[Call]) -> list[_Moment]:
        steps: list[_Moment] = []
        begun: set[int] = set()
        for epoch, phase in calls:
            if epoch not in begun:
                begun.add(epoch)
                steps.append(_Moment(epoch, phase, "open"))
            instructions = self.programs[epoch - 1][rank].phases[phase]
            steps += [_Moment(epoch, phase, instruction) for instruction in instructions]
            if phase in ENDS:
                steps.append(_Moment(epoch, phase, "finish"))
        return steps

    def go(self, steps: Sequence[list[_Moment]]) -> None:
        at = [0] * self.num_ranks
        moved = True
        while moved:
            moved = False
            for rank, mine in enumerate(steps):
                while at[rank] < len(mine) and self._ready(rank, mine[at[rank]]):
                    self._do(rank, mine[at[rank]])
                    at[rank] += 1
                    moved = True
        stuck = [f"rank {rank} at {mine[at[rank]]}" for rank, mine in enumerate(steps) if at[rank] < len(mine)]
        if stuck:
            raise wrong(f"deadlock: {'; '.join(stuck[:4])}{f' and {len(stuck) - 4} more' if len(stuck) > 4 else ''}")
        for (rank, _, slot), place in self.places.items():
            if (rank, place.epoch, slot) not in self.waited:
                raise wrong(f"nobody waits for slot {slot} of rank {rank} in epoch {place.epoch}")

    # ------------------------------------------------------------------ when a step may run

    def _ready(self, rank: int, step: _Moment) -> bool:
        if isinstance(step.do, Wait):
            place = self.places.get((rank, bank_of(step.epoch), step.do.slot))
            return place is not None and place.epoch >= step.epoch
        target = _target(step.do)
        if target is None:
            return True
        if self.direct:
            return self.credit(target[0], step.epoch) is not None
        # Stricter than gloo, where the message waits with its sender: what cannot get stuck here cannot there.
        return (target[0], step.epoch) in self.open_clocks

    def credit(self, reader: int, epoch: int) -> list[int] | None:
        """The clock at which a reader gave back the bank of an epoch, which its writers wait for; None: not yet."""
        if epoch <= NUM_BANKS:
            return [0] * self.num_ranks
        return self.done_clocks.get((reader, epoch - NUM_BANKS))

    # ------------------------------------------------------------------ what a step does

    def _do(self, rank: int, step: _Moment) -> None:
        self.clocks[rank][rank] += 1
        match step.do:
            case "open":
                if step.epoch - NUM_BANKS > self.done[rank]:
                    raise wrong(f"rank {rank} opens epoch {step.epoch} while epoch {self.done[rank] + 1} is still open")
                self.open_clocks[rank, step.epoch] = list(self.clocks[rank])
            case "finish":
                self._finish(rank, step)
            case Put():
                self._put(rank, step, self._own(step.epoch, rank, step.do))
            case Forward():
                self._put(rank, step, self._read(rank, step, step.do.slot))
            case Push():
                self._put(rank, step, self._complete_output(rank, step, step.do.q))
            case Wait():
                self._wait(rank, step, step.do)
            case Attend():
                self._attend(rank, step, step.do)

    def _finish(self, rank: int, step: _Moment) -> None:
        for arrival in self.programs[step.epoch - 1][rank].arrivals:
            self._read(rank, step, arrival.slot)
        schedule = self.schedules[step.epoch - 1]
        if isinstance(schedule, AttentionSchedule):
            missing = {(part, head) for part in range(schedule.q_parts) for head in range(schedule.site.heads)}
            held = [self._complete_output(rank, step, Chunk(rank, part)) for part in range(schedule.q_parts)]
            for arrival in self.programs[step.epoch - 1][rank].arrivals:
                content = self._place(rank, step.epoch, arrival.slot).content
                if content is not None and content[0] == "o" and content[1].src == rank:
                    held.append(content)
            for _, chunk, heads in held:
                missing -= {(chunk.part, head) for head in range(*(heads or (0, 0)))}
            if missing:
                part, head = min(missing)
                raise wrong(f"rank {rank}, {step}: the output of part {part}, head {head} has not come back")
        self.early[rank].add(step.epoch)
        while self.done[rank] + 1 in self.early[rank]:
            self.done[rank] += 1
            self.done_clocks[rank, self.done[rank]] = list(self.clocks[rank])

    def _put(self, rank: int, step: _Moment, content: Content) -> None:
        target = _target(step.do)
        assert target is not None
        dst, slot = target
        if self.direct:
            credit = self.credit(dst, step.epoch)
            assert credit is not None
            self._join(rank, credit)
        knows, writer = list(self.clocks[rank]), (rank, self.clocks[rank][rank])
        if not self.direct:
            # The receiver's own process writes the bytes, after it has posted the receive.
            posted = self.open_clocks[dst, step.epoch]
            knows, writer = [max(pair) for pair in zip(knows, posted, strict=True)], (dst, posted[dst])
        place = self._place(dst, step.epoch, slot)
        users = [who for who, time in (*place.reads.items(), place.written_by) if knows[who] < time]
        if place.epoch and (dst, place.epoch, slot) not in self.waited:
            users.append(dst)
        if users:
            raise wrong(f"rank {rank}, {step}: rank {users[0]} may still use what epoch {place.epoch} put there")
        place.epoch, place.content, place.sender, place.reads = step.epoch, content, rank, {}
        place.written_by, place.released = writer, knows
        self.counts["put"] += 1

    def _wait(self, rank: int, step: _Moment, wait: Wait) -> None:
        place = self._place(rank, step.epoch, wait.slot)
        if place.epoch != step.epoch:
            raise wrong(f"rank {rank}, {step}: the slot already holds epoch {place.epoch}")
        if (rank, step.epoch, wait.slot) in self.waited:
            raise wrong(f"rank {rank}, {step}: the slot is waited for twice")
        expected = self.arrivals[step.epoch - 1][rank].get(wait.slot)
        schedule = self.schedules[step.epoch - 1]
        if expected is None or (expected.src, expected.src, place.content) != (
            wait.src, place.sender, self._means(schedule, rank, expected)
        ):  # fmt: skip
            raise wrong(f"rank {rank}, {step}: expects {expected}, finds {place.content} of rank {place.sender}")
        self._join(rank, place.released)
        self.waited.add((rank, step.epoch, wait.slot))
        self.counts["wait"] += 1

    def _attend(self, rank: int, step: _Moment, pair: Attend) -> None:
        schedule = self.schedules[step.epoch - 1]
        assert isinstance(schedule, AttentionSchedule)
        heads, kv_heads = schedule.heads(rank), schedule.kv_heads(rank)
        for name, slots, chunks, mine in (
            ("q", pair.q_slots, pair.q, heads),
            ("k", pair.k_slots, pair.kv, kv_heads),
            ("v", pair.v_slots, pair.kv, kv_heads),
        ):
            for slot, chunk in zip(slots, chunks, strict=True):
                own = (name, Chunk(rank, chunk.part), mine)
                content = own if slot is None else self._read(rank, step, slot)
                if content != (name, chunk, mine):
                    raise wrong(f"rank {rank}, {step}: slot {slot} holds {content}, not {(name, chunk, mine)}")
        done = self.attended.setdefault((rank, step.epoch), Counter())
        for q, kv in itertools.product(pair.q, pair.kv):
            done[q, kv] += 1
            self.counts["pair"] += 1

    def _complete_output(self, rank: int, step: _Moment, q: Chunk) -> Content:
        done = self.attended.get((rank, step.epoch), Counter())
        schedule = self.schedules[step.epoch - 1]
        assert isinstance(schedule, AttentionSchedule)
        missing = [kv for kv in _key_chunks(schedule) if done[q, kv] != 1]
        if missing:
            raise wrong(f"rank {rank}, {step}: output of Q{q} without, or not once with, KV{missing[0]}")
        return "o", q, schedule.heads(rank)

    def _read(self, rank: int, step: _Moment, slot: int) -> Content:
        place = self._place(rank, step.epoch, slot)
        if (rank, step.epoch, slot) not in self.waited or place.epoch != step.epoch or place.content is None:
            raise wrong(f"rank {rank}, {step}: reads slot {slot} without having waited for it")
        place.reads[rank] = self.clocks[rank][rank]
        return place.content

    # ------------------------------------------------------------------ helpers

    def _place(self, rank: int, epoch: int, slot: int) -> _Place:
        return self.places.setdefault((rank, bank_of(epoch), slot), _Place())

    def _join(self, rank: int, other: Iterable[int]) -> None:
        self.clocks[rank] = [max(pair) for pair in zip(self.clocks[rank], other, strict=True)]

    def _own(self, epoch: int, rank: int, put: Put) -> Content:
        schedule = self.schedules[epoch - 1]
        if not isinstance(schedule, AttentionSchedule):
            return put.tensor, Chunk(rank, put.part), None
        heads = schedule.heads(put.dst) if put.tensor == "q" else schedule.kv_heads(put.dst)
        return put.tensor, Chunk(rank, put.part), heads

    def _means(self, schedule: Schedule, rank: int, arrival: Arrival) -> Content:
        if not isinstance(schedule, AttentionSchedule):
            return arrival.tensor, arrival.chunk, None
        heads = {"q": schedule.heads(rank), "o": schedule.heads(arrival.src)}.get(
            arrival.tensor, schedule.kv_heads(rank)
        )
        return arrival.tensor, arrival.chunk, heads

    def check_pairs(self) -> None:
        """Over all ranks: every pair once for every head."""
        for epoch, schedule in enumerate(self.schedules, 1):
            if not isinstance(schedule, AttentionSchedule):
                continue
            times: Counter[tuple[Chunk, Chunk]] = Counter()
            for rank in range(self.num_ranks):
                start, stop = schedule.heads(rank)
                for pair, n in self.attended.get((rank, epoch), Counter()).items():
                    times[pair] += n * (stop - start)
            queries = [Chunk(rank, p) for rank in range(self.num_ranks) for p in range(schedule.q_parts)]
            for q, kv in itertools.product(queries, _key_chunks(schedule)):
                done, heads = times[q, kv], schedule.site.heads
                if done != heads:
                    raise wrong(f"epoch {epoch}: Q{q} x KV{kv} is attended for {done} heads of {heads}")


def _key_chunks(schedule: AttentionSchedule) -> list[Chunk]:
    return [Chunk(rank, p) for rank in range(schedule.mesh.num_ranks) for p in range(schedule.kv_parts)]


def _steps(program: RankProgram) -> Iterator[tuple[str, Instruction]]:
    for phase, instructions in program.phases.items():
        for instruction in instructions:
            yield phase, instruction


def _target(step: Instruction | str) -> tuple[int, int] | None:
    """``(rank, slot)`` that an instruction writes."""
    match step:
        case Push(q, slot):
            return q.src, slot
        case Put(_, _, dst, slot) | Forward(_, dst, slot):
            return dst, slot
    return None
