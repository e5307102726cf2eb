"""Links and compute of a job in about half a second on idle machines: what a compile with topology="auto" plans on.

Between machines one stream of messages runs without a break, two under way at a time. It begins with small ones; every
few messages the ranks tell each other, in the stream, how long they take, and so agree on larger ones, until one takes
about CHUNK_S, and on the end. What a shaped link lets through at first (a token bucket's burst), and what a connection
needs to find its speed, is gone by the later part of the stream, which counts. A rank that does not get its turn leaves
the link idle, so other work on the machine only takes away: of the later part, the best stretch of most of its length
is the link's rate.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sfcompile.measuring.compute import OwnCompute, compute_rates
from sfcompile.measuring.estimate import compute_rate, core_share, evened, line, link_rate, rates_in
from sfcompile.measuring.shifts import LANES, Shifts, goes_round, sources
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank import recorder
from sfcompile.runtime.rank.session import Session
from sfcompile.torch_private import autocast_off

BUDGET_S = 0.5
COMPUTE_S = 0.15
"""Of it, what compute takes."""
STREAM_S = 0.2
"""The least that the stream between machines gets, however slow all else was."""
CHUNK_S = 0.015
GROUP = 3
"""So many messages, then the ranks' word on how long they take."""
SLICES = 8
LATER = 0.5
"""The first part of a stream, which does not count."""
_SMALL = 64
_SIZES = tuple(1 << power for power in range(12, 20))
"""Floats of a message between machines: 16 KiB to 2 MiB."""
_INSIDE = (1 << 16, 1 << 19)
_GPU_INSIDE = (1 << 18, 1 << 22)
_ROW = 4
_NOTICED = 0.03


@dataclass(frozen=True)
class Quick:
    """What was measured, the same on every rank that got it from one.

    Attributes:
        constants: of a topology, by name.
        spread: how far the rate between machines may be off, as a part of it; None: there is one machine.
        seconds: that it took.
        busy: part of the stream between machines in which threads of a rank were ready and had no core, the most of
            any rank: other work took its turns, and the links may carry more than was seen.
    """

    constants: dict[str, float]
    spread: float | None
    seconds: float
    busy: float = 0.0

    def better_with(self, other: Quick) -> Quick:
        """Of two measurements of the same ranks the better of each number: other work only takes away."""
        ours, theirs = self.constants, other.constants
        constants = ours | theirs
        for name in ours.keys() & theirs.keys():
            constants[name] = (max if name.endswith("_per_s") else min)(ours[name], theirs[name])
        first, then = (quick.constants.get("network_bytes_per_s", 0.0) for quick in (self, other))
        spread = other.spread if then > first else self.spread
        return Quick(constants, spread, self.seconds + other.seconds, min(self.busy, other.busy))


@dataclass(frozen=True)
class _Own:
    """One rank's numbers. ``slowest``: rates, of which the least of any rank counts; ``usual``: seconds so short that
    they tell more of luck than of a rank, of which the median counts."""

    slowest: dict[str, float]
    usual: dict[str, float]
    compute: OwnCompute
    rates: list[float]
    slice_s: float
    busy: float


def measure_quickly(session: Session, base: Topology, dtype: torch.dtype, budget_s: float = BUDGET_S) -> Quick:
    """Collective: measure links and compute; of unequal ranks the slowest counts.

    Args:
        base: what is known of the ranks' hardware; says how many network cards a machine has.
        dtype: of the model.
        budget_s: what all of it may take, apart from what a first compile does anyway: making heap and connections.
    """
    on_gpu = session.side.on_gpu
    inside = (_SMALL, *(_GPU_INSIDE if on_gpu else _INSIDE)) if _shares_machines(base) else ()
    across = (_SMALL, *_SIZES) if base.num_machines > 1 else ()
    with torch.no_grad(), autocast_off(), _unrecorded(), Shifts(session, inside, across) as shifts:
        bench = _QuickBench(session, base, shifts, budget_s)
        slowest, usual = bench.inside(inside, on_gpu) if inside else ({}, {})
        rates: list[float] = []
        slice_s = 0.0
        if across:
            more, late, rates, slice_s = bench.across(on_gpu)
            slowest, usual = slowest | more, late | usual
        compute = compute_rates(shifts.device, dtype, shifts.synchronize, shifts.meet)
        if compute.launch_s is not None:
            usual["launch_s"] = compute.launch_s
        if not on_gpu and "copy_bytes_per_s" not in slowest:  # it puts nothing inside its machine: its own copies only
            slowest["copy_bytes_per_s"] = _copies()
        everyone: list[_Own] = session.exchange(_Own(slowest, usual, compute, rates, slice_s, bench.busy), "measure")
        seconds = float(shifts.meet(bench.elapsed_s).max())
    return _together(everyone, base, seconds, on_gpu)


def _together(everyone: list[_Own], base: Topology, seconds: float, on_gpu: bool) -> Quick:
    """The job's constants from those of its ranks."""
    constants: dict[str, float] = {}
    for name in dict.fromkeys(name for own in everyone for name in own.slowest):
        constants[name] = min(own.slowest[name] for own in everyone if name in own.slowest)
    for name in dict.fromkeys(name for own in everyone for name in own.usual):
        constants[name] = statistics.median(own.usual[name] for own in everyone if name in own.usual)
    share = core_share([own.compute.turns for own in everyone], base.machine_of)
    for name in everyone[0].compute.rates:
        constants[name] = share * compute_rate(np.array([own.compute.rates[name] for own in everyone]))
    spread: float | None = None
    if base.num_machines > 1:
        rates, streams = evened(np.array([own.rates for own in everyone]), base.machine_of, sources(base, True))
        rate, spread = link_rate(rates, base.machine_of, everyone[0].slice_s)
        ranks = max(len(base.ranks_of(machine)) for machine in set(base.machine_of))
        of_card = -(-ranks // base.nics_per_machine)
        constants["network_bytes_per_s"] = rate / -(-streams // of_card)
    if not on_gpu:
        constants["local_bytes_per_s"] = constants["copy_bytes_per_s"]
    sound = {name: value for name, value in constants.items() if np.isfinite(value) and value > 0.0}
    return Quick(sound, spread, seconds, max(own.busy for own in everyone))


class _Aside:
    """The process's recorder while sessions measure."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sessions = 0
        self.recorder: recorder.Recorder | None = None


_aside = _Aside()


class _QuickBench:
    def __init__(self, session: Session, base: Topology, shifts: Shifts, budget_s: float) -> None:
        self._session, self._base, self._shifts, self._budget_s = session, base, shifts, budget_s
        self._threads = torch.get_num_threads()
        self.busy = 0.0
        shifts.meet()
        self._began = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        """Seconds since all ranks began."""
        return time.perf_counter() - self._began

    def rounds(self, across: bool, floats: int, count: int) -> tuple[float, float]:
        """Seconds of the put, and of put and arrival together, of shifts one by one."""
        shifts = self._shifts
        return _timed(lambda: shifts.put(across, floats), lambda: shifts.receive(across, floats), count)

    def words(self, count: int) -> tuple[float, float]:
        """The same of messages in which all ranks tell all others something."""
        return _timed(lambda: self._shifts.put_word(0.0, 0.0), self._shifts.receive_word, count)

    # ------------------------------------------------------------------ inside a machine

    def inside(self, sizes: tuple[int, ...], on_gpu: bool) -> tuple[dict[str, float], dict[str, float]]:
        """What a put costs its sender and how fast it is (a GPU's: how fast its messages are), how soon it is seen."""
        self._shifts.meet()
        times = [self.rounds(False, floats, 12 if floats == _SMALL else 5) for floats in sizes]
        slowest, usual = dict[str, float](), dict[str, float]()
        nbytes = [4.0 * floats for floats in sizes]
        comes = self._shifts.comes(False, _SMALL)
        if on_gpu and comes:
            usual["local_latency_s"], slope = line(nbytes, [total for _, total in times])
            slowest["local_bytes_per_s"] = 1.0 / max(slope, 1e-15)
        if not on_gpu and self._shifts.goes(False):
            usual["message_s"], slope = line(nbytes, [put for put, _ in times])
            slowest["copy_bytes_per_s"] = 1.0 / max(slope, 1e-12)
        if not on_gpu and comes and goes_round(self._base):
            usual["local_latency_s"] = max(times[0][1] - times[0][0], 1e-6)
        return slowest, usual

    # ------------------------------------------------------------------ between machines

    def across(self, on_gpu: bool) -> tuple[dict[str, float], dict[str, float], list[float], float]:
        """Latency and a message's cost; what moving bytes costs; rates by slice of time, and a slice's length."""
        self._shifts.meet()
        put_s, total_s = self.rounds(True, _SMALL, 12)
        usual = {"message_s": put_s} if self._shifts.goes(True) and not on_gpu else {}
        heard = self._shifts.comes(True, _SMALL)
        if not goes_round(self._base):
            put_s, total_s = self.words(12)
        if heard or not goes_round(self._base):
            usual["network_latency_s"] = total_s if on_gpu else max(total_s - put_s, 1e-6)
        elapsed_s = float(self._shifts.meet(self.elapsed_s)[:, 0].max())
        with _one_thread():
            ready_s = _without_core_s()
            marks, wires_s = self.stream(max(self._budget_s - COMPUTE_S, elapsed_s + STREAM_S))
            self.busy = (_without_core_s() - ready_s) / max(marks[-1][0], 1e-9)
        end_s = float(self._shifts.meet(marks[-1][0])[:, 0].min())
        slice_s = (1.0 - LATER) * end_s / SLICES
        if not heard:
            return {}, usual, [0.0] * SLICES, slice_s
        rates = rates_in(marks, LATER * end_s, end_s, SLICES)
        noticed = wires_s > _NOTICED * marks[-1][0] and not self.has_idle_cores
        touch = {"touch_bytes_per_s": 2.0 * marks[-1][1] / wires_s} if noticed and not on_gpu else {}
        return touch, usual, rates, slice_s

    def stream(self, until_s: float) -> tuple[list[tuple[float, float]], float]:
        """One stream of messages between machines.

        All ranks do the same in the same order: what they choose by, they heard from each other at the same place of
        the stream.

        Returns:
            Marks ``(seconds since the first message left, bytes that had come)``, one for each message; and the CPU
            seconds of all threads but this one.
        """
        shifts, floats, put, over = self._shifts, _SIZES[0], 0, False
        under_way: deque[int] = deque()  # floats of a message; 0: the ranks' word
        marks, group_s = [(0.0, 0.0)], 0.0
        busy_s, start = time.process_time() - time.thread_time(), time.perf_counter()
        while True:
            while len(under_way) < LANES and not over:
                if put % (GROUP + 1) == GROUP:
                    shifts.put_word(group_s, self.elapsed_s)
                    under_way.append(0)
                else:
                    shifts.put(True, floats, put % LANES)
                    under_way.append(floats)
                put += 1
            if not under_way:
                return marks, time.process_time() - time.thread_time() - busy_s
            received = put - len(under_way)
            came = under_way.popleft()
            if came:
                shifts.receive(True, came, received % LANES)
                marks.append((time.perf_counter() - start, marks[-1][1] + 4.0 * came))
                group_s = (marks[-1][0] - marks[-1 - min(len(marks) - 1, GROUP)][0]) / GROUP
            else:
                chunk_s, elapsed_s = (float(most) for most in shifts.receive_word().max(axis=0))
                over = elapsed_s + GROUP * chunk_s > until_s
                floats = _next_size(floats, chunk_s)

    @property
    def has_idle_cores(self) -> bool:
        """Whether the wires' threads find a core on which no rank computes."""
        rank = self._session.rank
        ranks = len(self._base.ranks_of(self._base.machine_of[rank]))
        return ranks * self._threads < len(os.sched_getaffinity(0))


def _timed(put: Callable[[], object], receive: Callable[[], object], count: int) -> tuple[float, float]:
    """Seconds of the put, and of both together, one time after the other.

    A rank that is ahead of its sender waits for longer, and next time its sender does: rounds count by the mean of some
    in a row. Lower quartiles: noise only adds.
    """
    puts, stamps = [], [time.perf_counter()]
    for _ in range(count):
        put()
        puts.append(time.perf_counter() - stamps[-1])
        receive()
        stamps.append(time.perf_counter())
    row = min(_ROW, count)
    totals = [(last - first) / row for first, last in zip(stamps, stamps[row:], strict=False)]
    return float(np.quantile(puts, 0.25)), float(np.quantile(totals, 0.25))


def _next_size(floats: int, seconds: float) -> int:
    """The size of the next messages, after some of ``floats`` that took ``seconds`` each: up to four times it."""
    return max(
        size
        for size in _SIZES
        if floats == size or (floats < size <= 4 * floats and seconds * size / floats <= CHUNK_S)
    )


def _without_core_s() -> float:
    """Seconds that threads of this process were ready to run and had no core; 0 where the kernel does not say."""
    waited_ns = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, IndexError, ValueError):  # a thread may have ended
            waited_ns += int(path.read_text().split()[1])
    return 1e-9 * waited_ns


def _shares_machines(topology: Topology) -> bool:
    return topology.num_ranks > topology.num_machines


def _copies() -> float:
    """Bytes per second of plain copies."""
    chunk = torch.zeros(_INSIDE[-1])
    times = []
    for _ in range(8):
        start = time.perf_counter()
        chunk.clone()
        times.append(time.perf_counter() - start)
    return 4.0 * _INSIDE[-1] / statistics.median(times[2:])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Idle threads of a thread pool spin, and would count as the wires' CPU time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _unrecorded() -> Iterator[None]:
    """A trace of the process's steps does not show what was measured before them; sessions may measure side by side."""
    with _aside.lock:
        if not _aside.sessions:
            _aside.recorder, recorder.active = recorder.active, None
        _aside.sessions += 1
    try:
        yield
    finally:
        with _aside.lock:
            _aside.sessions -= 1
            if not _aside.sessions:
                recorder.active = _aside.recorder
