"""A rank's generated kernels for exchanges, and for credits, ready to launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfcompile.codegen.engines.launch import MOVE_PROGRAMS, HeapView, gave_up
from sfcompile.codegen.kernels.chunks import (
    RECEIVE,
    SEND,
    ChunkSpec,
    chunk_arguments,
    receive_source,
    release_source,
    send_source,
)
from sfcompile.codegen.kernels.reach import reach_of
from sfcompile.codegen.kernels.text import entry_name
from sfcompile.codegen.schedule.exchange import ExchangeSchedule
from sfcompile.codegen.toolchain.loader import link_options, load_source
from sfcompile.runtime.program.chunks import cut_chunk, place_chunk
from sfcompile.runtime.program.instructions import Put, Wait
from sfcompile.runtime.program.phases import EXCHANGE_FINISH, EXCHANGE_START
from sfcompile.runtime.program.sites import align, nbytes

_ALIGN = 128


class TransferKernels:
    """One rank's side of an exchange: chunks are packed and placed by torch, bytes moved by kernels.

    Args:
        rank: of the mesh.
        device, machine_of, calls, library: as for AttendKernel.
        bounded: debug build: waits give up and report.
    """

    def __init__(
        self,
        schedule: ExchangeSchedule,
        rank: int,
        device: torch.device,
        machine_of: Sequence[int] | None = None,
        calls: Mapping[str, Callable[..., object]] | None = None,
        library: Path | None = None,
        bounded: bool = False,
    ) -> None:
        self.schedule, self.rank, self.site, self._device = schedule, rank, schedule.site, device
        machines = machine_of or (0,) * schedule.mesh.num_ranks
        self.spec = ChunkSpec(reach_of(machines), bounded)
        self._library = library
        self._send = _kernel("send", send_source(self.spec), self.spec, device, calls)
        self._receive = _kernel("receive", receive_source(self.spec), self.spec, device, calls)
        program = schedule.program(rank)
        # As in codegen/kernels/tables.py: what has no bytes is neither sent nor awaited.
        steps, waits = program.phases[EXCHANGE_START], program.phases[EXCHANGE_FINISH]
        self._puts = [step for step in steps if isinstance(step, Put) and 0 not in self._shape(rank, step.dst)]
        self._waits = [step for step in waits if isinstance(step, Wait) and 0 not in self._shape(step.src, rank)]
        self._own: torch.Tensor | None = None
        sends, end = [], align(schedule.heap_bytes, _ALIGN)
        staged: dict[int, int] = {}  # the same on every rank, whatever it sends
        if self.spec.reach != "peer":
            for step in steps:
                assert isinstance(step, Put)
                staged[step.slot] = end
                end += align(schedule.slots[step.slot].nbytes, _ALIGN)
        self._outgoing, at = [], 0
        for step in self._puts:
            shape = self._shape(rank, step.dst)
            size = nbytes(shape, self.site.dtype)
            staging = staged.get(step.slot, 0)
            net = int(machines[step.dst] != machines[rank])
            sends.append([step.dst, step.slot, at, schedule.slots[step.slot].offset, size, net, staging])
            self._outgoing.append((at, shape))
            at += align(size, _ALIGN)
        self._out_bytes, self.bank_bytes = at, end
        receives, self._incoming, at = [], [], 0
        for wait in self._waits:
            shape = self._shape(wait.src, rank)
            receives.append([wait.slot, schedule.slots[wait.slot].offset, at, nbytes(shape, self.site.dtype)])
            self._incoming.append((at, shape))
            at += align(receives[-1][-1], _ALIGN)
        self._in_bytes = at
        self._fixed = {
            "sends_ptr": _table(sends, SEND, device),
            "receives_ptr": _table(receives, RECEIVE, device),
            "counters_ptr": torch.zeros(max(len(schedule.slots), 1), dtype=torch.int32, device=device),
            "report_ptr": torch.zeros(4, dtype=torch.int64, device=device),
        }

    def put(self, shard: torch.Tensor, heap: HeapView) -> None:
        """Send every other rank what it wants of this rank's shard."""
        self._own = cut_chunk(self.site, shard, self.rank, self.rank).clone(memory_format=torch.contiguous_format)
        buffer = torch.empty(max(self._out_bytes, 16), dtype=torch.uint8, device=shard.device)
        for step, (at, shape) in zip(self._puts, self._outgoing, strict=True):
            _view(buffer, at, shape, shard.dtype).copy_(cut_chunk(self.site, shard, self.rank, step.dst))
        self._launch("send", self._send, buffer, heap)

    def receive(self, out: torch.Tensor, heap: HeapView) -> None:
        """Fill ``out`` with what this rank wants, from every rank's shard, at its positions."""
        buffer = torch.empty(max(self._in_bytes, 16), dtype=torch.uint8, device=out.device)
        self._launch("receive", self._receive, buffer, heap)
        assert self._own is not None
        place_chunk(self.site, out, self._own, self.rank, self.rank)
        self._own = None
        for wait, (at, shape) in zip(self._waits, self._incoming, strict=True):
            place_chunk(self.site, out, _view(buffer, at, shape, out.dtype), wait.src, self.rank)

    def check(self) -> None:
        """Raise what a debug build reported; synchronises with the device.

        Raises:
            RuntimeTimeoutError: a wait gave up.
        """
        failed, slot, epoch, seen = self._fixed["report_ptr"].tolist()
        if failed:
            self._fixed["report_ptr"].zero_()
            raise gave_up(self.schedule, self.rank, slot, epoch, seen)

    def _launch(self, name: str, kernel: Any, buffer: torch.Tensor, heap: HeapView) -> None:
        given = {**self._fixed, "x_ptr": buffer, "heaps_ptr": heap.heaps, "place_ptr": heap.place, "rank": self.rank}
        given |= {"receivers_ptr": heap.receivers, "num_receivers": len(heap.receivers)}
        given |= {"num_puts": len(self._puts), "num_collects": len(self._waits)}
        _run(
            kernel, [given[entry] for entry in chunk_arguments(name, self.spec)], self._device, self._library, self.spec
        )

    def _shape(self, src: int, dst: int) -> tuple[int, ...]:
        return self.site.chunk_shape(src, dst)


class ReleaseKernel:
    """Tells all ranks of the job that this one has read an epoch and all before it.

    Args:
        rank: of the job.
        machine_of: machine of each rank of the job.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        device: torch.device,
        machine_of: Sequence[int] | None = None,
        calls: Mapping[str, Callable[..., object]] | None = None,
        library: Path | None = None,
    ) -> None:
        self._rank, self._num_ranks, self._device, self._library = rank, num_ranks, device, library
        self._spec = ChunkSpec(reach_of(machine_of or (0,) * num_ranks))
        self._kernel = _kernel("release", release_source(self._spec), self._spec, device, calls)

    def run(self, heaps: torch.Tensor, place: torch.Tensor) -> None:
        """Give credit for the epoch in ``place``; ``heaps`` is [ranks, 3] (HEAP, codegen/kernels/text.py)."""
        given = {"heaps_ptr": heaps, "place_ptr": place, "rank": self._rank, "num_ranks": self._num_ranks}
        values = [given[entry] for entry in chunk_arguments("release", self._spec)]
        _run(self._kernel, values, self._device, self._library, self._spec)


def _kernel(
    name: str, source: str, spec: ChunkSpec, device: torch.device, calls: Mapping[str, Callable[..., object]] | None
) -> Any:
    return getattr(load_source(source, device.type == "cpu", calls), entry_name(name, spec.reach))


def _run(kernel: Any, values: Sequence[Any], device: torch.device, library: Path | None, spec: ChunkSpec) -> None:
    if device.type == "cpu":
        kernel[(2,)](*values)
    else:
        kernel[(MOVE_PROGRAMS,)](*values, **link_options(library, spec.reach))


def _view(buffer: torch.Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return buffer[at : at + nbytes(shape, dtype)].view(dtype).view(shape)


def _table(rows: list[list[int]], columns: tuple[str, ...], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, len(columns))).to(device)
