"""All ranks of a schedule on one device: the same text, tables, heaps, puts and waits, without several GPUs.

What it shows is that kernels do what their schedule says on real hardware. It says nothing about links between devices:
everything is one device's memory, and nobody is late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sfcompile.codegen.engines.launch import AttendKernel, HeapView, gave_up
from sfcompile.codegen.engines.target import INTERPRETED_PROGRAMS, KernelTarget
from sfcompile.codegen.engines.transfers import ReleaseKernel
from sfcompile.codegen.kernels.attend import attend_source
from sfcompile.codegen.kernels.spec import VIRTUAL_ROW, attend_arguments
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.toolchain.loader import resident_programs
from sfcompile.errors import CodegenError
from sfcompile.runtime.program.intervals import Runs, count
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.wires.symmetric_heap import STATUS, HeapSize, Watched
from sfcompile.runtime.wires.transport import TAG_BITS, word_of

_ALIGN = 256


class VirtualAttend:
    """The attend phase of every rank of a mesh as one kernel.

    The first programs of the grid are all ranks' copy programs, hop by hop, so nothing waits for a later program; what
    was put before the launch is there.

    Args:
        kernels: every rank's, by rank of the mesh. Their tables and workspaces are used, not their own kernels.
        places: every rank's (PLACE).
    """

    def __init__(self, kernels: Sequence[AttendKernel], places: torch.Tensor) -> None:
        first = kernels[0]
        self.kernels, self._places = kernels, places
        self.spec = first.spec.with_(
            virtual=len(kernels),
            carry=any(kernel.spec.carry for kernel in kernels),
            copy_programs=max(len(kernel.tables.forwards) for kernel in kernels) or 1,
        )
        self.source = attend_source(self.spec)
        self.kernel = first.target.load(self.source, "attend", self.spec.reach)
        self._workers = INTERPRETED_PROGRAMS if first.target.interpreted else 0

    @property
    def copiers(self) -> int:
        """Programs of each rank that pass chunks on."""
        return self.spec.copy_programs if self.spec.forwards else 0

    def run(
        self,
        outs: Sequence[torch.Tensor],
        heap: HeapView,
        mask: torch.Tensor | None = None,
        lses: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Attend and push on every rank.

        Args:
            outs: every rank's output [B, H, Lq, E] of equal strides.
            heap: the same for all ranks, whose segments it can all address.
            mask: as given to the site.
            lses: every rank's as for AttendKernel.run (spec.lse).

        Raises:
            CodegenError: strides differ, or not one attending program per rank fits on the device.
        """
        first = self.kernels[0]
        if len({out.stride() for out in outs if out.numel()}) > 1:
            raise CodegenError(
                f"outputs of virtual ranks have strides {sorted({out.stride() for out in outs})}",
                "one launch has one set of strides",
                "cut them from tensors of one shape",
            )
        named = first.named_values(outs[0], heap, mask, None if lses is None else lses[0])
        strided = next((out for out in outs if out.numel()), outs[0])
        named |= dict(zip(("out_sb", "out_sh", "out_sr"), strided.stride()[:3], strict=True))
        rows = [
            self._row(kernel, self._places[rank], out, None if lses is None else lses[rank])
            for rank, (kernel, out) in enumerate(zip(self.kernels, outs, strict=True))
        ]
        named["virtual_ptr"] = torch.tensor(rows, dtype=torch.int64, device=first.target.device)
        values = [named[name] for name in attend_arguments(self.spec)]
        workers = self._workers or self._fitting(values)
        self.kernel[(len(self.kernels) * (workers + self.copiers),)](*values, **first.options)

    def _fitting(self, values: Sequence[Any]) -> int:
        """Attending programs per rank: as on real ranks, all of them are on the device together."""
        first = self.kernels[0]
        resident = resident_programs(self.kernel, values, first.options, first.target.device)
        self._workers = resident // len(self.kernels) - self.copiers
        if self._workers < 1:
            raise CodegenError(
                f"{resident} programs fit on the device, and {len(self.kernels)} virtual ranks have {self.copiers} "
                "copy programs each",
                "every rank needs a program that attends beside them",
                "use fewer virtual ranks",
            )
        return self._workers

    def _row(self, kernel: AttendKernel, place: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> list[int]:
        numbers: dict[str, Any] = {**kernel.fixed, **kernel.scalars, "place": place, "out": out}
        numbers["lse"] = 0 if lse is None else lse
        values = [numbers[name] for name in VIRTUAL_ROW]
        return [value.data_ptr() if isinstance(value, torch.Tensor) else int(value) for value in values]


class VirtualRanks:
    """Every rank of a schedule with its heap, on one device: put, attend, collect and release, epoch after epoch.

    A mesh of one rank runs its kernel as it is.

    Args:
        machine_of: machine of each rank of the mesh: between machines NVSHMEM carries what is sent.
        mask: kind and whether it is boolean.
        allocate: makes zeroed memory of some bytes, uint8; for NVSHMEM it is symmetric memory of PE 0.
        limit_s: how long a wait may last.
        changes: entries of the kernel's spec.
    """

    def __init__(
        self,
        schedule: Schedule,
        target: KernelTarget,
        machine_of: tuple[int, ...] | None = None,
        mask: tuple[str, bool] = ("none", True),
        allocate: Callable[[int], torch.Tensor] | None = None,
        limit_s: float = 600.0,
        **changes: Any,
    ) -> None:
        assert isinstance(schedule.site, AttentionSite)
        self.site, self.device = schedule.site, target.device
        ranks = range(schedule.mesh.num_ranks)
        if len(ranks) > 1:  # the kernel with a warp that fetches is written for one rank a launch
            changes.setdefault("fetch", "threads")
        self.kernels = [AttendKernel(schedule, rank, target, machine_of, mask, **changes) for rank in ranks]
        self._release = [ReleaseKernel(rank, len(ranks), target, machine_of) for rank in ranks]
        size = HeapSize(max(len(schedule.slots), 1), self.kernels[0].tables.bank_bytes, len(ranks))
        pitch = -(-size.segment_bytes // _ALIGN) * _ALIGN
        total = pitch * len(ranks)
        self.memory = allocate(total) if allocate else torch.zeros(total, dtype=torch.uint8, device=self.device)
        at = [self.memory.data_ptr() + pitch * rank for rank in ranks]
        self.status, self._limit_s = torch.zeros(len(STATUS) + 1, dtype=torch.int64, device=self.device), limit_s
        address = self.status.data_ptr()
        watched = Watched(address, address + 8 * len(STATUS), round(limit_s * 1e9))
        rows = [size.place(0, word_of(0, 0), watched, rank) for rank in ranks]
        self.places = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.attend_kernel = VirtualAttend(self.kernels, self.places) if len(ranks) > 1 else None
        self.everyone = self._view(0, [(address, 0, address) for address in at], range(0))
        machines = machine_of or (0,) * len(ranks)
        self.heaps = [
            self._view(
                rank,
                [(at[other] if machines[other] == machines[rank] else 0, 0, at[other]) for other in ranks],
                [other for other in ranks if other != rank],
            )
            for rank in ranks
        ]
        """Each rank's view: what is on another machine is out of reach of loads and stores."""
        self._rows = {
            name: [_rows(owned, self.device) for owned in places]
            for name, places in (("q", self.site.q_positions), ("k", self.site.kv_positions))
        }

    def _view(self, rank: int, rows: Sequence[tuple[int, int, int]], receivers: Sequence[int]) -> HeapView:
        table = torch.tensor(rows, dtype=torch.int64, device=self.device)
        return HeapView(table, self.places[rank], torch.tensor(list(receivers), dtype=torch.int64, device=self.device))

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """One epoch: the whole attention [B, H, Lq, E] of whole tensors [B, H, L, W], over all ranks."""
        self.put(q, k, v)
        outs = self.outputs()
        self.attend(outs, mask)
        return self.finish(outs)

    def put(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Begin an epoch: every rank sends its parts of whole tensors."""
        epoch = self.places[:, :1].add_(1)
        self.places[:, 1:2].copy_(epoch << TAG_BITS | epoch & 1)  # transport.word_of, with tag 0, on the device
        for rank, kernel in enumerate(self.kernels):
            for name, whole in (("q", q), ("k", k), ("v", v)):
                mine = whole[:, :, self._rows["q" if name == "q" else "k"][rank]]
                kernel.put(name, mine, self.heaps[rank])

    def check(self) -> None:
        """Raise what kernels noted; synchronises with the device.

        Raises:
            RuntimeTimeoutError: a wait gave up.
        """
        status = dict(zip(STATUS, self.status.tolist(), strict=False))
        if status["gave_up"]:
            schedule, rank = self.kernels[0].schedule, status["site"]
            raise gave_up(schedule, rank, status["slot"], status["wanted"], status["seen"], self._limit_s)

    def outputs(self) -> list[torch.Tensor]:
        """Zeroed outputs of every rank, of equal strides."""
        site = self.site
        counts = [count(owned) for owned in site.q_positions]
        shape = (site.batch, site.heads, max(counts), site.v_head_dim)
        return [torch.zeros(shape, dtype=site.dtype, device=self.device)[:, :, :rows] for rows in counts]

    def attend(self, outs: Sequence[torch.Tensor], mask: torch.Tensor | None = None) -> None:
        """Attend and push on every rank, in one launch."""
        if self.attend_kernel is None:
            self.kernels[0].run(outs[0], self.everyone, mask)
        else:
            self.attend_kernel.run(outs, self.everyone, mask)

    def finish(self, outs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Bring outputs home, end the epoch on every rank; the whole output."""
        for kernel, out, heap in zip(self.kernels, outs, self.heaps, strict=True):
            kernel.collect(out, heap)
        for release, heap in zip(self._release, self.heaps, strict=True):
            release.run(heap.heaps, heap.place)
        rows = sum(count(owned) for owned in self.site.q_positions)
        whole = torch.zeros(*outs[0].shape[:2], rows, outs[0].shape[3], dtype=outs[0].dtype, device=self.device)
        for out, mine in zip(outs, self._rows["q"], strict=True):
            whole[:, :, mine] = out
        return whole


def _rows(owned: Runs, device: torch.device) -> torch.Tensor:
    runs = [torch.arange(first, first + length, device=device) for first, length in owned]
    return torch.cat(runs) if runs else torch.zeros(0, dtype=torch.int64, device=device)
