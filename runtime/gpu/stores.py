"""Puts of the executor by stores into the memory of other GPUs of this machine, ordered by torch's signals.

A signal is a word of the receiver's that is 0 or 1 (torch.distributed's symmetric memory): ``raise_`` waits on the
stream until it is 0 and sets it with release, ``wait`` waits until it is 1 and takes it back to 0 with acquire, both at
the scope of the system. So no number of an epoch is in it, and a signal that nobody takes holds up the next one.

* put: the chunk is packed on the current stream; the side stream stores it, and the word of its call, into the
  receiver's slot, then raises the slot's signal. The packed copy is kept until its epoch ends. A chunk whose memory
  lasts until the call has ended (a share of a weight) is stored as it lies: the current stream waits for the store when
  the epoch ends, which is in the call, so that who writes to that memory afterwards writes behind it.
* wait: the current stream takes the slot's signal; what follows sees the chunk. The word that came is compared.
* finish: on the current stream, so after what read the epoch, its bank's credit is raised at every rank in reach. An
  epoch that uses the bank again takes one from each of them first, on the side stream, before its puts: exactly as
  many as were raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from sfcompile.runtime.gpu.streams import SideStream
from sfcompile.runtime.program.instructions import Arrival
from sfcompile.runtime.wires.c10d import PairedTransport
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, HeapSize, bank_of, view_at
from sfcompile.runtime.wires.transport import RoutedTransport, Source, word_of


class Signals(Protocol):
    """Words of 0 or 1 between the ranks of a machine; see the head of the file."""

    def raise_(self, rank: int, channel: int) -> None:
        """On the current stream: this rank's signal at ``rank`` (of the job)."""

    def wait(self, rank: int, channel: int) -> None:
        """On the current stream: take the signal of ``rank`` here."""


def num_channels(size: HeapSize) -> int:
    """Signals that a rank has at another: one for every slot of a bank, one for the credit of a bank."""
    return NUM_BANKS * (size.num_slots + 1)


class _Kept(NamedTuple):
    """What the side stream reads until the event."""

    epoch: int
    packed: torch.Tensor
    event: Any


class StoreTransport:
    """One rank's stores.

    Args:
        segments: by rank of the job: its heap, as this rank's GPU reaches it; None: out of reach.
        status: on the device, int64; its first word notes that a chunk of another call has come.
    """

    def __init__(
        self,
        rank: int,
        segments: Sequence[torch.Tensor | None],
        size: HeapSize,
        signals: Signals,
        stream: SideStream,
        status: torch.Tensor,
    ) -> None:
        self._rank, self._segments, self._size = rank, segments, size
        self._signals, self._stream, self._status = signals, stream, status[:1]
        self._peers = [peer for peer, segment in enumerate(segments) if segment is not None and peer != rank]
        self._tags = [0] * NUM_BANKS
        self._used = [False] * NUM_BANKS
        self._open: list[int] = []
        self._expected: set[tuple[int, int]] = set()
        self._kept: list[_Kept] = []

    def _channel(self, bank: int, slot: int) -> int:
        return bank * (self._size.num_slots + 1) + slot

    def _credit(self, bank: int) -> int:
        return self._channel(bank, self._size.num_slots)

    def _word(self, rank: int, bank: int, slot: int) -> torch.Tensor:
        """Where the word of a chunk's call lies: int64 [1]."""
        segment = self._segments[rank]
        assert segment is not None, f"rank {rank} is out of reach"
        return view_at(segment, self._size.signal_at(bank, slot), (1,), torch.int64)

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        """Take the credit of the epoch that had the bank before."""
        bank = bank_of(epoch)
        self._tags[bank] = tag
        self._open.append(epoch)
        self._expected.update((epoch, arrival.slot) for arrival, view in arrivals if view.numel())
        if self._used[bank]:
            with self._stream.after_current():
                for peer in self._peers:
                    self._signals.wait(peer, self._credit(bank))
        self._used[bank] = True

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        """Pack, if need be; store and signal on the side stream."""
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
            self._word(dst, bank, slot).fill_(word_of(epoch, self._tags[bank]))
            self._signals.raise_(dst, self._channel(bank, slot))
        self._kept.append(_Kept(epoch, packed, self._stream.event()))

    def wait(self, src: int, slot: int, epoch: int) -> None:
        """The stream waits for the chunk and notes if it is of another call."""
        if (epoch, slot) not in self._expected:
            return
        self._expected.remove((epoch, slot))
        bank = bank_of(epoch)
        self._signals.wait(src, self._channel(bank, slot))
        seen = self._word(self._rank, bank, slot)
        self._status.copy_(torch.where(seen == word_of(epoch, self._tags[bank]), self._status, seen))

    def finish(self, epoch: int) -> None:
        """Give credit for each epoch that has ended, and let go of what it sent."""
        for ended in [each for each in self._open if each <= epoch]:
            self._open.remove(ended)
            for peer in self._peers:
                self._signals.raise_(peer, self._credit(bank_of(ended)))
        for kept in [each for each in self._kept if each.epoch <= epoch]:
            self._stream.hold_current(kept.event)
        self._kept = [each for each in self._kept if each.epoch > epoch]

    def notice(self) -> str | None:
        """Nothing is known on this host."""
        return None

    def abort(self, text: str) -> None:
        """Waits on the stream give up by themselves after the session's limit."""

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
