"""A launched kernel: its threads, registers and shared memory; and the gangs of warps that run it together.

Warps that stand at the same place run as one gang, a numpy array a register over all their lanes: one legal order of
what they do, and the fast one. Which warps run, and how long before others do, is drawn by the world.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx import tiles
from ptx.clocks import Clocks
from ptx.emit import DONE, PLACES, SPLIT, STOP, Code
from ptx.group import GroupProduct, GroupProducts
from ptx.memory import IN_FLIGHT, Memory
from ptx.strong import Ordered
from ptx.tensor_copies import Barrier, TensorCopies
from ptx.text import PtxError

Array = NDArray[Any]
_KINDS = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_PAD = 64
_WARP_SYNC = 999
"""What a lane waits at that waits for its warp; named barriers are below, those in memory above."""


class Launch:
    """A grid of programs of one kernel on one GPU.

    Args:
        arguments: of the kernel, in order: integers and addresses.
        warps: their numbers for the clocks, at least as many as the grid has.
        call: what a call of a function outside of the kernel does: ``(gang, name, arguments, number)``; False: the
            caller must come again.
        deliveries: of the world: what happens some time (tensor_copies.py).
    """

    def __init__(
        self, code: Code, grid: int, arguments: list[int], shared_bytes: int, gpu: int, name: str, memory: Memory,
        warps: Array, coin: random.Random, time_ns: Callable[[], int], call: Callable[..., bool],
        deliveries: list[Callable[[], bool]] | None = None,
    ) -> None:  # fmt: skip
        entry = code.entry
        self.code, self.grid, self.gpu, self.name, self.memory = code, grid, gpu, name, memory
        self.clocks: Clocks = memory.clocks
        self.threads, self.coin, self.time_ns, self.call = entry.threads, coin, time_ns, call
        self.parameters = {param: value for (param, _), value in zip(entry.params, arguments, strict=True)}
        lanes = grid * self.threads
        self.banks = {p: np.zeros((entry.counts[p], lanes), _KINDS[bits]) for p, bits in entry.registers.items()}
        self.pc = np.zeros(lanes, np.int64)
        self.waiting = np.full(lanes, -1)  # the barrier a lane waits at
        self.tid = np.tile(np.arange(self.threads), grid)
        self.cta = np.repeat(np.arange(grid), self.threads)
        self.lane = np.arange(lanes) % 32
        self.warp = warps[np.arange(lanes) // 32]
        self.warps = warps[: lanes // 32]
        self.touched = np.zeros(lanes, bool)
        groups = any(s.op.startswith("wgmma") for s in entry.statements)
        self.unit = 128 if groups else 32  # lanes that are switched together
        self.shared_bytes = max(shared_bytes, 16)
        pitch = -(-(self.shared_bytes + _PAD) // 1024) * 1024
        self._shared = np.full(grid * pitch + 1024, 0xFF, np.uint8)
        start = -(-self._shared.ctypes.data // 1024) * 1024
        self.shared_at = start + np.arange(grid) * pitch
        for cta in range(grid):
            memory.add(int(self.shared_at[cta]), self.shared_bytes, f"shared memory of {name}", self._shared)
        self.asleep = np.full(lanes // 32, -1)  # the count of signals at which a warp last polled in vain
        self.polled: dict[tuple[int, int], int] = {}
        self.polls: dict[int, int] = {}
        self.copies: list[Copy] = []
        self.copy_group = np.zeros(lanes, np.int64)
        self.products: list[GroupProduct] = []
        self.product_group = np.zeros(lanes, np.int64)
        self.deliveries = [] if deliveries is None else deliveries
        self.barriers: dict[int, Barrier] = {}
        self.copiers: list[int] = []
        self.tensor_maps: dict[int, dict[str, int]] = {}
        self.steps = self.place = 0
        self._gangs: dict[bytes, Gang] = {}
        self.clocks.seat(self.warps, self.threads // 32)

    @property
    def done(self) -> bool:
        """Whether all threads have returned."""
        return bool((self.pc == DONE).all())

    def close(self) -> None:
        """Shared memory goes.

        Raises:
            PtxError: a tensor copy into it has not landed.
        """
        if any(barrier.copies for barrier in self.barriers.values()):
            raise PtxError(f"{self.name} ended before a tensor copy had landed")
        for start in self.shared_at:
            self.memory.remove(int(start))

    def runnable(self, signals: int) -> Array:
        """Lanes that could go on; programs that poll sleep until a signal changes."""
        return (self.pc != DONE) & (self.waiting < 0) & np.repeat(self.asleep != signals, 32)

    def pick(self, runnable: Array, together: float) -> tuple[Gang, int]:
        """A gang at one place, and the place."""
        pc = np.where(runnable, self.pc, 1 << 40).reshape(-1, self.unit)
        first = pc.min(1)
        units = np.nonzero(first < 1 << 40)[0]
        chosen = int(self.coin.choice(units))
        place = int(first[chosen])
        same = units[first[units] == place]
        if self.coin.random() > together and len(same) > 1:
            keep = np.array([self.coin.random() < 0.5 for _ in same])
            keep[same == chosen] = True
            same = same[keep]
        at = pc[same] == place
        lanes = (same[:, None] * self.unit + np.arange(self.unit))[at]
        return self.gang(lanes), place

    def gang(self, lanes: Array) -> Gang:
        """The gang of some lanes."""
        key = lanes.tobytes()
        if key not in self._gangs:
            if len(self._gangs) > 256:
                self._gangs.clear()
            self._gangs[key] = Gang(self, lanes)
        return self._gangs[key]

    def run(self, gang: Gang, place: int, most: int) -> None:
        """Let a gang go on for up to ``most`` stretches."""
        stretches = self.code.stretches
        for _ in range(most):
            stretch = stretches[place]
            self.place = place
            self.steps += 1
            if self.products:
                self._check_registers(gang, stretch)
            following = stretch.run(gang)
            if following < 0:
                if following == DONE:
                    self.pc[gang.lanes] = DONE
                return
            place = following
            if stretch.ordered and self.coin.random() < 0.15:
                break
        self.pc[gang.lanes] = place

    def _check_registers(self, gang: Gang, stretch: Any) -> None:
        """Sums of products that have not been waited for may be moved, not used."""
        for product in self.products:
            if np.isin(product.lanes[0], gang.numbers):
                for target, source in stretch.moves:
                    if source in product.registers:
                        product.registers.add(target)
                if stretch.uses & product.registers:
                    self.memory.report(
                        "use of a product that was not waited for", product.at, self.code.first + stretch.first
                    )

    def where(self) -> str:
        """Where its threads stand, for messages."""
        places: dict[int, int] = {}
        for pc in self.pc[self.pc != DONE]:
            places[int(pc)] = places.get(int(pc), 0) + 1
        said = [
            f"{count} threads at {self.code.entry.statements[self.code.stretches[pc].first]}"
            for pc, count in places.items()
        ]
        polls = [
            str(PLACES[at][1]) for warp, at in self.polls.items() if self.asleep[warp] >= 0 or len(self.polls) == 1
        ]
        return f"{self.name}: {'; '.join(said[:4])}" + (
            f"; polls in vain: {'; '.join(sorted(set(polls))[:3])}" if polls else ""
        )


@dataclass(frozen=True)
class Copy:
    """Copies of one cp.async of a gang that have not landed, by lane; ``pieces`` (memory.py) are the sources of those
    that ``read`` one."""

    lanes: Array
    group: Array
    target: Array
    data: Array
    read: Array
    pieces: Array
    at: int

    def part(self, keep: Array) -> Copy:
        """Some of the lanes."""
        pieces = self.pieces[keep[self.read]]
        return Copy(
            self.lanes[keep], self.group[keep], self.target[keep], self.data[keep], self.read[keep], pieces, self.at
        )


class Gang(Ordered, GroupProducts, TensorCopies):
    """Lanes that run together; its methods are what the functions of stretches (emit.py) call."""

    def __init__(self, launch: Launch, lanes: Array) -> None:
        self.launch, self.numbers = launch, lanes
        plain = len(lanes) and lanes[-1] - lanes[0] == len(lanes) - 1
        self.lanes: Any = slice(int(lanes[0]), int(lanes[-1]) + 1) if plain else lanes
        self.count = len(lanes)
        for prefix, bank in launch.banks.items():
            setattr(self, f"bank_{prefix}", bank)
        self.tid, self.cta, self.lane_numbers = launch.tid[lanes], launch.cta[lanes], launch.lane[lanes]
        self.warp = launch.warp[lanes]
        self.warps = np.unique(self.warp)
        self.warp_in_cta = self.tid // 32
        self.programs, self.threads = launch.grid, launch.threads
        self.time_ns = launch.time_ns
        self._shared = launch.shared_at[self.cta]
        self._whole = len(lanes) == 32 * len(self.warps)

    # ------------------------------------------------------------------ registers and control

    def full(self, kind: Any, value: Any) -> Array:
        """A number for every lane."""
        return np.full(self.count, value, kind)

    def parameter(self, name: str, width: int) -> int:
        """An argument of the kernel, as ``width`` bytes without a sign."""
        return self.launch.parameters[name] % (1 << (8 * width))

    def branch(self, taken: Array, target: int, following: int) -> int:
        """Where to go on."""
        if taken.all():
            return target
        if not taken.any():
            return following
        self.launch.pc[self.numbers] = np.where(taken, target, following)
        return SPLIT

    def pause(self, following: int) -> int:
        """After a poll: sleep if it was in vain."""
        launch = self.launch
        sleeping = launch.asleep[self.numbers // 32] == launch.memory.signals
        if not sleeping.any():
            return following
        launch.pc[self.numbers] = following
        return STOP

    def whole(self) -> None:
        """Raise unless all lanes of the warps are here."""
        if not self._whole:
            raise PtxError(
                f"{self.launch.name}: {self.count} lanes of {len(self.warps)} warps run an instruction of whole warps"
            )

    def barrier(self, number: int, following: int, at: int, count: int = 0) -> int:
        """bar.sync."""
        launch = self.launch
        launch.pc[self.numbers] = following
        launch.waiting[self.numbers] = number
        freed = True
        for cta in np.unique(self.cta):
            lanes = slice(cta * self.threads, (cta + 1) * self.threads)
            here = launch.waiting[lanes] == number
            wanted = count or int((launch.pc[lanes] != DONE).sum())
            if int(here.sum()) < wanted:
                freed = False
                continue
            numbers = np.arange(cta * self.threads, (cta + 1) * self.threads)[here]
            launch.clocks.meet(np.unique(launch.warp[numbers]))
            launch.waiting[numbers] = -1
            launch.touched[numbers] = False
        return following if freed and launch.coin.random() < 0.85 else STOP

    def warp_barrier(self, following: int) -> int:
        """bar.warp.sync of all lanes; those that went other ways may come later."""
        launch = self.launch
        if self._whole:
            launch.clocks.step(self.warps)
            launch.touched[self.numbers] = False
            return following
        launch.pc[self.numbers] = following
        launch.waiting[self.numbers] = _WARP_SYNC
        for first in np.unique(self.numbers // 32) * 32:
            lanes = slice(first, first + 32)
            if ((launch.waiting[lanes] == _WARP_SYNC) | (launch.pc[lanes] == DONE)).all():
                launch.clocks.step(launch.warp[first : first + 1])
                launch.waiting[lanes] = -1
                launch.touched[lanes] = False
        return STOP

    def shuffle(self, mode: str, x: Array, by: Array) -> Array:
        """shfl.sync."""
        self.whole()
        lane, table, by = np.arange(32), x.reshape(-1, 32), by.astype(np.int64).reshape(-1, 32)
        source = {"bfly": lane ^ by, "idx": by & 31, "up": lane - by, "down": lane + by}[mode]
        source = np.where((source < 0) | (source > 31), lane, source)
        return np.take_along_axis(table, source, 1).ravel()

    def vote(self, mode: str, x: Array) -> Array:
        """vote.sync over whole warps."""
        self.whole()
        table = x.reshape(-1, 32)
        if mode == "ballot":
            return np.repeat((table.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32), 32)
        return np.repeat(table.any(1) if mode == "any" else table.all(1), 32)

    def reduce(self, mode: str, x: Array) -> Array:
        """redux.sync over whole warps."""
        self.whole()
        fold = {"max": np.maximum, "min": np.minimum, "add": np.add, "or": np.bitwise_or, "and": np.bitwise_and}[mode]
        return np.repeat(fold.reduce(x.reshape(-1, 32), 1, dtype=x.dtype), 32)

    # ------------------------------------------------------------------ memory

    def address(self, space: str, address: Array) -> Array:
        """Of this process."""
        return address + self._shared if space == "shared" else address

    def load(self, space: str, address: Array, width: int, count: int, mask: Array | None, at: int) -> list[Array]:
        """Weak loads of ``count`` numbers."""
        where = self.address(space, address)
        memory, lanes = self.launch.memory, self.numbers
        if mask is None or mask.all():
            self.launch.touched[lanes] = True
            data = memory.load(self.warp, self.lane_numbers, where, width, count, at)
        else:
            data = np.zeros((self.count, count), f"u{width}")
            if mask.any():
                self.launch.touched[lanes[mask]] = True
                data[mask] = memory.load(self.warp[mask], self.lane_numbers[mask], where[mask], width, count, at)
        return [np.ascontiguousarray(data[:, i]) for i in range(count)]

    def store(
        self, space: str, address: Array, width: int, data: tuple[Array, ...], mask: Array | None, at: int
    ) -> None:
        """Weak stores."""
        where = self.address(space, address)
        table = np.stack([np.broadcast_to(x, self.count) for x in data], 1).astype(f"u{width}", copy=False)
        keep = np.ones(self.count, bool) if mask is None else mask
        if keep.any():
            self.launch.touched[self.numbers[keep]] = True
            self.launch.memory.store(self.warp[keep], self.lane_numbers[keep], where[keep], table[keep], at)

    def copy_async(
        self, target: Array, source: Array, nbytes: int, kept: Array | None, mask: Array | None, at: int
    ) -> None:
        """cp.async: the source is read now, and may be until it lands; it lands when it is waited for."""
        launch, memory = self.launch, self.launch.memory
        keep = np.nonzero(np.ones(self.count, bool) if mask is None else mask)[0]
        if not len(keep):
            return
        warp, lane, lanes = self.warp[keep], self.lane_numbers[keep], self.numbers[keep]
        where = self.address("shared", target)[keep]
        data = np.zeros((len(keep), nbytes // 4), np.uint32)
        read = np.ones(len(keep), bool) if kept is None else kept[keep] > 0
        pieces = np.zeros((0, max(1, nbytes // memory.granule)), np.int64)
        if kept is not None and (read & (kept[keep] != nbytes)).any():
            raise PtxError(f"{launch.name}: a copy of a part of {nbytes} bytes")
        launch.touched[lanes] = True
        if read.any():
            data[read] = memory.load(warp[read], lane[read], source[keep][read], 4, nbytes // 4, at)
            pieces = memory.locate(source[keep][read], nbytes, at)
            memory.note_read(pieces, warp[read], lane[read], IN_FLIGHT, at)
        memory.begin_copy(warp, lane, where, nbytes, at)
        launch.copies.append(Copy(lanes, launch.copy_group[lanes], where, data, read, pieces, at))

    def commit_copies(self) -> None:
        """cp.async.commit_group."""
        self.launch.copy_group[self.lanes] += 1

    def wait_copies(self, most: int) -> None:
        """cp.async.wait_group: all but the ``most`` youngest groups land."""
        launch, memory = self.launch, self.launch.memory
        open_from = launch.copy_group - most
        mine = np.zeros(len(launch.pc), bool)
        mine[self.lanes] = True
        left = []
        for copy in launch.copies:
            landing = mine[copy.lanes] & (copy.group < open_from[copy.lanes])
            if landing.any():
                done = copy.part(landing)
                warp, lane = launch.warp[done.lanes], launch.lane[done.lanes]
                memory.end_copy(warp, lane, done.target, done.data, done.at)
                reader = warp[done.read]
                memory.note_read(done.pieces, reader, lane[done.read], launch.clocks.now(reader), done.at)
            if not landing.all():
                left.append(copy.part(~landing))
        launch.copies = left

    def load_matrix(self, address: Array, count: int, transposed: bool, at: int) -> list[Array]:
        """ldmatrix."""
        self.whole()
        rows = self.lane_numbers < 8 * count
        self.launch.touched[self.numbers[rows]] = True
        where = self.address("shared", address)[rows]
        data = self.launch.memory.load(self.warp[rows], self.lane_numbers[rows], where, 4, 4, at)
        return tiles.from_rows(np.ascontiguousarray(data).view(np.uint16).reshape(-1, count, 8, 8), transposed)

    def store_matrix(self, address: Array, data: tuple[Array, ...], transposed: bool, at: int) -> None:
        """stmatrix."""
        self.whole()
        rows = self.lane_numbers < 8 * len(data)
        self.launch.touched[self.numbers[rows]] = True
        values = np.ascontiguousarray(tiles.to_rows(data, transposed).reshape(-1, 8)).view(np.uint32)
        where = self.address("shared", address)[rows]
        self.launch.memory.store(self.warp[rows], self.lane_numbers[rows], where, values, at)

    def product(self, shape: str, kind: str, a: Any, b: Any, c: Any) -> tuple[Array, ...]:
        """mma.sync."""
        self.whole()
        return tiles.multiply(shape, kind, a, b, c)
