"""GPU ranks of one job: NVSHMEM started, symmetric heaps made and outgrown, credits launched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from sfcompile.errors import HeapError, StreamFusionError, UnsupportedError
from sfcompile.runtime.gpu.device_run import DeviceEngine, DeviceRuns, Release
from sfcompile.runtime.gpu.nvshmem import Nvshmem, NvshmemHeap
from sfcompile.runtime.gpu.status import DeviceStatus, Watchdog
from sfcompile.runtime.gpu.streams import is_capturing, synchronize
from sfcompile.runtime.gpu.together import Share, together
from sfcompile.runtime.gpu.transport import NvshmemTransport
from sfcompile.runtime.gpu.words import WordWait
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.sides import RunningSite, aligned, bank_room, run_on_host
from sfcompile.runtime.rank.site_call import SiteCall, SiteSchedule
from sfcompile.runtime.wires.symmetric_heap import HeapSize

_log = logging.getLogger("sfcompile")
MakeKernels = Callable[[Sequence[int]], tuple[Release, WordWait]]
"""The kernels of credits and of the stream's waits, for ranks of some domains (codegen makes them)."""


class NvshmemSide:
    """A session's GPU.

    Sites with an engine run as its kernels (device_run.py). The others, whose attention is ATen's, run in the executor
    over NVSHMEM's host calls (transport.py).

    Args:
        share: all-gather of Python values between the ranks.
        timeout_s: how long a wait may last.
        trouble: what is known of other ranks' failures; asked by a thread.
        leave: called before NVSHMEM is left, with whether something failed (codegen/toolchain/device_state.py).

    Attributes:
        domains: by rank of the job; see NvshmemHeap.
        carried_by, no_kernels, on_gpu: see Side in runtime/rank/sides.py.
    """

    carried_by = ""
    no_kernels = ""
    on_gpu = True

    def __init__(
        self,
        nvshmem: Nvshmem,
        topology: Topology,
        share: Share,
        make_kernels: MakeKernels,
        timeout_s: float,
        trouble: Callable[[], str | None],
        leave: Callable[[bool], object],
    ) -> None:
        self._nvshmem, self._topology, self._share, self._make_kernels = nvshmem, topology, share, make_kernels
        self._leave = leave
        self._heap: NvshmemHeap | None = None
        self._runs: DeviceRuns | None = None
        self._transport: NvshmemTransport | None = None
        self._kept: list[tuple[NvshmemHeap, DeviceRuns]] = []  # outgrown, and read by graphs that were captured
        self._status = DeviceStatus(nvshmem.rank, nvshmem.device, timeout_s)
        probe = NvshmemHeap(nvshmem, HeapSize(1, 64), topology.machine_of, share)
        self.domains: Sequence[int] = probe.domains
        probe.give_back()
        self._watchdog = Watchdog(self._status, trouble)  # last: of a side that does not start no thread is left

    @property
    def device(self) -> torch.device:
        """This rank's GPU."""
        return self._nvshmem.device

    @property
    def size(self) -> HeapSize | None:
        """Of the symmetric heap."""
        return None if self._heap is None else self._heap.size

    def room(self, schedules: Sequence[SiteSchedule], engines: Sequence[DeviceEngine | None]) -> HeapSize:
        """Every rank gives credits; puts by NVSHMEM's host calls are packed in the other half of a bank."""
        pairs = zip(schedules, engines, strict=True)
        packed = [2 * aligned(schedule.heap_bytes) for schedule, engine in pairs if engine is None]
        return bank_room(schedules, engines).grown(HeapSize(0, max(packed, default=0), self._nvshmem.num_ranks))

    def make_heap(self, size: HeapSize, epoch: int) -> None:
        """Collective: a new heap in place of the old one, whose calls have ended on every rank's stream.

        Where some rank has captured calls in a CUDA graph, the old heap stays beside the new one, for all ranks:
        replays count epochs of their own there, and give each other credit for them.

        Raises:
            HeapError, UnsupportedError: no room on this rank or on another; there is a heap of the old size.
        """
        old, captured = None if self._heap is None or self._runs is None else (self._heap, self._runs), False
        if old is not None:
            self._status.settle()
            captured = any(self._share(old[1].captured, "leave the old heap"))
            if not captured:
                self._heap = self._runs = self._transport = None  # nothing may run on memory that is given back
                old[0].give_back()
        try:
            self._take_heap(size, epoch)
        except StreamFusionError as error:
            if old is not None and not captured and error.on_every_rank and not self._nvshmem.broken:
                self._take_heap(old[0].size, epoch)
            raise
        if old is not None and captured:
            self._kept.append(old)

    def _take_heap(self, size: HeapSize, epoch: int) -> None:
        heap = NvshmemHeap(self._nvshmem, size, self._topology.machine_of, self._share)
        self._credit(heap, epoch)
        try:
            release, wait = together(self._share, "make kernels of credits", lambda: self._make_kernels(self.domains))
        except StreamFusionError as error:
            if error.on_every_rank:
                heap.give_back()
            raise
        self._heap, self._runs = heap, DeviceRuns(heap, release, self.device, self._status, epoch)
        self._transport = NvshmemTransport(self._nvshmem, heap, size.bank_bytes // 2, self._status, wait)

    def prepare(self, engines: Sequence[DeviceEngine | None]) -> None:
        """Calls of these sites will find all that they need on the device."""
        assert self._runs is not None
        for engine in engines:
            if engine is not None:
                self._runs.prepare(engine)

    def _credit(self, heap: NvshmemHeap, epoch: int) -> None:
        """Nothing of older epochs lies in a new heap: every rank starts with credit for them from all."""
        heap.words(heap.size.credits_at, heap.size.num_credits).fill_(epoch)
        synchronize(self.device)
        self._share(None, "start with credit")

    def open(self, call: SiteCall, engine: DeviceEngine | None) -> RunningSite:
        """Begin a call, on the current stream."""
        assert self._runs is not None and self._transport is not None
        if engine is not None:
            return self._runs.open(engine, call.epoch)
        return run_on_host(call, self._topology, self._runs.host_bank(call.epoch), self._transport)

    def epochs_opened(self, counted: int) -> int:
        """Replays of captured calls raise the count on the device alone: to read it the host waits for the stream."""
        runs = self._runs
        return counted if runs is None or not runs.captured or is_capturing(self.device) else runs.opened()

    def begin(self, tag: int) -> None:
        """Signals hold it from now on."""
        for _, runs in self._kept:
            runs.begin(tag)
        if self._runs is not None:
            self._runs.begin(tag)

    def end(self) -> None:
        """See :class:`DeviceStatus`."""
        self._status.end_call()

    def settle(self) -> None:
        """Memory that lasts is read by put kernels for which the stream waits before the site ends, or is packed on the
        stream: what is written to that memory after the call comes behind it there."""

    def restart(self, epoch: int, life: int) -> None:
        """Refused: kernels cannot be told to stop.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"a call failed before ({self.notice() or 'on some rank'}), and GPU ranks cannot start afresh",
            "kernels that still wait for each other cannot be called back",
            "end the job and start it again",
            rank=self._nvshmem.rank,
        )

    def rewire(self, timeout_s: float) -> None:
        """Waits last as long as the options now say."""
        self._status.limit_s = timeout_s
        if self._transport is not None:
            self._transport.limit_waits()
        for runs in (*(runs for _, runs in self._kept), *([] if self._runs is None else [self._runs])):
            runs.limit_waits()

    def notice(self) -> str | None:
        """What the host has learnt of waits in vain, of chunks of another call, and of ranks that failed."""
        return self._status.notice()

    def explained(self, error: BaseException) -> StreamFusionError | None:
        """See :class:`DeviceStatus`."""
        return self._status.explained(error)

    def abort(self, notice: str) -> None:
        """This rank's own kernels stop waiting; the job's store tells the other hosts, whose watchdogs look there."""
        self._status.stop(notice)

    def close(self, failed: bool) -> None:
        """Leave NVSHMEM. After a failure, of this rank or one that was heard of, nothing collective is tried: kernels
        may wait for ranks that are gone."""
        self._watchdog.close()
        failed = failed or self.notice() is not None or bool(self._nvshmem.broken)
        self._runs = self._transport = None
        self._leave(failed)
        if failed:
            return
        heaps = [*(heap for heap, _ in self._kept), *([] if self._heap is None else [self._heap])]
        self._kept.clear()
        self._heap = None
        try:
            for heap in heaps:
                heap.close()
        except HeapError as error:  # a rank has gone without a word: it would not come to leave either
            _log.warning("rank %d leaves NVSHMEM alone: %s", self._nvshmem.rank, error.what)
            return
        self._nvshmem.close()
