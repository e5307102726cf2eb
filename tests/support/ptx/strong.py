"""Accesses through which threads see each other in an order: polls, signals, atomics, fences. Lane by lane: few do."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx.clocks import SCOPES
from ptx.emit import STOP
from ptx.memory import RAW, words
from ptx.text import PtxError

Array = NDArray[Any]


class Ordered:
    """What a gang (launch.py) does in order."""

    launch: Any
    numbers: Array
    cta: Array
    warp: Array
    warps: Array
    lane_numbers: Array
    count: int
    address: Any

    def _lanes(self, space: str, address: Array, mask: Array | None) -> list[tuple[int, int, int, int]]:
        """``(place in the gang, warp, lane, address)`` of the lanes that take part."""
        where = self.address(space, address)
        keep = range(self.count) if mask is None else np.nonzero(mask)[0]
        return [(int(i), int(self.warp[i]), int(self.lane_numbers[i]), int(where[i])) for i in keep]

    def _alone(self, place: int) -> bool:
        """Whether no other lane of a lane's warp has touched memory since the warp last met."""
        lane = int(self.numbers[place])
        first = lane - lane % 32
        touched = self.launch.touched[first : first + 32]
        return not touched.any() or (int(touched.sum()) == 1 and bool(touched[lane - first]))

    def _polled(self, place: int, address: int, value: int, at: int) -> None:
        """A warp that reads the same again sleeps until some signal changes."""
        launch, warp = self.launch, int(self.numbers[place]) // 32
        if launch.polled.get((warp, address)) == value:
            launch.asleep[warp] = launch.memory.signals
            launch.polls[warp] = at
        launch.polled[warp, address] = value

    def strong_load(
        self, space: str, address: Array, width: int, sem: str, scope: str, mask: Array | None, at: int
    ) -> Array:
        """ld.relaxed, ld.acquire, ld.volatile (relaxed, system scope)."""
        result = np.zeros(self.count, f"u{width}")
        memory, level = self.launch.memory, SCOPES[scope]
        for place, warp, lane, where in self._lanes(space, address, mask):
            value = memory.strong_read(warp, lane, where, width, level, at)
            memory.clocks.read(where, warp, sem, level)
            result[place] = value
            if space == "global":
                self._polled(place, where, value, at)
        return result

    def strong_store(
        self, space: str, address: Array, width: int, data: Any, sem: str, scope: str, mask: Array | None, at: int
    ) -> None:
        """st.relaxed, st.release, st.volatile."""
        memory, level = self.launch.memory, SCOPES[scope]
        table = np.stack([np.broadcast_to(x, self.count) for x in data], 1).astype(f"u{width}", copy=False)
        for place, warp, lane, where in self._lanes(space, address, mask):
            alone = self._alone(place)
            before = memory.changes
            memory.strong_write(warp, lane, where, table[place], level, at)
            memory.clocks.write(where, warp, sem, level, alone, False)
            memory.signals += memory.changes > before

    def atomic(
        self, space: str, address: Array, width: int, action: str, data: Any, signed: bool, sem: str, scope: str,
        mask: Array | None, at: int,
    ) -> Array:  # fmt: skip
        """atom and red: what was there before."""
        result = np.zeros(self.count, f"u{width}")
        memory, level = self.launch.memory, SCOPES[scope]
        for place, warp, lane, where in self._lanes(space, address, mask):
            alone = self._alone(place)
            old = memory.strong_read(warp, lane, where, width, level, at)
            memory.clocks.read(where, warp, sem, level)
            new = _updated(action, old, [int(x[place]) for x in data], width, signed) % (1 << 8 * width)
            result[place] = old
            if new == old and action == "add":
                self._polled(place, where, old, at)
            elif new != old:
                memory.strong_write(warp, lane, where, np.array([new], f"u{width}"), level, at)
                memory.signals += 1
            memory.clocks.write(where, warp, sem, level, alone, True)
        return result

    def fence(self, scope: str) -> None:
        """fence.acq_rel, fence.sc, membar."""
        alone = self.launch.touched[self.numbers].sum() <= 1
        self.launch.clocks.fence(self.warps, SCOPES[scope], bool(alone))

    def proxy_fence(self, planes: tuple[int, ...]) -> None:
        """fence.proxy.async, of all memory or of shared or global memory alone."""
        self.launch.clocks.proxy_fence(self.warps, planes)

    def call(self, name: str, arguments: tuple[Array, ...], at: int, following: int) -> int:
        """A function outside of the kernel; what waits inside comes again."""
        launch = self.launch
        if launch.call(self, name, arguments, at):
            # A call for a whole program ends with __syncthreads: all of its threads must come.
            return self.barrier(0, following, at) if name.endswith("_block") else following
        launch.pc[self.numbers] = launch.place
        launch.asleep[np.unique(self.numbers // 32)] = launch.memory.signals
        return STOP


def _updated(action: str, old: int, data: list[int], width: int, signed: bool) -> int:
    if signed:
        half = 1 << (8 * width - 1)
        old, data = (old + half) % (2 * half) - half, [(x + half) % (2 * half) - half for x in data]
    if action == "cas":
        return data[1] if old == data[0] else old
    x = data[0]
    table = {
        "add": old + x,
        "exch": x,
        "max": max(old, x),
        "min": min(old, x),
        "or": old | x,
        "and": old & x,
        "xor": old ^ x,
    }
    if action not in table:
        raise PtxError(f"the machine does not know atom.{action}")
    return table[action]


def raw_word(address: int, width: int = 8) -> int:
    """A word as it stands."""
    return int(RAW[width][words(np.array([address]), width)][0])
