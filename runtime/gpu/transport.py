"""Puts and signals on a CUDA stream by NVSHMEM's host calls: for attention='aten' on GPUs.

Everything is enqueued on the current stream; the host never waits. The orders that runtime/wires/transport.py asks for
hold on the stream:

* put: the chunk is packed into this rank's staging area; ``putmem_signal`` sends it and raises the signal after it.
  The staging area of a bank is used anew two epochs later, after credit from every rank: one that has ended an epoch
  has received all that was sent to it, so those bytes have left their staging areas.
* wait: a kernel of one program on the stream (words.py), for NVSHMEM's own would never end.
* open: the stream waits for the credit of all ranks for the epoch that had the bank before.
* finish: a signal to every rank, after the kernels that read the epoch.
* Chunks without elements are neither sent nor awaited: their signals might come late, and take back later ones.

Epochs are numbers that the host bakes into the calls, so a captured graph of them cannot be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.gpu.nvshmem import SIGNAL_SET, Nvshmem, NvshmemHeap
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.gpu.streams import is_capturing
from sfcompile.runtime.gpu.words import StreamWords, WordWait
from sfcompile.runtime.program.instructions import Arrival
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, bank_of
from sfcompile.runtime.wires.transport import Source, word_of


class NvshmemTransport:
    """One rank's puts and waits on the current stream.

    Args:
        heap: its banks hold a second copy of every slot, where chunks are packed before they leave.
        staging_at: bytes from a bank's start to that copy.
        status: notes waits that gave up, and chunks of another call.
        waits: makes the stream wait.
    """

    def __init__(
        self, nvshmem: Nvshmem, heap: NvshmemHeap, staging_at: int, status: DeviceStatus, waits: WordWait
    ) -> None:
        self._nvshmem, self._heap, self._staging_at = nvshmem, heap, staging_at
        self._words = StreamWords(nvshmem.rank, heap.size, heap.table, heap.words, status, waits)
        self._tags = [0] * NUM_BANKS
        self._empty: list[frozenset[int]] = [frozenset()] * NUM_BANKS

    def limit_waits(self) -> None:
        """Waits last as long as the status now says."""
        self._words.limit_waits()

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        """Wait until the bank is free on all ranks; senders store when they like.

        Raises:
            RuntimeTimeoutError, PeerFailedError: the host knows that a wait gave up.
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
        self._empty[bank_of(epoch)] = frozenset(arrival.slot for arrival, view in arrivals if not view.numel())
        if epoch > NUM_BANKS:
            self._words.await_bank(list(range(self._nvshmem.num_ranks)), epoch)

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        """Pack, send, signal; see the head of the file."""
        if not chunk.numel():
            return
        b, size, base = self._nvshmem.bindings, self._heap.size, self._heap.address
        bank = bank_of(epoch)
        # Chunks of one slot go to one receiver per epoch: the slot's place in the staging area is this put's own.
        packed = self._heap.chunk(bank, self._staging_at + offset, chunk.shape, chunk.dtype)
        packed.copy_(chunk)
        b.putmem_signal_nbi_on_stream(
            base + size.bank_at(bank) + offset, packed.data_ptr(), packed.nbytes,
            base + size.signal_at(bank, slot), word_of(epoch, self._tags[bank]), SIGNAL_SET, dst, self._stream(),
        )  # fmt: skip

    def wait(self, src: int, slot: int, epoch: int) -> None:
        """The stream waits for the chunk and notes if it is of another call."""
        bank = bank_of(epoch)
        if slot not in self._empty[bank]:
            self._words.await_chunk(src, slot, epoch, self._tags[bank])

    def finish(self, epoch: int) -> None:
        """Credit to every rank."""
        at = self._heap.address + self._heap.size.credit_at(self._nvshmem.rank)
        for rank in range(self._nvshmem.num_ranks):
            self._nvshmem.bindings.signal_op_on_stream(at, epoch, SIGNAL_SET, rank, self._stream())

    def notice(self) -> str | None:
        """Nothing is known on this host."""
        return None

    def abort(self, text: str) -> None:
        """Waits look at the status, which is told by its owner."""

    def close(self) -> None:
        """The heap is closed by its owner."""

    def _stream(self) -> int:
        device = self._nvshmem.device
        return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
