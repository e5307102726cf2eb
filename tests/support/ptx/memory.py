"""Memory of all GPUs with the history of each word: who wrote and read it last, and what it held before.

An access that is ordered after the last write (clocks.py) sees it. One that is not is a race, and sees the old value
as often as the new: a store is as late as the memory model lets it be. Two accesses race only if one of them changes
the value: kernels compiled by Triton store equal values from several threads.

Addresses are this process's own: tensors lie where torch put them. Shared memory is memory like any other, of one
program.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx.clocks import GENERIC, Clocks
from ptx.emit import PLACES
from ptx.text import PtxError

Array = NDArray[Any]
IN_FLIGHT = (1 << 32) - 1
"""The epoch of a copy that has not landed: nobody has seen it."""
READERS = 4
"""Readers of a word that are remembered; a warp's number modulo this is its place."""
_LANE, _WARP = 32, 37


class _Everything:
    """All of this process's memory as an array: kernels name words by address."""

    def __init__(self, width: int) -> None:
        self.__array_interface__ = {
            "data": (4096, False), "shape": ((1 << 47) // width,), "typestr": f"<u{width}", "version": 3,
        }  # fmt: skip


RAW: dict[int, Array] = {width: np.asarray(_Everything(width)) for width in (1, 2, 4, 8)}
_FIRST = 4096


def words(address: Array, width: int) -> Array:
    """Indices into ``RAW[width]``."""
    return (address - _FIRST) // width


@dataclass(frozen=True)
class Race:
    """Two accesses of which neither happens before the other: numbers of their statements (emit.PLACES)."""

    kind: str
    first: int
    second: int

    def __str__(self) -> str:
        def place(at: int) -> str:
            return "before the kernels" if at < 0 else f"{PLACES[at][0]}: {PLACES[at][1]}"

        return f"{self.kind}: {place(self.first)}  |  {place(self.second)}"


class Memory:
    """Regions of memory that kernels may touch.

    Args:
        seed: of the coin that decides what a racing load sees.

    Attributes:
        races: how often each was seen.
        changes: stores so far that changed a value; ``signals`` those of words that somebody may wait for.
    """

    def __init__(self, clocks: Clocks, seed: int = 0) -> None:
        self.clocks = clocks
        self.races: dict[Race, int] = {}
        self.changes = self.signals = 0
        self.granule = 4
        self._coin = random.Random(seed)
        self._bases = np.zeros(0, np.int64)
        self._ends = np.zeros(0, np.int64)
        self._firsts = np.zeros(0, np.int64)
        self._names: list[str] = []
        self._keep: list[Any] = []
        self._used = 0
        self._last = (0, 0, 0)
        self.wrote: Array = np.zeros(0, np.int64)  # warp << 37 | lane << 32 | epoch
        self.wrote_at: Array = np.zeros(0, np.int32)
        self.before: Array = np.zeros(0, np.uint32)
        self.strong: Array = np.zeros(0, np.int8)  # 0, or 1 + scope of a strong write
        self.read: Array = np.zeros((0, READERS), np.int64)
        self.read_at: Array = np.zeros((0, READERS), np.int32)

    # ------------------------------------------------------------------ regions

    def add(self, base: int, nbytes: int, name: str, keep: Any = None) -> None:
        """A region; one that overlaps older ones takes their place, the same one again changes nothing.

        Args:
            keep: what must live as long.
        """
        nbytes = -(-nbytes // 4) * 4
        at = int(np.searchsorted(self._bases, base, side="right")) - 1
        if at >= 0 and base + nbytes <= self._ends[at]:
            return
        for old in self._bases[(self._bases < base + nbytes) & (self._ends > base)]:
            self.remove(int(old))
        count = -(-nbytes // self.granule)
        self._grow(count)
        at = int(np.searchsorted(self._bases, base))
        self._bases, self._ends = np.insert(self._bases, at, base), np.insert(self._ends, at, base + nbytes)
        self._firsts = np.insert(self._firsts, at, self._used)
        self._names.insert(at, name)
        self._keep.insert(at, keep)
        self._used += count
        self._last = (0, 0, 0)

    def remove(self, base: int) -> None:
        """Forget a region."""
        at = int(np.searchsorted(self._bases, base))
        self._bases, self._ends, self._firsts = (np.delete(x, at) for x in (self._bases, self._ends, self._firsts))
        del self._names[at], self._keep[at]
        self._last = (0, 0, 0)

    def _grow(self, count: int) -> None:
        if self._used + count > len(self.wrote):
            more = max(count, len(self.wrote), 1 << 14)
            for name in ("wrote", "wrote_at", "before", "strong", "read", "read_at"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros((more, *old.shape[1:]), old.dtype)]))
            self.wrote_at[-more:] = -1

    def refine(self, granule: int) -> None:
        """Keep the history of smaller pieces; a kernel that stores such comes."""
        if granule < self.granule:
            factor = self.granule // granule
            for name in ("wrote", "wrote_at", "before", "strong", "read", "read_at"):
                setattr(self, name, np.repeat(getattr(self, name), factor, 0))
            self._firsts, self._used, self.granule, self._last = (
                self._firsts * factor,
                self._used * factor,
                granule,
                (0, 0, 0),
            )

    def locate(self, address: Array, nbytes: int, at: int) -> Array:
        """Where the history of ``nbytes`` from each address lies: int64 [lanes, pieces].

        Raises:
            PtxError: outside of every region, or not aligned.
        """
        if (address % nbytes).any():
            raise PtxError(
                f"misaligned address {int(address[(address % nbytes) != 0][0]):#x} of {nbytes} bytes: {PLACES[at]}"
            )
        base, end, first = self._last
        if not (address.min() >= base and address.max() + nbytes <= end):
            index = np.searchsorted(self._bases, address, side="right") - 1
            bad = (index < 0) | (address + nbytes > self._ends[index])
            if bad.any():
                raise PtxError(
                    f"illegal address {int(address[bad][0]):#x}, {nbytes} bytes: {PLACES[at][0]}: {PLACES[at][1]}"
                )
            if (index == index[0]).all():
                self._last = (int(self._bases[index[0]]), int(self._ends[index[0]]), int(self._firsts[index[0]]))
            start = (address - self._bases[index]) // self.granule + self._firsts[index]
        else:
            start = (address - base) // self.granule + first
        return start[:, None] + np.arange(max(1, nbytes // self.granule))

    # ------------------------------------------------------------------ accesses of all lanes

    def load(
        self, warp: Array, lane: Array, address: Array, width: int, count: int, at: int, plane: int = GENERIC
    ) -> Array:
        """``count`` numbers of ``width`` bytes from each address: [lanes, count]. Arguments are by lane."""
        pieces = self.locate(address, width * count, at)
        data = RAW[width][words(address, width)[:, None] + np.arange(count)]
        late = self._unordered(self.wrote[pieces], warp, lane, plane)
        if late.any():
            data = self._late(data, pieces, late, address, at)
        self.note_read(pieces, warp, lane, self.clocks.now(warp), at)
        return data

    def _unordered(self, history: Array, warp: Array, lane: Array, plane: int) -> Array:
        """Which writes did not happen before accesses of these lanes."""
        who, epoch = history >> _WARP, history & IN_FLIGHT
        me = warp[:, None]
        seen = self.clocks.seen[me, plane, who]
        late = epoch > seen
        if plane == GENERIC:
            late |= (who == me) & (epoch == seen) & (((history >> _LANE) & 31) != lane[:, None])
        return late

    def note_read(self, pieces: Array, warp: Array, lane: Array, epoch: Any, at: int) -> None:
        """Remember who read."""
        place = (warp % READERS)[:, None]
        self.read[pieces, place] = (warp << _WARP | lane << _LANE | epoch)[:, None]
        self.read_at[pieces, place] = at

    def _late(self, data: Array, pieces: Array, late: Array, address: Array, at: int) -> Array:
        """What racing loads see, and the report; writes that changed nothing do not race."""
        size = self.granule
        starts = (address - address % size)[:, None] + size * np.arange(pieces.shape[1])
        now = RAW[size][words(starts, size)].astype(np.uint32)
        late = late & ((now != self.before[pieces]) | ((self.wrote[pieces] & IN_FLIGHT) == IN_FLIGHT))
        if not late.any():
            return data
        for first in np.unique(self.wrote_at[pieces[late]]):
            self.report("read of what was not published", int(first), at)
        seen = np.where(late & (self._coin.random() < 0.5), self.before[pieces], now).astype(f"u{size}")
        raw = np.ascontiguousarray(seen).view(np.uint8)
        width = data.dtype.itemsize * data.shape[1]
        offset = (address % size if width < size else np.zeros(len(address), np.int64)).astype(np.int64)
        return np.ascontiguousarray(np.take_along_axis(raw, offset[:, None] + np.arange(width), 1)).view(data.dtype)

    def store(
        self, warp: Array, lane: Array, address: Array, data: Array, at: int, strong: int = 0, plane: int = GENERIC
    ) -> None:
        """Store ``data`` [lanes, count] at each address."""
        width, count = data.dtype.itemsize, data.shape[1]
        pieces = self.locate(address, width * count, at)
        size = self.granule
        starts = (address - address % size)[:, None] + size * np.arange(pieces.shape[1])
        at_words = words(starts, size)
        history = self.wrote[pieces]
        late = self._unordered(history, warp, lane, plane)
        read = self.read[pieces]
        me = warp[:, None, None]
        seen = self.clocks.seen[me, GENERIC, read >> _WARP]
        unread = ((read & IN_FLIGHT) > seen) | (
            ((read >> _WARP) == me)
            & ((read & IN_FLIGHT) == seen)
            & (((read >> _LANE) & 31) != lane[:, None, None])
            & (read > 0)
        )
        old = RAW[size][at_words].astype(np.uint32)
        RAW[width][words(address, width)[:, None] + np.arange(count)] = data
        changed = RAW[size][at_words] != old
        if strong and late.any():
            late &= self.weak(pieces, history, int(warp[0]), strong)
        late &= changed | ((history & IN_FLIGHT) == IN_FLIGHT)
        if late.any():
            for first in np.unique(self.wrote_at[pieces[late]]):
                self.report("write over what was not published", int(first), at)
        if unread.any():
            for row, piece, place in np.argwhere(unread & changed[:, :, None])[:64]:
                self.report("write over what may still be read", int(self.read_at[pieces[row, piece], place]), at)
        self.changes += int(changed.any())
        self.before[pieces] = old
        self.wrote[pieces] = (warp << _WARP | lane << _LANE | self.clocks.now(warp))[:, None]
        self.wrote_at[pieces] = at
        self.strong[pieces] = strong

    def weak(self, pieces: Array, history: Array, warp: int, strong: int) -> Array:
        """Which writes are not morally strong together with a strong access of a warp: they do race with it."""
        clocks, result = self.clocks, np.ones(pieces.shape, bool)
        for place in np.ndindex(*pieces.shape):
            theirs, who = int(self.strong[pieces[place]]), int(history[place]) >> _WARP
            if theirs:
                result[place] = not (
                    clocks.includes(theirs - 1, int(clocks.gpu[who]), int(clocks.cta[who]), warp)
                    and clocks.includes(strong - 1, int(clocks.gpu[warp]), int(clocks.cta[warp]), who)
                )
        return result

    def report(self, kind: str, first: int, second: int) -> None:
        """Count a race."""
        race = Race(kind, first, second)
        self.races[race] = self.races.get(race, 0) + 1

    # ------------------------------------------------------------------ accesses of one lane that order others

    def strong_read(self, warp: int, lane: int, address: int, width: int, scope: int, at: int) -> int:
        """The newest value of a word."""
        where, me, my_lane = np.array([address]), np.array([warp]), np.array([lane])
        pieces = self.locate(where, width, at)
        history = self.wrote[pieces]
        late = self._unordered(history, me, my_lane, GENERIC)
        if late.any():
            late &= self.weak(pieces, history, warp, 1 + scope)
            if late.any():
                self._late(RAW[width][words(where, width)[:, None]], pieces, late, where, at)
        # No reader is noted: what signals order is checked where it is read.
        return int(RAW[width][words(where, width)][0])

    def strong_write(self, warp: int, lane: int, address: int, data: Array, scope: int, at: int) -> None:
        """Store [count] numbers."""
        self.store(np.array([warp]), np.array([lane]), np.array([address]), data[None], at, 1 + scope)

    # ------------------------------------------------------------------ copies that land later

    def begin_copy(self, warp: Array, lane: Array, address: Array, nbytes: int, at: int, plane: int = GENERIC) -> None:
        """From now on nobody may read or write here: the copy may land at any time. The memory holds rubbish."""
        rubbish = np.full((len(address), nbytes // 4), 0xFFFFFFFF, np.uint32)
        self.store(warp, lane, address, rubbish, at, plane=plane)
        self.wrote[self.locate(address, nbytes, at)] = (warp << _WARP | lane << _LANE | IN_FLIGHT)[:, None]

    def end_copy(self, warp: Array, lane: Array, address: Array, data: Array, at: int) -> None:
        """It lands, as a write of these lanes."""
        pieces = self.locate(address, data.dtype.itemsize * data.shape[1], at)
        self.wrote[pieces] = (warp << _WARP | lane << _LANE | self.clocks.now(warp))[:, None]
        where = words(address, data.dtype.itemsize)[:, None] + np.arange(data.shape[1])
        RAW[data.dtype.itemsize][where] = data
        self.changes += 1
