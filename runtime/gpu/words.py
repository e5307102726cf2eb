"""Words of this rank's segment that its stream waits for: signals of chunks, credits for banks.

A wait is a kernel of one program on the current stream; kernels launched later see what the word was published after.
It ends as waits inside of kernels do (codegen/kernels/device.py): by its limit, or when the host says so. If it gave
up, an assertion behind it stops the stream: what follows would compute with what never came, or overwrite what is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from sfcompile.errors import RuntimeTimeoutError
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, PLACE, HeapSize, bank_of
from sfcompile.runtime.wires.transport import TAG_BITS, too_late, word_of


class WordWait(Protocol):
    """Waits of a stream (codegen/engines/transfers.py WaitKernel)."""

    def run(self, heaps: torch.Tensor, place: torch.Tensor, word_at: int, epoch: int, tag_bits: int, slot: int) -> None:
        """What is launched next follows a word of this rank's segment, or the wait gave up, as the status says."""


class WordTell(Protocol):
    """Publishes a word in a segment that this rank maps (codegen/engines/transfers.py TellKernel)."""

    def run(
        self, heaps: torch.Tensor, place: torch.Tensor, dst: int, word_at: int, epoch: int, tag_bits: int, tag: int
    ) -> None:
        """After all that the current stream holds, unless a wait of this rank gave up."""


class StreamWords:
    """One rank's waits on one heap.

    Args:
        rank: of the job.
        table: int64 [ranks, 3] on the device: see HEAP in codegen/kernels/text.py.
        words: some words of this rank's segment that lie on cache lines of their own, by offset and count.

    Attributes:
        table: as it was given.
        place: what kernels read, see PLACE in runtime/wires/symmetric_heap.py.
    """

    def __init__(
        self,
        rank: int,
        size: HeapSize,
        table: torch.Tensor,
        words: Callable[[int, int], torch.Tensor],
        status: DeviceStatus,
        waits: WordWait,
    ) -> None:
        self.table, self._rank, self._size, self._words = table, rank, size, words
        self._status, self._waits = status, waits
        self._senders: dict[int, int] = {}  # by slot: whom the last wait for it was for
        row = size.place(0, 0, status.watched, status.number_of(self))
        self.place = torch.tensor(row, dtype=torch.int64, device=table.device)

    def limit_waits(self) -> None:
        """Waits last as long as the status now says."""
        at = PLACE.index("limit_ns")
        self.place[at : at + 1].fill_(self._status.watched.limit_ns)

    def await_bank(self, ranks: list[int], epoch: int, aside: bool = False) -> None:
        """Until each of some ranks has read the epoch that had the bank of this one before.

        Args:
            aside: whether the current stream is the one beside the main one.

        Raises:
            RuntimeTimeoutError, PeerFailedError: the host knows that a wait gave up.
        """
        for rank in ranks:
            at = self._size.credit_at(rank)
            self._waits.run(self.table, self.place, at, epoch - NUM_BANKS, 0, -1 - rank)
        self._status.check_waits(aside)

    def await_chunk(self, src: int, slot: int, epoch: int, tag: int) -> None:
        """Until a chunk has come; one of another call is noted (before credit its word stays).

        Raises:
            RuntimeTimeoutError, PeerFailedError: the host knows that a wait gave up.
        """
        self._senders[slot] = src
        at, stranger = self._size.signal_at(bank_of(epoch), slot), self._status.words[:1]
        self._waits.run(self.table, self.place, at, epoch, TAG_BITS, slot)
        self._status.check_waits()
        seen = self._words(at, 1)
        stranger.copy_(torch.where(seen == word_of(epoch, tag), stranger, seen))

    def gave_up(self, slot: int, wanted: int, seen: int, limit_s: float) -> RuntimeTimeoutError:
        """The error for a wait that gave up; see codegen/engines/launch.py."""
        rank, waited = self._rank, f"rank {self._rank} waited {limit_s:g} s, or was told to stop"
        if slot < 0:
            return too_late(f"rank {-1 - slot} has not read epoch {wanted}: {waited}", rank, -1 - slot, slot, wanted)
        peer, epoch = self._senders[slot], wanted >> TAG_BITS
        return too_late(f"the chunk of slot {slot} from rank {peer} did not come: {waited}", rank, peer, slot, epoch)
