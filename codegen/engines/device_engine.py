"""One rank's side of one site on a GPU: the generated kernels of its schedule, for runtime/gpu/device_run.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sfcompile.codegen.engines.launch import AttendKernel, HeapView, gave_up, mask_kind
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.engines.transfers import TransferKernels
from sfcompile.codegen.rows.rows import RowProgram
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.exchange import ExchangeSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.errors import StreamFusionError
from sfcompile.runtime.program.instructions import Forward, Push, Put


class KernelEngine:
    """Puts, attention, collects and exchanges of a site as generated kernels.

    Args:
        job_rank: rank of the job; a schedule that runs in several groups is seen from its group.
        domains: by rank of the job; ranks of equal number reach each other's memory by load and store.
        target: with NVSHMEM's device code, if there are several domains.
        masks: of an attention, the kinds of mask (launch.py's mask_kind) that its calls bring. Kernels, tables and
            workspace for all of them are made here, and nothing in a call.

    Attributes:
        members: ranks of the job that the schedule is of, by rank of its mesh.
    """

    def __init__(
        self,
        schedule: Schedule,
        job_rank: int,
        target: KernelTarget,
        domains: Sequence[int],
        masks: Iterable[tuple[str, bool]] = (("none", True),),
    ) -> None:
        self._schedule, self._target = schedule, target
        self._rank, self.members = schedule.members(job_rank)
        self._domains = tuple(domains[member] for member in self.members)
        self._attention: dict[tuple[str, bool], AttendKernel] = {}
        self._transfer: TransferKernels | None = None
        if isinstance(schedule, AttentionSchedule):
            for kind in dict.fromkeys(masks):
                self._attention[kind] = AttendKernel(schedule, self._rank, target, self._domains, kind)
            self._bank_bytes = self._any.tables.bank_bytes
        else:
            assert isinstance(schedule, ExchangeSchedule)
            self._transfer = TransferKernels(schedule, self._rank, target, self._domains)
            self._bank_bytes = self._transfer.bank_bytes
        receivers = receivers_of(schedule, job_rank, domains)
        self._receivers_table = torch.tensor(receivers, dtype=torch.int64, device=target.device)

    @property
    def bank_bytes(self) -> int:
        """Bytes that the site's kernels need of a bank, the same on every rank: what their tables say."""
        return self._bank_bytes

    def view(self, table: torch.Tensor, place: torch.Tensor) -> HeapView:
        """What a call of the site sees of the heaps of its ranks, whose ``table`` it is given."""
        return HeapView(table, place, self._receivers_table)

    def put(self, name: str, tensor: torch.Tensor, view: HeapView) -> None:
        """Send "q", "k" or "v"."""
        self._any.put(name, tensor, view)

    def start(self, tensor: torch.Tensor, view: HeapView) -> torch.Tensor:
        """The start of an exchange; what its end needs of this rank's own shard."""
        assert self._transfer is not None
        return self._transfer.put(tensor, view)

    def put_fused(self, name: str, rows: RowProgram, sources: Sequence[torch.Tensor], view: HeapView) -> None:
        """Send "q", "k" or "v" as a row program makes it from its sources."""
        self._any.put_fused(name, rows, sources, view)

    def attend(self, mask: torch.Tensor | None, view: HeapView) -> torch.Tensor:
        """Attend and push; the outputs [B, H, Lq, E] of this rank's queries, its own heads filled in."""
        site: Any = self._schedule.site
        rows = sum(length for _, length in site.q_positions[self._rank])
        # Zeros: queries that no key is there for are not computed.
        out = torch.zeros(site.batch, site.heads, rows, site.v_head_dim, dtype=site.dtype, device=self._target.device)
        self._attention[mask_kind(mask)].run(out, view, mask=mask)
        return out

    def collect(self, out: torch.Tensor, view: HeapView) -> None:
        """Fill in the other ranks' heads as they come home."""
        self._any.collect(out, view)

    def receive(self, out: torch.Tensor, own: torch.Tensor, view: HeapView) -> None:
        """The end of an exchange, with what its start returned."""
        assert self._transfer is not None
        self._transfer.receive(out, own, view)

    def gave_up(self, slot: int, wanted: int, seen: int, limit_s: float) -> StreamFusionError:
        """The error for a wait of one of these kernels that gave up; see launch.py."""
        return gave_up(self._schedule, self._rank, slot, wanted, seen, limit_s)

    @property
    def _any(self) -> AttendKernel:
        """Puts and collects are the same whatever the mask."""
        return next(iter(self._attention.values()))


def receivers_of(schedule: Schedule, job_rank: int, domains: Sequence[int]) -> list[int]:
    """The ranks of the job that must have ended a bank's last epoch before kernels of this one write into it.

    Those that it writes to; with several domains, all. What a rank has staged, or passes on, by NVSHMEM is read from
    its memory after its kernels have ended, and after its own credit: only who gets it knows when, and tells all. So a
    bank is free everywhere once every rank has got all that was sent to it in the bank's epoch.
    """
    if len(set(domains)) > 1:
        return [rank for rank in range(len(domains)) if rank != job_rank]
    rank, members = schedule.members(job_rank)
    receivers = set()
    for steps in schedule.program(rank).phases.values():
        for step in steps:
            if isinstance(step, Put | Forward):
                receivers.add(members[step.dst])
            elif isinstance(step, Push):
                receivers.add(members[step.q.src])
    return sorted(receivers)
