"""Stores call by call: which signals are raised and taken. In any order of streams: test_symmetric_side.py."""

from __future__ import annotations

from typing import Any

import torch

from sfcompile.runtime.gpu.stores import StoresAndMessages, StoreTransport, num_channels
from sfcompile.runtime.gpu.streams import CudaSideStream
from sfcompile.runtime.program.instructions import Arrival, Chunk
from sfcompile.runtime.wires.symmetric_heap import HeapSize, view_at
from sfcompile.runtime.wires.transport import word_of

SIZE = HeapSize(2, 512)
CPU = torch.device("cpu")
FIRST = Arrival(0, 1, "k", Chunk(1))


class Signals:
    """Writes down what it is asked."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int, int]] = []

    def raise_(self, rank: int, channel: int) -> None:
        self.said.append(("raise", rank, channel))

    def wait(self, rank: int, channel: int) -> None:
        self.said.append(("take", rank, channel))


def stores(reach: int = 2) -> tuple[StoreTransport, Signals, list[Any], torch.Tensor]:
    signals, status = Signals(), torch.zeros(1, dtype=torch.int64)
    segments = [torch.zeros(SIZE.segment_bytes, dtype=torch.uint8) if rank < reach else None for rank in range(3)]
    return StoreTransport(0, segments, SIZE, signals, CudaSideStream(CPU), status), signals, segments, status


def test_a_chunk_lies_in_the_peers_slot_under_its_word() -> None:
    wires, signals, segments, _ = stores()
    x = torch.arange(12.0).view(3, 4)
    wires.open(1, [], tag=5)
    wires.put(1, 1, 64, x.t(), 1)
    wires.put(1, 0, 0, torch.empty(0), 1)
    assert torch.equal(view_at(segments[1], SIZE.bank_at(1) + 64, (4, 3), torch.float32), x.t())
    assert view_at(segments[1], SIZE.signal_at(1, 1), (1,), torch.int64).tolist() == [word_of(1, 5)]
    assert signals.said == [("raise", 1, 3 + 1)]


def test_as_much_credit_is_taken_as_was_given() -> None:
    """For every epoch that ended, in whatever order; the first epoch of a bank needs none."""
    wires, signals, _, _ = stores()
    for epoch in (1, 2):
        wires.open(epoch, [])
    assert signals.said == []
    wires.finish(0)  # the younger has ended, the older not
    assert signals.said == []
    wires.finish(2)
    assert signals.said == [("raise", 1, 3 + 2), ("raise", 1, 2)]
    wires.open(3, [])
    wires.open(4, [])
    assert signals.said[2:] == [("take", 1, 3 + 2), ("take", 1, 2)]
    assert num_channels(SIZE) == 6


def test_a_wait_takes_the_signal_of_what_is_sent_and_looks_at_the_word() -> None:
    wires, signals, segments, status = stores()
    view = torch.zeros(2)
    wires.open(1, [(FIRST, view), (FIRST._replace(slot=1), view[:0])], tag=5)
    word = view_at(segments[0], SIZE.signal_at(1, 0), (1,), torch.int64)
    word.fill_(word_of(1, 5))
    wires.wait(1, 0, 1)
    wires.wait(1, 1, 1)  # nothing is sent there
    assert signals.said == [("take", 1, 3)] and int(status) == 0
    wires.open(1, [(FIRST, view)], tag=6)
    wires.wait(1, 0, 1)
    assert int(status) == word_of(1, 5)


def test_messages_are_received_where_a_store_left() -> None:
    """A ring over two machines: this rank stores into a slot of its neighbour, and gets the same slot by a message."""
    asked: list[Any] = []

    class Messages:
        def put(self, *args: Any) -> None:
            asked.append(("put", args[0], args[1]))

        def pass_by(self, slot: int, epoch: int) -> None:
            asked.append(("receive", slot, epoch))

    wires, signals, _, _ = stores()
    both = StoresAndMessages(wires, Messages(), [True, True, False])  # type: ignore[arg-type]
    wires.open(1, [])
    both.put(1, 0, 0, torch.ones(4), 1)
    both.put(2, 1, 0, torch.ones(4), 1)
    assert signals.said == [("raise", 1, 3)]
    assert asked == [("receive", 0, 1), ("put", 2, 1), ("receive", 1, 1)]
