"""NVSHMEM's device functions in a world: puts are delivered later, data before their signal, in any order otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.clocks import SCOPES, Clock
from ptx.text import PtxError
from ptx.world import World

_SET = 9
_PUT = "nvshmemx_putmem_signal_nbi_"


class Network:
    """What NVSHMEM does between GPUs.

    Args:
        world: whose calls come here.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._segments: dict[int, list[tuple[list[int], int]]] = {}
        self._idle: dict[int, list[int]] = {}
        world.calls = self.call

    def segments(self, gpu: int, addresses: list[int], nbytes: int) -> None:
        """A GPU has symmetric memory: where it lies on every GPU."""
        self._segments.setdefault(gpu, []).append((addresses, nbytes))

    def _shift(self, gpu: int, pe: int, address: int, nbytes: int) -> int:
        """From a GPU's own symmetric address to the same place on another."""
        for addresses, size in self._segments[gpu]:
            if addresses[gpu] <= address <= addresses[gpu] + size - nbytes:
                return addresses[pe] - addresses[gpu]
        raise PtxError(f"{address:#x}, {nbytes} bytes, is not in the symmetric memory of GPU {gpu}")

    def call(self, world: World, gang: Any, name: str, arguments: Any, at: int) -> bool:
        """A call by a gang; none waits (False).

        Raises:
            PtxError: NVSHMEM has no such function.
        """
        if name not in (f"{_PUT}block", f"{_PUT}warp"):
            raise PtxError(f"nothing stands for the function {name}")
        gang.whole()
        for place in np.nonzero((gang.tid if name.endswith("block") else gang.lane_numbers) == 0)[0]:
            self._put(gang, int(place), [int(x[place]) for x in arguments], at)
        return True

    def _put(self, gang: Any, place: int, arguments: list[int], at: int) -> None:
        """The thread that hands the put over must have seen what its group, and all others, stored."""
        to, source, nbytes, signal, value, operation, pe = arguments
        if operation != _SET:
            raise PtxError(f"signal operation {operation} is not NVSHMEM_SIGNAL_SET")
        if nbytes <= 0:  # nobody waits for what has no bytes, so it may be late and take back a later signal
            raise PtxError(f"{nbytes} bytes are put with a signal")
        clocks, gpu = self._world.clocks, gang.launch.gpu
        clock = clocks.snapshot(int(gang.warp[place]), gang._alone(place))
        clocks.step(gang.warp[place : place + 1])
        to += self._shift(gpu, pe, to, nbytes)
        signal += self._shift(gpu, pe, signal, 8)
        self._world.deliveries.append(_Delivery(self, gpu, clock, to, source, nbytes, signal, value, at))

    def take(self, gpu: int) -> int:
        """A number for a card's transfer."""
        idle = self._idle.setdefault(gpu, [])
        return idle.pop() if idle else int(self._world.clocks.add(1, gpu)[0])

    def give(self, gpu: int, number: int) -> None:
        """It is over."""
        self._idle[gpu].append(number)


class _Delivery:
    """A put on its way; every call does the next half: the data, then the signal."""

    def __init__(
        self,
        network: Network,
        gpu: int,
        clock: Clock,
        to: int,
        source: int,
        nbytes: int,
        signal: int,
        value: int,
        at: int,
    ) -> None:
        self._network, self._gpu, self._clock = network, gpu, clock
        self._to, self._source, self._nbytes, self._signal, self._value, self._at = (
            to,
            source,
            nbytes,
            signal,
            value,
            at,
        )
        self._card = -1

    def __call__(self) -> bool:
        memory = self._network._world.memory
        clocks = memory.clocks
        if self._card < 0:
            self._card = self._network.take(self._gpu)
            clocks.start(np.array([self._card]), self._clock)
            width = 4 if self._nbytes % 4 == 0 else 1
            memory.refine(width)
            count = self._nbytes // width
            card, lane = np.full(count, self._card), np.zeros(count, np.int64)
            step = width * np.arange(count)
            memory.store(
                card, lane, self._to + step, memory.load(card, lane, self._source + step, width, 1, self._at), self._at
            )
            return False
        memory.strong_write(self._card, 0, self._signal, np.array([self._value], np.uint64), SCOPES["sys"], self._at)
        clocks.write(self._signal, self._card, "release", SCOPES["sys"], True, False)
        memory.signals += 1
        self._network.give(self._gpu, self._card)
        return True
