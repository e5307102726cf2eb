"""Proof that a schedule is right: every rank's instructions, run symbolically over several epochs.

What is proved, for the instructions themselves and not for a model of them:

    pairs      each (Q chunk, KV chunk) pair is attended exactly once per head; outputs are complete before they move
    signals    a wait names the one rank that puts into its slot; each put is waited for; shapes agree; slots are apart
    deadlock   the ranks run to the end with waits that block
    contents   what an instruction reads from a slot is the chunk that it means, and it has waited for it
    reuse      no slot is overwritten while an earlier epoch may still be read

One run proves all interleavings. Conditions only turn from false to true (signals and ``done`` grow) and each word has
one writer, so a rank that can go on now can go on later too: greedy execution gets stuck exactly when some execution
does. Which put a wait sees does not depend on timing either, so the happens-before relation, kept here as vector
clocks, is the same in every execution: two accesses that it leaves unordered race in some execution, and none that it
orders can.

Orders modelled (runtime/transport.py):  put(e) -> wait(e) of its slot;  finish(e) of the reader -> put(e + 2) into its
heap, for direct stores by the ``done`` word, for messages because the receive of e + 2 is posted after finish(e).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from sfcompile.codegen.schedule import Schedule, nbytes
from sfcompile.codegen.schedule_torus import kv_slice
from sfcompile.codegen.sites import AttentionSite, count
from sfcompile.errors import ScheduleError
from sfcompile.runtime.instructions import Attend, Forward, Heads, Instruction, Push, Put, RankProgram, Wait
from sfcompile.runtime.symmetric_heap import NUM_BANKS

Call = tuple[int, str]
"""``(epoch, phase)``: what the graph calls, in its order."""

Content = tuple[str, int, Heads | None]
"""What a chunk is: tensor, the rank whose tokens it holds, heads."""

_STARTS = ("put_q", "put_k", "put_v", "gather_start")
_ENDS = ("collect", "gather_finish")


@dataclass(frozen=True)
class Proof:
    """What was run: numbers for people, over all ranks and epochs."""

    ranks: int
    epochs: int
    puts: int
    waits: int
    pairs: int

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks, {self.epochs} epochs: {self.puts} puts, {self.waits} waits, {self.pairs} pairs; "
            "each pair once, no lost signal, no deadlock, no reuse race"
        )


def phases_of(schedule: Schedule) -> tuple[str, ...]:
    """The phases of a site in the order of the graph."""
    return (*_STARTS[:3], "attend", "collect") if isinstance(schedule.site, AttentionSite) else (_STARTS[3], _ENDS[1])


def in_turn(schedules: Sequence[Schedule]) -> list[Call]:
    """One site after the other."""
    return [(epoch, phase) for epoch, schedule in enumerate(schedules, 1) for phase in phases_of(schedule)]


def overlapped(schedules: Sequence[Schedule]) -> list[Call]:
    """As early as two banks allow: a site is put as soon as the site before the last has ended."""
    starts: list[list[Call]] = [[]]
    ends: list[list[Call]] = []
    for epoch, schedule in enumerate(schedules, 1):
        phases = phases_of(schedule)
        starts.append([(epoch, phase) for phase in phases if phase in _STARTS])
        ends.append([(epoch, phase) for phase in phases if phase not in _STARTS])
    calls = starts[1]
    for end, start in zip(ends, [*starts[2:], []], strict=True):
        calls = calls + start + end
    return calls


def check(schedule: Schedule, epochs: int = 4) -> Proof:
    """Check one schedule, repeated, in turn and overlapped, over direct stores and over messages.

    Args:
        schedule: built for all ranks.
        epochs: how often the site runs; 3 or more, so that banks are reused.

    Raises:
        ScheduleError: names the rank, the epoch and the instruction.
    """
    again = [schedule] * epochs
    check_layout(schedule)
    for calls in (in_turn(again), overlapped(again)):
        check_calls(again, calls, direct=False)
        proof = check_calls(again, calls)
    return proof


def check_layout(schedule: Schedule) -> None:
    """Slots do not overlap, chunks fit in them, and what a rank expects is what the others send it.

    Raises:
        ScheduleError: with the slot and its numbers.
    """
    dtype = schedule.site.dtype
    spans = sorted((slot.offset, slot.offset + slot.nbytes, slot.name) for slot in schedule.slots if slot.nbytes)
    for (_, end, left), (start, _, right) in zip(spans, spans[1:], strict=False):
        if start < end:
            raise _wrong(f"slot {right} begins at byte {start}, inside slot {left}, which ends at byte {end}")
    sent: dict[tuple[int, int], list[int]] = {}
    programs = [schedule.program(rank) for rank in range(schedule.mesh.num_ranks)]
    for rank, program in enumerate(programs):
        for _, step in _steps(program):
            if (place := _target(step)) is not None:
                sent.setdefault(place, []).append(rank)
    for rank, program in enumerate(programs):
        for arrival in program.arrivals:
            slot, size = schedule.slots[arrival.slot], nbytes(arrival.shape, dtype)
            if size > slot.nbytes or slot.offset % dtype.itemsize:
                raise _wrong(f"rank {rank}: a chunk of {size} bytes in slot {slot.name} of {slot.nbytes} bytes")
            senders = sent.pop((rank, arrival.slot), [])
            if senders != [arrival.src]:
                raise _wrong(f"rank {rank} slot {slot.name} expects rank {arrival.src}, but is put by ranks {senders}")
    for (rank, index), senders in sent.items():
        raise _wrong(f"ranks {senders} put into slot {index} of rank {rank}, which expects nothing there")


def check_calls(
    schedules: Sequence[Schedule], calls: Sequence[Call], direct: bool = True, credits: bool = True
) -> Proof:
    """Run a whole program of sites symbolically on all ranks.

    Args:
        schedules: the site of epoch 1, 2, ...
        calls: the order of the phases, the same on every rank.
        direct: stores into the peer's heap; else messages.
        credits: whether writers wait for the reader before they reuse a bank (False is a mutant, for tests).

    Raises:
        ScheduleError: names the rank, the epoch and the instruction.
    """
    run = _Run(schedules, direct, credits)
    run.go([run.steps_of(rank, calls) for rank in range(run.num_ranks)])
    run.check_pairs()
    return Proof(run.num_ranks, len(schedules), run.counts["put"], run.counts["wait"], run.counts["pair"])


@dataclass
class _Place:
    """One slot of one bank of one rank."""

    epoch: int = 0
    content: Content | None = None
    shape: tuple[int, ...] = ()
    written_by: tuple[int, int] = (0, 0)  # (rank, its time) of the last write
    released: list[int] = field(default_factory=list)  # the writer's clock at its signal
    reads: dict[int, int] = field(default_factory=dict)  # rank -> its time at its last read


@dataclass(frozen=True)
class _Step:
    """One instruction of one rank, or ``open`` / ``finish`` of an epoch."""

    epoch: int
    phase: str
    do: Instruction | str

    def __str__(self) -> str:
        return f"epoch {self.epoch} {self.phase}: {self.do}"


class _Run:
    def __init__(self, schedules: Sequence[Schedule], direct: bool, credits: bool) -> None:
        self.schedules = schedules
        self.direct = direct
        self.credits = credits
        self.num_ranks = schedules[0].mesh.num_ranks
        self.programs = [[schedule.program(rank) for rank in range(self.num_ranks)] for schedule in schedules]
        self.clocks = [[0] * self.num_ranks for _ in range(self.num_ranks)]
        self.places: dict[tuple[int, int, int], _Place] = {}
        self.done = [0] * self.num_ranks
        self.early: list[set[int]] = [set() for _ in range(self.num_ranks)]
        self.done_clocks: dict[tuple[int, int], list[int]] = {}  # (rank, epoch) -> clock when the epoch was given back
        self.open_clocks: dict[tuple[int, int], list[int]] = {}  # (rank, epoch) -> clock when it posted its receives
        self.waited: set[tuple[int, int, int]] = set()  # (rank, epoch, slot)
        self.attended: dict[tuple[int, int], Counter[tuple[int, int]]] = {}  # (rank, epoch) -> (q_src, kv_src) -> times
        self.counts: Counter[str] = Counter()

    def steps_of(self, rank: int, calls: Sequence[Call]) -> list[_Step]:
        steps: list[_Step] = []
        begun: set[int] = set()
        for epoch, phase in calls:
            if epoch not in begun:
                begun.add(epoch)
                steps.append(_Step(epoch, phase, "open"))
            instructions = self.programs[epoch - 1][rank].phases[phase]
            steps += [_Step(epoch, phase, instruction) for instruction in instructions]
            if phase in _ENDS:
                steps.append(_Step(epoch, phase, "finish"))
        return steps

    def go(self, steps: Sequence[list[_Step]]) -> None:
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
            raise _wrong(f"deadlock: {'; '.join(stuck[:4])}{f' and {len(stuck) - 4} more' if len(stuck) > 4 else ''}")
        for (rank, _, slot), place in self.places.items():
            if (rank, place.epoch, slot) not in self.waited:
                raise _wrong(f"nobody waits for slot {slot} of rank {rank} in epoch {place.epoch}")

    # ------------------------------------------------------------------ when a step may run

    def _ready(self, rank: int, step: _Step) -> bool:
        if isinstance(step.do, Wait):
            place = self.places.get((rank, step.epoch % NUM_BANKS, step.do.slot))
            return place is not None and place.epoch >= step.epoch
        target = _target(step.do)
        if target is None:
            return True
        if self.direct:
            return not self.credits or self.done[target[0]] >= step.epoch - NUM_BANKS
        # Stricter than gloo, where the message waits with its sender: what cannot get stuck here cannot there.
        return (target[0], step.epoch) in self.open_clocks

    # ------------------------------------------------------------------ what a step does

    def _do(self, rank: int, step: _Step) -> None:
        self.clocks[rank][rank] += 1
        match step.do:
            case "open":
                if step.epoch - NUM_BANKS > self.done[rank]:
                    raise _wrong(
                        f"rank {rank} opens epoch {step.epoch} while epoch {self.done[rank] + 1} is still open"
                    )
                self.open_clocks[rank, step.epoch] = list(self.clocks[rank])
            case "finish":
                self._finish(rank, step)
            case Put():
                self._put(rank, step, (step.do.tensor, rank, step.do.heads))
            case Forward():
                self._put(rank, step, self._read(rank, step, step.do.slot))
            case Push():
                self._put(rank, step, self._complete_output(rank, step, step.do.q_src))
            case Wait():
                self._wait(rank, step, step.do)
            case Attend():
                self._attend(rank, step, step.do)

    def _finish(self, rank: int, step: _Step) -> None:
        for arrival in self.programs[step.epoch - 1][rank].arrivals:
            self._read(rank, step, arrival.slot)
        if isinstance(self.schedules[step.epoch - 1].site, AttentionSite):
            program = self.programs[step.epoch - 1][rank]
            self._complete_output(rank, step, rank)
            for src, heads in program.heads.items():
                if src != rank:
                    arrived = [a.slot for a in program.arrivals if a.src == src]
                    held = [self._place(rank, step.epoch, slot).content for slot in arrived]
                    if ("o", rank, heads) not in held:
                        raise _wrong(
                            f"rank {rank}, {step}: the output of heads {heads} has not come back from rank {src}"
                        )
        self.early[rank].add(step.epoch)
        while self.done[rank] + 1 in self.early[rank]:
            self.done[rank] += 1
            self.done_clocks[rank, self.done[rank]] = list(self.clocks[rank])

    def _put(self, rank: int, step: _Step, content: Content) -> None:
        target = _target(step.do)
        assert target is not None
        dst, slot = target
        if self.direct and self.credits and step.epoch > NUM_BANKS:
            self._join(rank, self.done_clocks[dst, step.epoch - NUM_BANKS])
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
            raise _wrong(f"rank {rank}, {step}: rank {users[0]} may still use what epoch {place.epoch} put there")
        place.epoch, place.content, place.reads = step.epoch, content, {}
        place.shape = self._shape(step.epoch, content)
        place.written_by, place.released = writer, knows
        self.counts["put"] += 1

    def _wait(self, rank: int, step: _Step, wait: Wait) -> None:
        place = self._place(rank, step.epoch, wait.slot)
        if place.epoch != step.epoch:
            raise _wrong(f"rank {rank}, {step}: the slot already holds epoch {place.epoch}")
        expected = next((a for a in self.programs[step.epoch - 1][rank].arrivals if a.slot == wait.slot), None)
        if expected is None or expected.src != wait.src or expected.shape != place.shape:
            raise _wrong(f"rank {rank}, {step}: expects {expected}, finds {place.content} of shape {place.shape}")
        self._join(rank, place.released)
        self.waited.add((rank, step.epoch, wait.slot))
        self.counts["wait"] += 1

    def _attend(self, rank: int, step: _Step, pair: Attend) -> None:
        site = self.schedules[step.epoch - 1].site
        assert isinstance(site, AttentionSite)
        heads = self.programs[step.epoch - 1][rank].heads[rank]
        kv_heads = kv_slice(site, heads)
        for name, slot, src, part in (
            ("q", pair.q_slot, pair.q_src, heads),
            ("k", pair.k_slot, pair.kv_src, kv_heads),
            ("v", pair.v_slot, pair.kv_src, kv_heads),
        ):
            found = (name, rank, part) if slot is None else self._read(rank, step, slot)
            if found != (name, src, part):
                raise _wrong(f"rank {rank}, {step}: slot {slot} holds {found}, not {(name, src, part)}")
        self.attended.setdefault((rank, step.epoch), Counter())[pair.q_src, pair.kv_src] += 1
        self.counts["pair"] += 1

    def _complete_output(self, rank: int, step: _Step, q_src: int) -> Content:
        done = self.attended.get((rank, step.epoch), Counter())
        missing = [kv for kv in range(self.num_ranks) if done[q_src, kv] != 1]
        if missing:
            raise _wrong(
                f"rank {rank}, {step}: output of rank {q_src} without, or not once with, the keys of {missing}"
            )
        return "o", q_src, self.programs[step.epoch - 1][rank].heads[rank]

    def _read(self, rank: int, step: _Step, slot: int) -> Content:
        place = self._place(rank, step.epoch, slot)
        if (rank, step.epoch, slot) not in self.waited or place.epoch != step.epoch or place.content is None:
            raise _wrong(f"rank {rank}, {step}: reads slot {slot} without having waited for it")
        place.reads[rank] = self.clocks[rank][rank]
        return place.content

    # ------------------------------------------------------------------ helpers

    def _place(self, rank: int, epoch: int, slot: int) -> _Place:
        return self.places.setdefault((rank, epoch % NUM_BANKS, slot), _Place())

    def _join(self, rank: int, other: Iterable[int]) -> None:
        self.clocks[rank] = [max(pair) for pair in zip(self.clocks[rank], other, strict=True)]

    def _shape(self, epoch: int, content: Content) -> tuple[int, ...]:
        site, (tensor, src, heads) = self.schedules[epoch - 1].site, content
        if not isinstance(site, AttentionSite):
            return site.local_shape(src)
        assert heads is not None
        tokens = count((site.q_positions if tensor in ("q", "o") else site.kv_positions)[src])
        width = site.head_dim if tensor in ("q", "k") else site.v_head_dim
        return site.batch, heads[1] - heads[0], tokens, width

    def check_pairs(self) -> None:
        """Over all ranks: every pair once for every head."""
        for epoch, schedule in enumerate(self.schedules, 1):
            if not isinstance(schedule.site, AttentionSite):
                continue
            times: Counter[tuple[int, int]] = Counter()
            for rank in range(self.num_ranks):
                start, stop = self.programs[epoch - 1][rank].heads[rank]
                for pair, n in self.attended.get((rank, epoch), Counter()).items():
                    times[pair] += n * (stop - start)
            for q_src, kv_src in itertools.product(range(self.num_ranks), repeat=2):
                done, heads = times[q_src, kv_src], schedule.site.heads
                if done != heads:
                    raise _wrong(f"epoch {epoch}: Q{q_src} x KV{kv_src} is attended for {done} heads of {heads}")


def _steps(program: RankProgram) -> Iterator[tuple[str, Instruction]]:
    for phase, instructions in program.phases.items():
        for instruction in instructions:
            yield phase, instruction


def _target(step: Instruction | str) -> tuple[int, int] | None:
    """``(rank, slot)`` that an instruction writes."""
    if isinstance(step, Push):
        return step.q_src, step.slot
    if isinstance(step, (Put, Forward)):
        return step.dst, step.slot
    return None


def _wrong(what: str) -> ScheduleError:
    return ScheduleError(
        what, "running it could hang or give wrong numbers", "this is a mistake in the builder: report it"
    )
