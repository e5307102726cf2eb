"""One rank's side of one site on a GPU: the generated kernels of its schedule, for runtime/gpu/device_run.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sfcompile.codegen.engines.launch import AttendKernel, HeapView, mask_kind
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.engines.transfers import TransferKernels
from sfcompile.codegen.kernels.tables import make_tables
from sfcompile.codegen.rows.rows import RowProgram
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.exchange import ExchangeSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.runtime.program.instructions import Forward, Push, Put


class KernelEngine:
    """Puts, attention, collects and exchanges of a site as generated kernels.

    Args:
        job_rank: rank of the job; a schedule that runs in several groups is seen from its group.
        domains: by rank of the job; ranks of equal number reach each other's memory by load and store.
        target: with NVSHMEM's device code, if there are several domains.
        bounded: waits give up after a while and :meth:`check` raises (debug builds).
    """

    def __init__(
        self,
        schedule: Schedule,
        job_rank: int,
        target: KernelTarget,
        domains: Sequence[int],
        bounded: bool = False,
    ) -> None:
        self._schedule, self._target, self._bounded = schedule, target, bounded
        self._rank, self._members = schedule.members(job_rank)
        self._domains = tuple(domains[member] for member in self._members)
        self._attention: dict[tuple[str, bool], AttendKernel] = {}
        self._transfer: TransferKernels | None = None
        if isinstance(schedule, AttentionSchedule):
            self._bank_bytes = make_tables(schedule, self._rank, 64, self._domains).bank_bytes
        else:
            assert isinstance(schedule, ExchangeSchedule)
            self._transfer = TransferKernels(schedule, self._rank, target, self._domains, bounded)
            self._bank_bytes = self._transfer.bank_bytes
        receivers = sorted({self._members[dst] for dst in self._receivers()})
        self._whole: torch.Tensor | None = None
        self._cut = torch.empty(0)
        self._receivers_table = torch.tensor(receivers, dtype=torch.int64, device=target.device)

    def _receivers(self) -> set[int]:
        """Every rank of the mesh that this one writes to."""
        receivers = set()
        for steps in self._schedule.program(self._rank).phases.values():
            for step in steps:
                if isinstance(step, Put | Forward):
                    receivers.add(step.dst)
                elif isinstance(step, Push):
                    receivers.add(step.q.src)
        return receivers

    @property
    def bank_bytes(self) -> int:
        """Bytes that the site's kernels need of a bank, the same on every rank: what their tables say."""
        return self._bank_bytes

    def view(self, table: torch.Tensor, place: torch.Tensor) -> HeapView:
        """The heap of the mesh's ranks; ``table`` is the job's."""
        if self._members != tuple(range(len(table))):
            if table is not self._whole:  # a new heap
                self._whole, self._cut = table, table[list(self._members)].contiguous()
            table = self._cut
        return HeapView(table, place, self._receivers_table)

    def put(self, name: str, tensor: torch.Tensor, view: HeapView) -> None:
        """Send "q", "k" or "v"."""
        self._kernel(("none", True)).put(name, tensor, view)

    def start(self, tensor: torch.Tensor, view: HeapView) -> torch.Tensor:
        """The start of an exchange; what its end needs of this rank's own shard."""
        assert self._transfer is not None
        return self._transfer.put(tensor, view)

    def put_fused(self, name: str, rows: RowProgram, sources: Sequence[torch.Tensor], view: HeapView) -> None:
        """Send "q", "k" or "v" as a row program makes it from its sources."""
        self._kernel(("none", True)).put_fused(name, rows, sources, view)

    def attend(self, mask: torch.Tensor | None, view: HeapView) -> torch.Tensor:
        """Attend and push; the outputs [B, H, Lq, E] of this rank's queries, its own heads filled in."""
        site: Any = self._schedule.site
        rows = sum(length for _, length in site.q_positions[self._rank])
        # Zeros: queries that no key is there for are not computed.
        out = torch.zeros(site.batch, site.heads, rows, site.v_head_dim, dtype=site.dtype, device=self._target.device)
        self._kernel(mask_kind(mask)).run(out, view, mask=mask)
        return out

    def collect(self, out: torch.Tensor, view: HeapView) -> None:
        """Fill in the other ranks' heads as they come home."""
        self._kernel(("none", True)).collect(out, view)

    def receive(self, out: torch.Tensor, own: torch.Tensor, view: HeapView) -> None:
        """The end of an exchange, with what its start returned."""
        assert self._transfer is not None
        self._transfer.receive(out, own, view)

    def check(self) -> None:
        """Raise what a debug build's waits reported; synchronises with the device.

        Raises:
            RuntimeTimeoutError: a wait gave up.
        """
        for kernel in self._attention.values():
            kernel.check()
        if self._transfer is not None:
            self._transfer.check()

    def _kernel(self, kind: tuple[str, bool]) -> AttendKernel:
        if kind not in self._attention:
            assert isinstance(self._schedule, AttentionSchedule)
            self._attention[kind] = AttendKernel(
                self._schedule, self._rank, self._target, self._domains, kind, bounded=self._bounded
            )
        return self._attention[kind]
