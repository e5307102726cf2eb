"""Stores call by call: which words are told and awaited. In any order of streams: test_symmetric_side.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.gpu.stores import StoresAndMessages, StoreTransport
from sfcompile.runtime.program.instructions import Arrival, Chunk
from sfcompile.runtime.wires.symmetric_heap import PLACE, HeapSize, view_at
from sfcompile.runtime.wires.transport import TAG_BITS, word_of

SIZE = HeapSize(2, 512, 3)
CPU = torch.device("cpu")
FIRST = Arrival(0, 1, "k", Chunk(1))
CREDIT = SIZE.credit_at(0)


class Side:
    """A side stream that writes down what is asked of it."""

    def __init__(self, said: list[Any]) -> None:
        self.said = said

    @contextmanager
    def after_current(self) -> Iterator[None]:
        self.said.append("aside")
        yield
        self.said.append("back")

    def event(self) -> int:
        return len(self.said)

    def hold_current(self, event: int) -> None:
        self.said.append(("hold", event))


def stores(reach: int = 2) -> tuple[StoreTransport, list[Any], list[Any], DeviceStatus]:
    """Rank 0's; what it says of words and streams; segments."""
    said: list[Any] = []
    status = DeviceStatus(0, CPU, 2.0)
    segments = [torch.zeros(SIZE.segment_bytes, dtype=torch.uint8) if rank < reach else None for rank in range(3)]
    addresses = [0 if segment is None else segment.data_ptr() for segment in segments]

    def tell(heaps: torch.Tensor, place: torch.Tensor, dst: int, at: int, epoch: int, bits: int, tag: int) -> None:
        assert heaps[:, 0].tolist() == addresses and place.tolist()[2:8] == SIZE.place(0, 0, status.watched)[2:8]
        said.append(("tell", dst, at, (epoch << bits) + tag))

    def wait(heaps: torch.Tensor, place: torch.Tensor, at: int, epoch: int, bits: int, slot: int) -> None:
        said.append(("wait", at, epoch, bits, slot))

    tells, waits = SimpleNamespace(run=tell), SimpleNamespace(run=wait)
    return StoreTransport(0, segments, SIZE, tells, waits, Side(said), status), said, segments, status


def test_a_chunk_lies_in_the_peers_slot_before_its_word_is_told() -> None:
    wires, said, segments, _ = stores()
    x = torch.arange(12.0).view(3, 4)
    wires.open(1, [], tag=5)
    wires.put(1, 1, 64, x.t(), 1)
    wires.put(1, 0, 0, torch.empty(0), 1)
    assert torch.equal(view_at(segments[1], SIZE.bank_at(1) + 64, (4, 3), torch.float32), x.t())
    assert said == ["aside", ("tell", 1, SIZE.signal_at(1, 1), word_of(1, 5)), "back"]
    wires.finish(0)
    assert len(said) == 3  # the packed copy is still read
    wires.finish(1)
    assert said[3:] == [("tell", 1, CREDIT, 1), ("hold", 3)]


def test_credit_is_told_once_for_what_ended_and_awaited_before_a_bank_is_used_again() -> None:
    """In whatever order sites end; the first epoch of a bank waits for nobody. No credit of who is out of reach."""
    wires, said, _, _ = stores()
    for epoch in (7, 8):  # a heap may be made late
        wires.open(epoch, [])
    wires.finish(6)  # the younger has ended, the older not
    assert said == []
    wires.finish(8)
    assert said == [("tell", 1, CREDIT, 8)]
    wires.open(9, [])
    assert said[1:] == ["aside", ("wait", SIZE.credit_at(1), 7, 0, -2), "back"]
    wires.open(10, [])
    assert said[5] == ("wait", SIZE.credit_at(1), 8, 0, -2)


def test_a_wait_is_for_the_signal_of_what_is_sent_and_looks_at_the_word() -> None:
    wires, said, segments, status = stores()
    view = torch.zeros(2)
    wires.open(1, [(FIRST, view), (FIRST._replace(slot=1), view[:0])], tag=5)
    word = view_at(segments[0], SIZE.signal_at(1, 0), (1,), torch.int64)
    word.fill_(word_of(1, 5))
    wires.wait(1, 0, 1)
    wires.wait(1, 1, 1)  # nothing is sent there
    assert said == [("wait", SIZE.signal_at(1, 0), 1, TAG_BITS, 0)] and int(status.words[0]) == 0
    wires.open(1, [(FIRST, view)], tag=6)
    wires.wait(1, 0, 1)
    assert int(status.words[0]) == word_of(1, 5)


def test_limits_reach_waits_that_are_made_later() -> None:
    wires, _, _, status = stores()
    status.limit_s = 5.0
    wires.limit_waits()
    assert int(wires._words.place[PLACE.index("limit_ns")]) == 5 * 10**9


def test_messages_are_received_where_a_store_left() -> None:
    """A ring over two machines: this rank stores into a slot of its neighbour, and gets the same slot by a message."""
    asked: list[Any] = []

    class Messages:
        def put(self, *args: Any) -> None:
            asked.append(("put", args[0], args[1]))

        def pass_by(self, slot: int, epoch: int) -> None:
            asked.append(("receive", slot, epoch))

    wires, said, _, _ = stores()
    both = StoresAndMessages(wires, Messages(), [True, True, False])  # type: ignore[arg-type]
    wires.open(1, [])
    both.put(1, 0, 0, torch.ones(4), 1)
    both.put(2, 1, 0, torch.ones(4), 1)
    assert said[1][:3] == ("tell", 1, SIZE.signal_at(1, 0))
    assert asked == [("receive", 0, 1), ("put", 2, 1), ("receive", 1, 1)]
