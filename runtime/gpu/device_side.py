"""GPU ranks of one job: NVSHMEM started, symmetric heaps made and outgrown, credits launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sfcompile.runtime.gpu.device_run import DeviceRuns, Release
from sfcompile.runtime.gpu.nvshmem import Nvshmem, NvshmemHeap, Share
from sfcompile.runtime.gpu.transport import NvshmemTransport
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.wires.symmetric_heap import HeapSize
from sfcompile.runtime.wires.transport import Transport

MakeRelease = Callable[[Sequence[int]], Release]
"""The credit kernel for ranks of some domains (codegen makes it)."""


class NvshmemSide:
    """A session's GPU.

    Args:
        share: all-gather of Python values between the ranks.

    Attributes:
        domains: by rank of the job, once a heap was made; see NvshmemHeap.
    """

    def __init__(self, nvshmem: Nvshmem, topology: Topology, share: Share, make_release: MakeRelease) -> None:
        self._nvshmem, self._topology, self._share, self._make_release = nvshmem, topology, share, make_release
        self._heap: NvshmemHeap | None = None
        probe = NvshmemHeap(nvshmem, HeapSize(1, 64), topology.machine_of, share)
        self.domains = probe.domains
        probe.close()

    @property
    def device(self) -> torch.device:
        """This rank's GPU."""
        return self._nvshmem.device

    def make_runs(self, size: HeapSize, opened: int) -> tuple[DeviceRuns, Transport]:
        """Collective: a new heap in place of the old one, whose calls have ended on every rank's stream."""
        if self._heap is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._share(None, "leave the old heap")
            self._heap.close()
        self._heap = NvshmemHeap(self._nvshmem, size, self._topology.machine_of, self._share)
        self._credit(opened)
        runs = DeviceRuns(self._heap, self._make_release(self.domains), self.device, opened)
        return runs, NvshmemTransport(self._nvshmem, self._heap, size.bank_bytes // 2)

    def _credit(self, opened: int) -> None:
        """Nothing of older epochs lies in a new heap: every rank starts with credit for them from all."""
        assert self._heap is not None
        words = self._heap.words(self._heap.size.credits_at, self._heap.size.num_credits)
        words.fill_(opened)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._share(None, "start with credit")

    def close(self, failed: bool) -> None:
        """Leave NVSHMEM. After a failure nothing collective is tried: kernels may wait for ranks that are gone."""
        if failed:
            return
        if self._heap is not None:
            self._heap.close()
            self._heap = None
        self._nvshmem.close()
