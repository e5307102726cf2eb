"""Tensor copies (TMA) and the barriers in shared memory (mbarrier) by which threads learn that they have landed.

A copy reads global memory and writes shared memory by the async proxy: what was stored to its source must be followed
by an acquire *and* a proxy fence, by the warp that copies. It lands some time later, 128 bytes a row and swizzled, and
adds its bytes to a barrier; who has waited for the barrier's phase may read what landed, by either proxy. Until then
the target holds rubbish and the source may be read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx.clocks import ASYNC, ASYNC_GLOBAL, GENERIC, PLANES, Clock
from ptx.emit import SPLIT, STOP
from ptx.memory import IN_FLIGHT
from ptx.text import PtxError

Array = NDArray[Any]
_FIRST = 1000
"""Numbers of barriers in memory, for lanes that wait at one, begin here: named ones are below."""


@dataclass
class Barrier:
    """A barrier in shared memory.

    Attributes:
        arrivals: that a phase takes; ``missing`` of them, and ``nbytes``, are not there yet.
        phase: the one that goes on. ``learned``: what its arrivals have seen; ``known``: those of the phase before.
        copies: on their way to it.
    """

    number: int
    arrivals: int
    missing: int
    nbytes: int = 0
    phase: int = 0
    copies: int = 0
    learned: Clock = field(default_factory=lambda: np.zeros((PLANES, 1), np.int64))
    known: Clock = field(default_factory=lambda: np.zeros((PLANES, 1), np.int64))

    def learn(self, clock: Clock) -> None:
        """More that who waits for this phase will have seen."""
        size = max(clock.shape[1], self.learned.shape[1])
        both = [np.pad(c, ((0, 0), (0, size - c.shape[1]))) for c in (clock, self.learned)]
        self.learned = np.maximum(*both)


_MAPS: dict[int, tuple[dict[str, int], tuple[int, int]]] = {}
"""Descriptors in global memory: fields, and who has acquired them, as (warp, epoch)."""


class TensorCopies:
    """What a gang (launch.py) does with them."""

    launch: Any
    numbers: Array
    cta: Array
    warp: Array
    lane_numbers: Array
    count: int
    address: Any
    _alone: Any

    def _taking_part(self, mask: Array | None) -> list[int]:
        return list(range(self.count)) if mask is None else [int(i) for i in np.nonzero(mask)[0]]

    # ------------------------------------------------------------------ barriers

    def init_barrier(self, address: Array, arrivals: Array, mask: Array | None) -> None:
        """mbarrier.init."""
        where, barriers = self.address("shared", address), self.launch.barriers
        for place in self._taking_part(mask):
            count = int(arrivals[place])
            barriers[int(where[place])] = Barrier(_FIRST + len(barriers), count, count)

    def _barrier(self, address: int) -> Barrier:
        if address not in self.launch.barriers:
            raise PtxError(f"{self.launch.name}: a barrier in shared memory is used before it is made")
        barrier: Barrier = self.launch.barriers[address]
        return barrier

    def arrive(self, address: Array, given: Array, expects: bool, mask: Array | None, at: int) -> None:
        """mbarrier.arrive, with release; ``expects``: one arrival, and so many bytes to come."""
        where, clocks = self.address("shared", address), self.launch.clocks
        for place in self._taking_part(mask):
            barrier, warp = self._barrier(int(where[place])), int(self.warp[place])
            barrier.learn(clocks.snapshot(warp, self._alone(place)))
            clocks.step(np.array([warp]))
            barrier.nbytes += int(given[place]) if expects else 0
            barrier.missing -= 1 if expects else int(given[place])
            if barrier.missing < 0:
                raise PtxError(f"{self.launch.name}: more arrivals at a barrier than it takes")
            _turn(self.launch, barrier)

    def await_phase(self, address: Array, parity: Array, following: int) -> int:
        """mbarrier.try_wait.parity, until it succeeds; with acquire."""
        launch, where = self.launch, self.address("shared", address)
        waits = np.zeros(self.count, bool)
        for cta in np.unique(self.cta):
            mine = np.nonzero(self.cta == cta)[0]
            barrier = self._barrier(int(where[mine[0]]))
            if barrier.phase % 2 == int(parity[mine[0]]) % 2:
                launch.waiting[self.numbers[mine]] = barrier.number
                waits[mine] = True
            else:
                for warp in np.unique(self.warp[mine]):
                    launch.clocks.join(int(warp), barrier.known)
        if not waits.any():
            return following
        launch.pc[self.numbers] = np.where(waits, launch.place, following)
        return STOP

    # ------------------------------------------------------------------ descriptors

    def set_map(self, address: Array, name: str, which: int, value: Array, mask: Array | None) -> None:
        """tensormap.replace: a field of a descriptor in shared memory."""
        where = self.address("shared", address)
        for place in self._taking_part(mask):
            self.launch.tensor_maps.setdefault(int(where[place]), {})[f"{name}{which}"] = int(value[place])

    def publish_map(self, target: Array, source: Array, mask: Array | None, at: int) -> None:
        """tensormap.cp_fenceproxy: a descriptor goes to global memory."""
        shared = self.address("shared", source)
        for place in self._taking_part(mask):
            self.launch.memory.locate(target[place : place + 1], 128, at)
            _MAPS[int(target[place])] = (dict(self.launch.tensor_maps[int(shared[place])]), (-1, 0))

    def acquire_map(self, address: Array, mask: Array | None, at: int) -> None:
        """fence.proxy.tensormap, with acquire: from here on, and for who comes after, copies may use it."""
        for place in self._taking_part(mask):
            warp = int(self.warp[place])
            fields, _ = _MAPS[int(address[place])]
            _MAPS[int(address[place])] = (fields, (warp, int(self.launch.clocks.now(np.array([warp]))[0])))

    def _map(self, address: int, warp: int) -> dict[str, int]:
        fields, (owner, epoch) = _MAPS.get(address, ({}, (-1, 0)))
        if owner < 0 or (owner != warp and self.launch.clocks.seen[warp, GENERIC, owner] < epoch):
            raise PtxError(f"{self.launch.name}: a tensor copy by a descriptor that its thread has not acquired")
        known = (fields["rank0"], fields["swizzle_mode0"], fields["element_stride0"], fields["element_stride1"])
        if known != (1, 3, 1, 1):
            raise PtxError(f"the machine does not know the tensor map {fields}")
        return fields

    # ------------------------------------------------------------------ copies

    def copy_tensor(
        self, target: Array, tensor_map: Array, where: tuple[Array, ...], barrier: Array, mask: Array | None, at: int
    ) -> None:
        """cp.async.bulk.tensor.2d from global to shared memory: rows of 128 bytes, swizzled."""
        for place in self._taking_part(mask):
            warp = int(self.warp[place])
            fields = self._map(int(tensor_map[place]), warp)
            column, row = (int(x[place]) for x in where)
            rows = np.arange(fields["box_dim1"])
            relative = np.repeat(int(target[place]) + 128 * rows, 8) + np.tile(16 * np.arange(8), len(rows))
            relative ^= (relative >> 7 & 7) << 4
            inside = np.repeat((row + rows >= 0) & (row + rows < fields["global_dim1"]), 8)
            element = 4 if fields["elemtype0"] == 7 else 2
            if fields["box_dim0"] * element != 128:
                raise PtxError(f"the machine does not know the tensor map {fields}")
            source = fields["global_address0"] + np.repeat((row + rows) * fields["global_stride0"], 8)
            source = source + np.tile(column * element + 16 * np.arange(8), len(rows))
            shared = relative + int(self.launch.shared_at[self.cta[place]])
            state = self._barrier(int(self.address("shared", barrier)[place]))
            state.copies += 1
            copy = _Copy(self.launch, warp, source, shared, inside, state, at)
            self.launch.deliveries.append(copy)

    def branch_by(self, index: Array, targets: list[int]) -> int:
        """brx.idx."""
        going = np.array(targets)[index.astype(np.int64)]
        if (going == going[0]).all():
            return int(going[0])
        self.launch.pc[self.numbers] = going
        return SPLIT


class _Copy:
    """A copy on its way; the call makes it land."""

    def __init__(
        self, launch: Any, warp: int, source: Array, target: Array, inside: Array, barrier: Barrier, at: int
    ) -> None:
        memory, clocks = launch.memory, launch.clocks
        self._launch, self._target, self._barrier, self._at = launch, target, barrier, at
        # Who copies is none of the program's warps: what it did is known to those who have waited for the barrier.
        self._engine = launch.copiers.pop() if launch.copiers else int(clocks.add(1, launch.gpu)[0])
        clocks.start(np.array([self._engine]), clocks.seen[warp, :, : clocks.count].copy())
        clocks.step(np.array([warp]))
        engine, lane = np.full(len(target), self._engine), np.zeros(len(target), np.int64)
        memory.begin_copy(engine, lane, target, 16, at, ASYNC)
        self._data = np.zeros((len(target), 4), np.uint32)
        who, zeros = engine[inside], lane[inside]
        self._data[inside] = memory.load(who, zeros, source[inside], 4, 4, at, ASYNC_GLOBAL)
        self._pieces = memory.locate(source[inside], 16, at)
        memory.note_read(self._pieces, who, zeros, IN_FLIGHT, at)

    def __call__(self) -> bool:
        launch, memory, clocks = self._launch, self._launch.memory, self._launch.clocks
        engine, lane = np.full(len(self._target), self._engine), np.zeros(len(self._target), np.int64)
        memory.end_copy(engine, lane, self._target, self._data, self._at)
        reader = np.full(len(self._pieces), self._engine)
        memory.note_read(self._pieces, reader, lane[: len(reader)], clocks.now(reader), self._at)
        clock = np.zeros((PLANES, clocks.count), np.int64)
        clock[:, self._engine] = clocks.now(np.array([self._engine]))
        self._barrier.learn(clock)
        self._barrier.nbytes -= self._data.nbytes
        self._barrier.copies -= 1
        launch.copiers.append(self._engine)
        _turn(launch, self._barrier)
        return True


def _turn(launch: Any, barrier: Barrier) -> None:
    """The phase ends when all have arrived and all bytes are there."""
    if barrier.missing or barrier.nbytes:
        return
    barrier.phase += 1
    barrier.missing = barrier.arrivals
    barrier.known, barrier.learned = barrier.learned, np.zeros((PLANES, 1), np.int64)
    launch.waiting[launch.waiting == barrier.number] = -1
