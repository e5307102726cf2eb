"""A rank's generated kernels for exchanges, for credits, and for words that a stream waits for or tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sfcompile.codegen.engines.launch import HeapView, arrived_slots
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.kernels.chunk_tables import PackedChunk, make_chunk_tables
from sfcompile.codegen.kernels.chunks import (
    ChunkSpec,
    chunk_arguments,
    receive_source,
    release_source,
    send_source,
    tell_source,
    wait_source,
)
from sfcompile.codegen.kernels.reach import reach_of
from sfcompile.codegen.schedule.exchange import ExchangeSchedule
from sfcompile.runtime.program.chunks import cut_chunk, place_chunk
from sfcompile.runtime.program.sites import nbytes


class TransferKernels:
    """One rank's side of an exchange: chunks are packed and placed by torch, bytes moved by kernels.

    Args:
        rank: of the mesh.
        machine_of: machine of each rank of the mesh; None: all on one.
    """

    def __init__(
        self,
        schedule: ExchangeSchedule,
        rank: int,
        target: KernelTarget,
        machine_of: Sequence[int] | None = None,
    ) -> None:
        self.schedule, self.rank, self.site, self._target = schedule, rank, schedule.site, target
        machines = machine_of or (0,) * schedule.mesh.num_ranks
        self.spec = ChunkSpec(reach_of(machines))
        self.tables = make_chunk_tables(schedule, rank, machines)
        self._send = target.load(send_source(self.spec), "send", self.spec.reach)
        self._receive = target.load(receive_source(self.spec), "receive", self.spec.reach)
        device = target.device
        self._fixed = {
            "sends_ptr": torch.from_numpy(self.tables.sends).to(device),
            "receives_ptr": torch.from_numpy(self.tables.receives).to(device),
            "slots_ptr": arrived_slots(schedule, rank, device),
            "counters_ptr": torch.zeros(max(len(schedule.slots), 1), dtype=torch.int32, device=device),
        }

    @property
    def bank_bytes(self) -> int:
        """Bytes that the exchange needs of a bank: its slots, and room for what leaves by NVSHMEM."""
        return self.tables.bank_bytes

    def put(self, shard: torch.Tensor, heap: HeapView) -> torch.Tensor:
        """Send every other rank what it wants of this rank's shard.

        Returns:
            What this rank wants of it, for :meth:`receive`: it is the call's, for other calls may be open beside it.
        """
        own = cut_chunk(self.site, shard, self.rank, self.rank).clone(memory_format=torch.contiguous_format)
        buffer = torch.empty(max(self.tables.out_bytes, 16), dtype=torch.uint8, device=shard.device)
        for chunk in self.tables.outgoing:
            _view(buffer, chunk, shard.dtype).copy_(cut_chunk(self.site, shard, self.rank, chunk.rank))
        self._launch("send", self._send, buffer, heap)
        return own

    def receive(self, out: torch.Tensor, own: torch.Tensor, heap: HeapView) -> None:
        """Fill ``out`` with what this rank wants, from every rank's shard, at its positions.

        Args:
            own: what :meth:`put` of the same call returned.
        """
        buffer = torch.empty(max(self.tables.in_bytes, 16), dtype=torch.uint8, device=out.device)
        self._launch("receive", self._receive, buffer, heap)
        place_chunk(self.site, out, own, self.rank, self.rank)
        for chunk in self.tables.incoming:
            place_chunk(self.site, out, _view(buffer, chunk, out.dtype), chunk.rank, self.rank)

    def _launch(self, name: str, kernel: Any, buffer: torch.Tensor, heap: HeapView) -> None:
        values: Mapping[str, Any] = {
            **self._fixed,
            "x_ptr": buffer,
            "heaps_ptr": heap.heaps,
            "place_ptr": heap.place,
            "receivers_ptr": heap.receivers,
            "rank": self.rank,
            "num_receivers": len(heap.receivers),
            "num_puts": len(self.tables.sends),
            "num_collects": len(self.tables.receives),
            "num_slots": len(self._fixed["slots_ptr"]),
        }
        names = chunk_arguments(name)
        self._target.move(kernel, [values[argument] for argument in names], self.spec.reach)


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
        target: KernelTarget,
        machine_of: Sequence[int] | None = None,
    ) -> None:
        self._rank, self._num_ranks, self._target = rank, num_ranks, target
        self._spec = ChunkSpec(reach_of(machine_of or (0,) * num_ranks))
        self._kernel = target.load(release_source(self._spec), "release", self._spec.reach)

    def run(self, heaps: torch.Tensor, place: torch.Tensor) -> None:
        """Give credit for the epoch in ``place``; ``heaps`` is [ranks, 3] (HEAP, codegen/kernels/text.py)."""
        values = {"heaps_ptr": heaps, "place_ptr": place, "rank": self._rank, "num_ranks": self._num_ranks}
        names = chunk_arguments("release")
        self._target.move(self._kernel, [values[argument] for argument in names], self._spec.reach)


class WaitKernel:
    """A wait of the stream that ends as waits inside kernels do: by its limit, or when the host says so.

    Args:
        rank: of the job.
    """

    def __init__(self, rank: int, target: KernelTarget) -> None:
        self._rank, self._target = rank, target
        self._kernel = target.load(wait_source(), "wait", "peer")

    def run(self, heaps: torch.Tensor, place: torch.Tensor, word_at: int, epoch: int, tag_bits: int, slot: int) -> None:
        """What is launched next follows the word ``word_at`` bytes into this rank's segment, or a status that says that
        the wait gave up.

        Args:
            heaps: [ranks of the job, 3], see HEAP in codegen/kernels/text.py.
            tag_bits: bits of the word below the epoch.
            slot: what a report calls the word; below 0: -1 - rank, for a credit.
        """
        values = [heaps, place, self._rank, word_at, epoch, tag_bits, slot]
        self._kernel[(1,)](*values, **self._target.options("peer"))


class TellKernel:
    """Publishes a word in another rank's segment, on a stream (runtime/gpu/words.py).

    Args:
        rank: of the job.
    """

    def __init__(self, rank: int, target: KernelTarget) -> None:
        self._rank, self._target = rank, target
        self._kernel = target.load(tell_source(), "tell", "peer")

    def run(
        self, heaps: torch.Tensor, place: torch.Tensor, dst: int, word_at: int, epoch: int, tag_bits: int, tag: int
    ) -> None:
        """The word ``word_at`` bytes into the segment of ``dst``: an epoch and, in the bits below it, a tag."""
        values = [heaps, place, self._rank, dst, word_at, epoch, tag_bits, tag]
        self._kernel[(1,)](*values, **self._target.options("peer"))


def _view(buffer: torch.Tensor, chunk: PackedChunk, dtype: torch.dtype) -> torch.Tensor:
    return buffer[chunk.at : chunk.at + nbytes(chunk.shape, dtype)].view(dtype).view(chunk.shape)
