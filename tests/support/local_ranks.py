"""GPU ranks of one process: heaps in its memory, kernels in Triton's interpreter, one rank after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sfcompile.codegen.engines.device_engine import KernelEngine
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.engines.transfers import ReleaseKernel
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.runtime.gpu.device_run import DeviceRuns
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.wires.symmetric_heap import HeapSize, Segment, local_segment

CPU = torch.device("cpu")


@dataclass
class LocalHeap:
    """One rank's heap; all of them are in reach."""

    size: HeapSize
    table: torch.Tensor
    domains: Sequence[int]
    segment: Segment

    def chunk(self, bank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self.segment.chunk(bank, offset, shape, dtype)

    def credit(self, rank: int) -> int:
        """The last epoch that a rank has read, as it told this one."""
        return int(self.segment._bytes.view(torch.int64)[self.size.credit_at(rank) // 8])

    def close(self) -> None:
        """Nothing to give back."""


class LocalRanks:
    """Every rank of some schedules: engines by rank and site, and the runs of their calls."""

    def __init__(self, schedules: Sequence[Schedule], ranks: int, limit_s: float = 60.0) -> None:
        target, domains = KernelTarget(CPU), (0,) * ranks
        self.engines = [
            [KernelEngine(schedule, rank, target, domains) for schedule in schedules] for rank in range(ranks)
        ]
        slots = max(len(schedule.slots) for schedule in schedules)
        size = HeapSize(slots, max(engine.bank_bytes for engine in self.engines[0]), ranks)
        segments = [local_segment(size) for _ in range(ranks)]
        table = torch.tensor([(segment.address, 0, segment.address) for segment in segments])
        self.heaps = [LocalHeap(size, table, domains, segment) for segment in segments]
        self.statuses = [DeviceStatus(rank, CPU, limit_s) for rank in range(ranks)]
        self.runs = [
            DeviceRuns(heap, ReleaseKernel(rank, ranks, target), CPU, status)
            for rank, (heap, status) in enumerate(zip(self.heaps, self.statuses, strict=True))
        ]
        for runs, engines in zip(self.runs, self.engines, strict=True):
            for engine in engines:
                runs.prepare(engine)
