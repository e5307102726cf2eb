"""Puts and signals on a CUDA stream by NVSHMEM's host calls: for attention='aten' on GPUs.

Everything is enqueued on the current stream; the host never waits. The orders that runtime/wires/transport.py asks for
hold on the stream:

* put: the chunk is packed into this rank's staging area; ``putmem_signal`` sends it and raises the signal after it.
  The staging area of a bank is used anew two epochs later, after credit from every rank: one that has ended an epoch
  has received all that was sent to it, so those bytes have left their staging areas.
* wait: a kernel of one program on the stream; kernels launched later see the chunk. It ends as waits inside of kernels
  do (codegen/kernels/device.py), NVSHMEM's own would not. If it gave up, an assertion behind it stops the stream: what
  follows would send what never came.
* open: the stream waits for the credit of all ranks for the epoch that had the bank before.
* finish: a signal to every rank, after the kernels that read the epoch.
* Chunks without elements are neither sent nor awaited: their signals might come late, and take back later ones.

Epochs are numbers that the host bakes into the calls, so a captured graph of them cannot be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfcompile.errors import RuntimeTimeoutError, UnsupportedError
from sfcompile.runtime.gpu.device_run import WordWait
from sfcompile.runtime.gpu.nvshmem import SIGNAL_SET, Nvshmem, NvshmemHeap
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.gpu.streams import is_capturing
from sfcompile.runtime.program.instructions import Arrival
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, PLACE, bank_of
from sfcompile.runtime.wires.transport import TAG_BITS, Source, too_late, word_of


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
        self._nvshmem, self._heap, self._staging_at, self._status = nvshmem, heap, staging_at, status
        self._waits, self._stranger = waits, status.words[:1]
        self._tags = [0] * NUM_BANKS
        self._empty: list[frozenset[int]] = [frozenset()] * NUM_BANKS
        self._senders: dict[int, int] = {}  # by slot: whom the last wait for it was for
        row = heap.size.place(0, 0, status.watched, status.number_of(self))
        self._place = torch.tensor(row, dtype=torch.int64, device=nvshmem.device)

    def limit_waits(self) -> None:
        """Waits last as long as the status now says."""
        at = PLACE.index("limit_ns")
        self._place[at : at + 1].fill_(self._status.watched.limit_ns)

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
            for rank in range(self._nvshmem.num_ranks):
                self._await(self._heap.size.credit_at(rank), epoch - NUM_BANKS, 0, -1 - rank)
            self._status.check_waits()

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
        """The stream waits for the chunk and notes if it is of another call (before credit its word stays)."""
        bank = bank_of(epoch)
        if slot in self._empty[bank]:
            return
        self._senders[slot] = src
        self._await(self._heap.size.signal_at(bank, slot), epoch, TAG_BITS, slot)
        self._status.check_waits()
        seen = self._heap.words(self._heap.size.signal_at(bank, slot), 1)
        self._stranger.copy_(torch.where(seen == word_of(epoch, self._tags[bank]), self._stranger, seen))

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

    def gave_up(self, slot: int, wanted: int, seen: int, limit_s: float) -> RuntimeTimeoutError:
        """The error for a wait of the stream that gave up; see codegen/engines/launch.py."""
        rank, waited = self._nvshmem.rank, f"rank {self._nvshmem.rank} waited {limit_s:g} s, or was told to stop"
        if slot < 0:
            return too_late(f"rank {-1 - slot} has not read epoch {wanted}: {waited}", rank, -1 - slot, slot, wanted)
        peer, epoch = self._senders[slot], wanted >> TAG_BITS
        return too_late(f"the chunk of slot {slot} from rank {peer} did not come: {waited}", rank, peer, slot, epoch)

    def _await(self, word_at: int, epoch: int, tag_bits: int, slot: int) -> None:
        self._waits.run(self._heap.table, self._place, word_at, epoch, tag_bits, slot)

    def _stream(self) -> int:
        device = self._nvshmem.device
        return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
