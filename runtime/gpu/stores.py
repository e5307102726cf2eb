"""Puts of the executor by stores into the memory of other GPUs of this machine, ordered by words of the heap.

Words lie as in every symmetric heap (runtime/wires/symmetric_heap.py) and are told and awaited by kernels of one
program on a stream (words.py), with release and acquire at the scope of the system.

* put: the chunk is packed on the current stream; the side stream stores it into the receiver's slot, then tells the
  slot's signal. The packed copy is kept until its epoch ends. A chunk whose memory lasts until the call has ended (a
  share of a weight) is stored as it lies: the current stream waits for the store when the epoch ends, which is in the
  call, so that who writes to that memory afterwards writes behind it.
* wait: the current stream waits for the slot's signal; what follows sees the chunk. The word that came is compared.
* finish: on the current stream, so after what read the epoch, every rank in reach is told that the bank is free. An
  epoch that uses the bank again waits for that of each of them first, on the side stream, before its puts.
* Chunks without elements are neither sent nor awaited.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.gpu.streams import SideStream
from sfcompile.runtime.gpu.words import StreamWords, WordTell, WordWait
from sfcompile.runtime.program.instructions import Arrival
from sfcompile.runtime.program.sites import LINE_BYTES
from sfcompile.runtime.wires.c10d import PairedTransport
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, HeapSize, bank_of, view_at
from sfcompile.runtime.wires.transport import TAG_BITS, RoutedTransport, Source


class _Kept(NamedTuple):
    """What the side stream reads until the event."""

    epoch: int
    packed: torch.Tensor
    event: Any


class StoreTransport:
    """One rank's stores.

    Args:
        segments: by rank of the job: its heap, as this rank's GPU reaches it; None: out of reach. They are zeroed.
        size: with a credit for every rank of the job.
        status: notes waits that gave up, and chunks of another call.
    """

    def __init__(
        self,
        rank: int,
        segments: Sequence[torch.Tensor | None],
        size: HeapSize,
        tells: WordTell,
        waits: WordWait,
        stream: SideStream,
        status: DeviceStatus,
    ) -> None:
        own = segments[rank]
        assert own is not None and size.num_credits >= len(segments)
        self._rank, self._segments, self._size, self._tells, self._stream = rank, segments, size, tells, stream

        def words(at: int, count: int) -> torch.Tensor:
            return view_at(own, at, (count, LINE_BYTES // 8), torch.int64)[:, 0]

        rows = [(0 if segment is None else segment.data_ptr(), peer, 0) for peer, segment in enumerate(segments)]
        table = torch.tensor(rows, dtype=torch.int64, device=own.device)
        self._words = StreamWords(rank, size, table, words, status, waits)
        self._peers = [peer for peer, segment in enumerate(segments) if segment is not None and peer != rank]
        self._tags = [0] * NUM_BANKS
        self._used = [False] * NUM_BANKS
        self._open: list[int] = []
        self._expected: set[tuple[int, int]] = set()
        self._kept: list[_Kept] = []

    def limit_waits(self) -> None:
        """Waits last as long as the status now says."""
        self._words.limit_waits()

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        """The side stream waits until the bank is free; for the first epoch in it nothing was there before.

        Raises:
            RuntimeTimeoutError, PeerFailedError: the host knows that a wait gave up.
        """
        bank = bank_of(epoch)
        self._tags[bank] = tag
        self._open.append(epoch)
        self._expected.update((epoch, arrival.slot) for arrival, view in arrivals if view.numel())
        if self._used[bank]:
            with self._stream.after_current():
                self._words.await_bank(self._peers, epoch, aside=True)
        self._used[bank] = True

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        """Pack, if need be; store and tell on the side stream."""
        if not chunk.numel():
            return
        bank, segment = bank_of(epoch), self._segments[dst]
        assert segment is not None, f"rank {dst} is out of reach"
        packed = chunk
        if source is not Source.CALL:
            packed = torch.empty(chunk.shape, dtype=chunk.dtype, device=chunk.device)
            packed.copy_(chunk)
        with self._stream.after_current():
            view_at(segment, self._size.bank_at(bank) + offset, chunk.shape, chunk.dtype).copy_(packed)
            self._tell(dst, self._size.signal_at(bank, slot), epoch, TAG_BITS, self._tags[bank])
        self._kept.append(_Kept(epoch, packed, self._stream.event()))

    def wait(self, src: int, slot: int, epoch: int) -> None:
        """The stream waits for the chunk and notes if it is of another call.

        Raises:
            RuntimeTimeoutError, PeerFailedError: the host knows that a wait gave up.
        """
        if (epoch, slot) in self._expected:
            self._expected.remove((epoch, slot))
            self._words.await_chunk(src, slot, epoch, self._tags[bank_of(epoch)])

    def finish(self, epoch: int) -> None:
        """Give credit for what has ended, and let go of what it sent."""
        if any(each <= epoch for each in self._open):
            self._open = [each for each in self._open if each > epoch]
            for peer in self._peers:
                self._tell(peer, self._size.credit_at(self._rank), epoch, 0, 0)
        for kept in [each for each in self._kept if each.epoch <= epoch]:
            self._stream.hold_current(kept.event)
        self._kept = [each for each in self._kept if each.epoch > epoch]

    def _tell(self, dst: int, word_at: int, epoch: int, tag_bits: int, tag: int) -> None:
        self._tells.run(self._words.table, self._words.place, dst, word_at, epoch, tag_bits, tag)

    def notice(self) -> str | None:
        """Nothing is known on this host."""
        return None

    def abort(self, text: str) -> None:
        """Waits look at the status, which is told by its owner."""

    def close(self) -> None:
        """Let go of what was sent; the memory is its owner's."""
        self._kept.clear()
        self._expected.clear()


class StoresAndMessages(RoutedTransport):
    """Stores inside a machine, messages of pairs (runtime/wires/c10d.py) between machines.

    Args:
        is_near: by rank: whether stores reach it.
    """

    def __init__(self, stores: StoreTransport, messages: PairedTransport, is_near: Sequence[bool]) -> None:
        super().__init__(stores, messages, is_near)
        self._pairs = messages

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        """Send; and receive what comes in the same slot by a message, though the slot of the other was stored into."""
        super().put(dst, slot, offset, chunk, epoch, source)
        self._pairs.pass_by(slot, epoch)
