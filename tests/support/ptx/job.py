"""A whole job in one world: sessions of rank threads on GPUs of the machine, over an emulated NVSHMEM.

A rank's launches return when their kernel has ended, for torch's own kernels on CPU tensors do not wait for it; between
ranks everything is as it comes. While every rank waits for a kernel the world's clock goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from emulated_nvshmem import Library
from threads import run_threads

from ptx.driver import MachineDriver, MachineTarget
from ptx.network import Network
from ptx.world import Stream, World
from sfcompile.codegen.engines.transfers import ReleaseKernel, WaitKernel
from sfcompile.runtime.gpu.device_side import NvshmemSide
from sfcompile.runtime.gpu.nvshmem import Nvshmem
from sfcompile.runtime.rank.session import Session, current_session
from sfcompile.runtime.wires.symmetric_heap import STATUS

T = TypeVar("T")
_SLICE = 2000


class _Memory(Library):
    """NVSHMEM for a rank thread: symmetric memory is each thread's own, at its one address."""

    def __init__(self, job: MachineJob, rank: int, meet: Callable[[], object], reaches: Callable[[int], bool]) -> None:
        super().__init__(rank, meet, reaches)
        self._job = job

    def tensor(self, shape: tuple[int], dtype: torch.dtype) -> torch.Tensor:
        """Collective."""
        (nbytes,) = shape
        self._allocations += 1
        own = torch.randint(0, 256, (-(-nbytes // 16) * 16,), dtype=torch.uint8)[:nbytes]
        copies = self._job.copies.setdefault(self._allocations, {})
        copies[self.rank] = own
        self._meet()
        self._mapped[own.data_ptr()] = [copies[pe] for pe in range(self.num_ranks)]
        with self._job.driver.lock:
            self._job.driver.register(own)
            self._job.network.segments(self.rank, [copies[pe].data_ptr() for pe in range(self.num_ranks)], nbytes)
        return own.view(dtype)


class MachineJob:
    """Ranks of a job as threads.

    Args:
        machine_of: machine of each rank.
    """

    def __init__(self, machine_of: Sequence[int], arch: int = 80, seed: int = 0) -> None:
        self.machine_of = tuple(machine_of)
        self.world = World(seed)
        self.driver = MachineDriver(self.world, arch)
        self.driver.after = self._finish
        self.network = Network(self.world)
        self.copies: dict[int, dict[int, torch.Tensor]] = {}
        self._streams = [self.world.stream(rank) for rank in range(len(self.machine_of))]
        self._working = set(range(len(self.machine_of)))

    def run(self, work: Callable[[Session, MachineTarget, NvshmemSide], T]) -> list[T]:
        """``work(session, target, side)`` on every rank's thread; results by rank."""

        def body(rank: int) -> T:
            session = current_session()
            library = _Memory(
                self,
                rank,
                lambda: session.exchange(None, "meet"),
                lambda pe: self.machine_of[pe] == self.machine_of[rank],
            )
            nvshmem = Nvshmem(rank, len(self.machine_of), torch.device("cpu"), session.exchange, (library, library))
            target = MachineTarget(torch.device("cpu"), programs=2, driver=self.driver)

            def make_kernels(domains: Sequence[int]) -> Any:
                return ReleaseKernel(rank, len(self.machine_of), target, domains), WaitKernel(rank, target)

            side = NvshmemSide(
                nvshmem, session.topology, session.exchange, make_kernels, 60.0, session.trouble, lambda failed: None
            )
            with self.driver.lock:
                watched = side._status.watched
                self.world.memory.add(watched.status, 8 * len(STATUS), "a status", side)
                self.world.memory.add(watched.abort, 8, "an abort word", side)
            session.use_side(side)
            try:
                with self.driver.on(self._streams[rank]):
                    return work(session, target, side)
            finally:
                with self.driver.lock:
                    self._working.discard(rank)

        with self.driver.active():
            return run_threads(len(self.machine_of), body, self.machine_of, timeout_s=120.0)

    def _finish(self, stream: Stream) -> None:
        """Run the world, in turns with other ranks, until a stream has done everything."""
        lock = self.driver.lock
        with lock:
            while not stream.idle:
                self._run_slice(stream, self.world.steps + _SLICE)
                if not stream.idle:
                    lock.wait(0.002)

    def _run_slice(self, stream: Stream, most: int) -> None:
        """Up to a count of steps; while some rank may still launch something, nobody is called stuck."""
        self.world.run(
            lambda: stream.idle or self.world.steps > most,
            lambda: any(self._streams[rank].idle for rank in self._working),
        )
