"""Who has seen what: vector clocks of warps, and what releases hand to acquires.

A warp counts its own epochs; ``seen[w]`` is the latest epoch of every other warp of which w knows that what it did
happened before. There are three planes: what happened before by the generic proxy (loads and stores), and what happened
before a proxy fence that happened before: only that may be read by the async proxy, of shared memory (wgmma) or of
global memory (TMA). A fence may be for one of the two only.

Happens-before here is PTX's causality order: program order within a warp, barriers, releases and acquires whose
scopes include each other, fences around relaxed accesses, ends and starts of kernels on a stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Clock = NDArray[np.int64]
GENERIC, ASYNC, ASYNC_GLOBAL = 0, 1, 2
PLANES = 3
SCOPES = {"cta": 0, "cluster": 0, "gpu": 1, "sys": 2}


@dataclass(frozen=True)
class Released:
    """What a write handed on: who reads it with acquire, at a scope that includes the writer, has seen ``clock``."""

    clock: Clock
    scope: int
    gpu: int
    cta: int


class Clocks:
    """The clocks of all warps of a world. Numbers of warps are given out by :meth:`add` and kept."""

    def __init__(self) -> None:
        self.count = 1  # number 0 stands for what was there before
        self.seen: Clock = np.zeros((64, PLANES, 64), np.int64)
        self.gpu = np.full(64, -1)
        self.cta = np.full(64, -1)
        self.released: dict[int, list[Released]] = {}
        self._read: dict[int, list[Released]] = {}
        self._fenced: dict[int, tuple[Clock, int]] = {}
        self._programs = 0

    def add(self, count: int, gpu: int) -> NDArray[np.int64]:
        """Numbers for new warps of a GPU."""
        while self.count + count > len(self.gpu):
            size = len(self.gpu)
            self.seen = np.pad(self.seen, ((0, size), (0, 0), (0, size)))
            self.gpu = np.pad(self.gpu, (0, size), constant_values=-1)
            self.cta = np.pad(self.cta, (0, size), constant_values=-1)
        numbers = np.arange(self.count, self.count + count)
        self.count += count
        self.gpu[numbers] = gpu
        self.seen[numbers, 0, numbers] = 1
        return numbers

    def seat(self, warps: NDArray[np.int64], warps_of_program: int) -> None:
        """Warps of a launch, program by program."""
        self.cta[warps] = self._programs + np.arange(len(warps)) // warps_of_program
        self._programs += -(-len(warps) // warps_of_program)

    def now(self, warps: NDArray[np.int64]) -> Clock:
        """Their own epochs."""
        return self.seen[warps, 0, warps]

    def step(self, warps: NDArray[np.int64]) -> None:
        """A new epoch: what is done from now on is not part of what they have handed on."""
        self.seen[warps, 0, warps] += 1

    def meet(self, warps: NDArray[np.int64]) -> None:
        """All have seen what each had."""
        top = self.seen[warps].max(0)
        own = self.now(warps)
        self.seen[warps] = top
        self.seen[warps, 0, warps] = own + 1

    def join(self, warp: int, clock: Clock) -> None:
        """A warp learns."""
        size = clock.shape[1]
        np.maximum(self.seen[warp, :, :size], clock, out=self.seen[warp, :, :size])

    def start(self, warps: NDArray[np.int64], clock: Clock) -> None:
        """Warps begin, after everything in ``clock``."""
        own = self.now(warps)
        size = clock.shape[1]
        self.seen[warps] = 0
        self.seen[warps, :, :size] = clock
        self.seen[warps, 0, warps] = np.maximum(own, self.seen[warps, 0, warps]) + 1

    def proxy_fence(self, warps: NDArray[np.int64], planes: tuple[int, ...] = (ASYNC, ASYNC_GLOBAL)) -> None:
        """What they have seen may be read by the async proxy."""
        for plane in planes:
            self.seen[warps, plane] = self.seen[warps, GENERIC]

    # ------------------------------------------------------------------ words that order

    def snapshot(self, warp: int, alone: bool) -> Clock:
        """What a lane of a warp hands on; not what other lanes did since the warp last met, unless it was ``alone``."""
        clock = self.seen[warp, :, : self.count].copy()
        if not alone:
            clock[GENERIC, warp] -= 1
        return clock

    def write(self, address: int, warp: int, sem: str, scope: int, alone: bool, update: bool) -> None:
        """A strong write of a word.

        Args:
            alone: no other lane of the warp has touched memory since the warp last met.
            update: an atomic read-modify-write: what earlier writes released stays (observation order goes through).
        """
        entries = self.released.get(address, []) if update else []
        if sem in ("release", "acq_rel"):
            entries = [*entries, Released(self.snapshot(warp, alone), scope, int(self.gpu[warp]), int(self.cta[warp]))]
            self.seen[warp, 0, warp] += 1
        elif warp in self._fenced:
            clock, fence_scope = self._fenced[warp]
            entries = [*entries, Released(clock, min(scope, fence_scope), int(self.gpu[warp]), int(self.cta[warp]))]
        self.released[address] = entries[-8:] if len(entries) <= 8 else self._merged(entries)

    def _merged(self, entries: list[Released]) -> list[Released]:
        """Fewer entries that hand on the same: those of one program and scope in one."""
        merged: dict[tuple[int, int, int], Released] = {}
        for entry in entries:
            key = (entry.scope, entry.gpu, entry.cta)
            if key in merged:
                size = max(entry.clock.shape[1], merged[key].clock.shape[1])
                both = [np.pad(e.clock, ((0, 0), (0, size - e.clock.shape[1]))) for e in (entry, merged[key])]
                entry = Released(np.maximum(*both), *key)
            merged[key] = entry
        return list(merged.values())

    def read(self, address: int, warp: int, sem: str, scope: int) -> None:
        """A strong read of a word."""
        entries = self.released.get(address, [])
        if sem in ("acquire", "acq_rel"):
            self._take(warp, entries, scope)
        elif entries:
            self._read.setdefault(warp, []).extend(
                Released(e.clock, min(e.scope, scope), e.gpu, e.cta) for e in entries
            )
            del self._read[warp][:-16]

    def fence(self, warps: NDArray[np.int64], scope: int, alone: bool) -> None:
        """What relaxed reads before it saw has happened before; relaxed writes after it hand on what was seen."""
        for warp in map(int, warps):
            self._take(warp, self._read.get(warp, []), scope)
            self._fenced[warp] = (self.snapshot(warp, alone), scope)
            self.seen[warp, 0, warp] += 1

    def _take(self, warp: int, entries: list[Released], scope: int) -> None:
        for entry in entries:
            if self.includes(entry.scope, entry.gpu, entry.cta, warp) and self.includes(
                scope, int(self.gpu[warp]), int(self.cta[warp]), -1, entry.gpu, entry.cta
            ):
                self.join(warp, entry.clock)

    def includes(self, scope: int, gpu: int, cta: int, warp: int, other_gpu: int = -2, other_cta: int = -2) -> bool:
        """Whether a scope of an access by (gpu, cta) includes another thread: ``warp``, or one of the other place."""
        if warp >= 0:
            other_gpu, other_cta = int(self.gpu[warp]), int(self.cta[warp])
        return scope == 2 or (gpu == other_gpu and (scope == 1 or cta == other_cta))
