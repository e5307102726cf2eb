"""Puts and signals on a CUDA stream by NVSHMEM's host calls: for attention='aten' on GPUs.

Everything is enqueued on the current stream; the host never waits. The orders that runtime/wires/transport.py asks for
hold on the stream:

* put: the chunk is packed into this rank's staging area; ``putmem_signal`` sends it and raises the signal after it.
  The staging area of a bank is used anew two epochs later, after credit from every receiver: a receiver that has read
  a chunk has received it, so its bytes have left the staging area.
* wait: ``signal_wait_until`` on the stream; kernels launched later see the chunk.
* finish: a signal to every rank, after the kernels that read the epoch. A put waits for the receiver's on the stream.

Epochs are numbers that the host bakes into the calls, so a captured graph of them cannot be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.gpu.nvshmem import CMP_GE, SIGNAL_SET, Nvshmem, NvshmemHeap
from sfcompile.runtime.gpu.streams import is_capturing
from sfcompile.runtime.program.instructions import Arrival
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, bank_of
from sfcompile.runtime.wires.transport import TAG_BITS, Source, word_of


class NvshmemTransport:
    """One rank's puts and waits on the current stream.

    Args:
        heap: its banks hold a second copy of every slot, where chunks are packed before they leave.
        staging_at: bytes from a bank's start to that copy.
        status: on the device; its first word notes that a chunk of another call has come.
    """

    def __init__(self, nvshmem: Nvshmem, heap: NvshmemHeap, staging_at: int, status: torch.Tensor) -> None:
        self._nvshmem, self._heap, self._staging_at, self._status = nvshmem, heap, staging_at, status[:1]
        self._tags = [0] * NUM_BANKS

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        """Only the tag is kept: senders store when they like.

        Raises:
            UnsupportedError: a CUDA graph is being captured.
        """
        if is_capturing(self._nvshmem.device):
            raise UnsupportedError(
                "a CUDA graph is captured while attention='aten' runs on several GPU ranks",
                "its epochs are fixed when calls are enqueued, so a replay would wait for the past",
                "use attention='triton', or a mode of torch.compile without CUDA graphs",
                rank=self._nvshmem.rank,
            )

        self._tags[bank_of(epoch)] = tag

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        """Pack, send, signal; see the head of the file."""
        b, size, base = self._nvshmem.bindings, self._heap.size, self._heap.address
        bank = bank_of(epoch)
        self._await(size.credit_at(dst), max(epoch - NUM_BANKS, 0))
        # Chunks of one slot go to one receiver per epoch: the slot's place in the staging area is this put's own.
        packed = self._heap.chunk(bank, self._staging_at + offset, chunk.shape, chunk.dtype)
        packed.copy_(chunk)
        b.putmem_signal_nbi_on_stream(
            base + size.bank_at(bank) + offset, packed.data_ptr(), packed.nbytes,
            base + size.signal_at(bank, slot), word_of(epoch, self._tags[bank]), SIGNAL_SET, dst, self._stream(),
        )  # fmt: skip

    def wait(self, src: int, slot: int, epoch: int) -> None:
        """The stream waits for the chunk and notes if it is of another call (before credit its word stays)."""
        bank = bank_of(epoch)
        self._await(self._heap.size.signal_at(bank, slot), epoch << TAG_BITS)
        seen = self._heap.words(self._heap.size.signal_at(bank, slot), 1)
        self._status.copy_(torch.where(seen == word_of(epoch, self._tags[bank]), self._status, seen))

    def finish(self, epoch: int) -> None:
        """Credit to every rank."""
        at = self._heap.address + self._heap.size.credit_at(self._nvshmem.rank)
        for rank in range(self._nvshmem.num_ranks):
            self._nvshmem.bindings.signal_op_on_stream(at, epoch, SIGNAL_SET, rank, self._stream())

    def notice(self) -> str | None:
        """Nothing is known on this host."""
        return None

    def abort(self, text: str) -> None:
        """Kernels in flight cannot be told; the job's store tells the hosts (runtime/rank/process_group.py)."""

    def close(self) -> None:
        """The heap is closed by its owner."""

    def _await(self, word_at: int, value: int) -> None:
        self._nvshmem.bindings.signal_wait_until_on_stream(self._heap.address + word_at, CMP_GE, value, self._stream())

    def _stream(self) -> int:
        device = self._nvshmem.device
        return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
