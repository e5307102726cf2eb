"""GPU ranks of one job: NVSHMEM started, symmetric heaps made and outgrown, credits launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.gpu.device_run import DeviceEngine, DeviceRuns, Release
from sfcompile.runtime.gpu.nvshmem import Nvshmem, NvshmemHeap, Share
from sfcompile.runtime.gpu.tags import TagStatus
from sfcompile.runtime.gpu.transport import NvshmemTransport
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.executor import SchedulePlan, SiteCall
from sfcompile.runtime.rank.sides import RunningSite, aligned, bank_room, run_on_host
from sfcompile.runtime.wires.symmetric_heap import HeapSize
from sfcompile.runtime.wires.transport import notice_of

MakeRelease = Callable[[Sequence[int]], Release]
"""The credit kernel for ranks of some domains (codegen makes it)."""


class NvshmemSide:
    """A session's GPU.

    Sites with an engine run as its kernels (device_run.py). The others, whose attention is ATen's, run in the executor
    over NVSHMEM's host calls (transport.py).

    Args:
        share: all-gather of Python values between the ranks.
        leave: called before NVSHMEM is left, with whether something failed (codegen/toolchain/device_state.py).

    Attributes:
        domains: by rank of the job; see NvshmemHeap.
    """

    def __init__(
        self,
        nvshmem: Nvshmem,
        topology: Topology,
        share: Share,
        make_release: MakeRelease,
        leave: Callable[[bool], object],
    ) -> None:
        self._nvshmem, self._topology, self._share, self._make_release = nvshmem, topology, share, make_release
        self._leave = leave
        self._heap: NvshmemHeap | None = None
        self._runs: DeviceRuns | None = None
        self._transport: NvshmemTransport | None = None
        self._status = TagStatus(nvshmem.rank, nvshmem.device)
        probe = NvshmemHeap(nvshmem, HeapSize(1, 64), topology.machine_of, share)
        self.domains: Sequence[int] = probe.domains
        probe.close()

    @property
    def device(self) -> torch.device:
        """This rank's GPU."""
        return self._nvshmem.device

    @property
    def size(self) -> HeapSize | None:
        """Of the symmetric heap."""
        return None if self._heap is None else self._heap.size

    def room(self, schedules: Sequence[SchedulePlan], engines: Sequence[DeviceEngine | None]) -> HeapSize:
        """Every rank gives credits; puts by NVSHMEM's host calls are packed in the other half of a bank."""
        pairs = zip(schedules, engines, strict=True)
        packed = [2 * aligned(schedule.heap_bytes) for schedule, engine in pairs if engine is None]
        return bank_room(schedules, engines).grown(HeapSize(0, max(packed, default=0), self._nvshmem.num_ranks))

    def make_heap(self, size: HeapSize, epoch: int) -> None:
        """Collective: a new heap in place of the old one, whose calls have ended on every rank's stream."""
        if self._heap is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._share(None, "leave the old heap")
            self._heap.close()
        self._heap = NvshmemHeap(self._nvshmem, size, self._topology.machine_of, self._share)
        self._credit(self._heap, epoch)
        self._runs = DeviceRuns(self._heap, self._make_release(self.domains), self.device, self._status.word, epoch)
        self._transport = NvshmemTransport(self._nvshmem, self._heap, size.bank_bytes // 2, self._status.word)

    def _credit(self, heap: NvshmemHeap, epoch: int) -> None:
        """Nothing of older epochs lies in a new heap: every rank starts with credit for them from all."""
        heap.words(heap.size.credits_at, heap.size.num_credits).fill_(epoch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._share(None, "start with credit")

    def open(self, call: SiteCall, engine: DeviceEngine | None) -> RunningSite:
        """Begin a call, on the current stream."""
        assert self._runs is not None and self._transport is not None
        if engine is not None:
            return self._runs.open(engine, call.epoch)
        return run_on_host(call, self._topology, self._runs.host_bank(call.epoch), self._transport)

    def begin(self, tag: int) -> None:
        """Signals hold it from now on."""
        if self._runs is not None:
            self._runs.begin(tag)

    def end(self) -> None:
        """See :class:`TagStatus`."""
        self._status.end_call()

    def restart(self, epoch: int, life: int) -> None:
        """Refused: kernels cannot be told to stop.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "a call failed before on some rank, and GPU ranks cannot start afresh",
            "kernels that still wait for each other cannot be called back",
            "end the job and start it again",
            rank=self._nvshmem.rank,
        )

    def rewire(self) -> None:
        """Nothing here depends on the world's options."""

    def notice(self) -> str | None:
        """That a chunk of another call came, as soon as the host knows; kernels in flight tell nothing else."""
        error = self._status.error()
        return None if error is None else notice_of(self._nvshmem.rank, error)

    def abort(self, notice: str) -> None:
        """Kernels in flight cannot be told; the job's store tells the hosts (runtime/rank/process_group.py)."""

    def close(self, failed: bool) -> None:
        """Leave NVSHMEM. After a failure nothing collective is tried: kernels may wait for ranks that are gone."""
        self._runs = self._transport = None
        self._leave(failed)
        if failed:
            return
        if self._heap is not None:
            self._heap.close()
            self._heap = None
        self._nvshmem.close()
