"""Words that a stream waits for: what a wait asks for, and what its error says. In time: test_transport.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfcompile.errors import RuntimeTimeoutError
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.gpu.words import StreamWords
from sfcompile.runtime.wires.symmetric_heap import HeapSize
from sfcompile.runtime.wires.transport import TAG_BITS, word_of

SIZE = HeapSize(4, 64, 3)
CPU = torch.device("cpu")


def words_of(status: DeviceStatus, seen: dict[int, int], said: list[Any]) -> StreamWords:
    def wait(heaps: torch.Tensor, place: torch.Tensor, at: int, epoch: int, bits: int, slot: int) -> None:
        said.append((at, epoch, bits, slot))
        if seen.get(at, 0) < epoch << bits:
            status.words[1:] = torch.tensor([2, int(place[-1]), slot, epoch << bits, seen.get(at, 0)])

    def own(at: int, count: int) -> torch.Tensor:
        return torch.tensor([seen.get(at, 0)] * count)

    table = torch.zeros(3, 3, dtype=torch.int64)
    return StreamWords(1, SIZE, table, own, status, SimpleNamespace(run=wait))


def test_an_error_says_who_was_waited_for() -> None:
    """Slot and epoch of a chunk; the epoch that a bank was read in. The status names the heap's words by a number."""
    at, said = SIZE.signal_at(1, 2), list[Any]()
    status = DeviceStatus(1, CPU, 2.0)
    words_of(status, {}, said)  # of an older heap
    words = words_of(status, {at: word_of(5, 9)}, said)
    words.await_chunk(0, 2, 5, 9)
    assert said == [(at, 5, TAG_BITS, 2)] and not status.words.any()
    with pytest.raises(RuntimeTimeoutError, match="chunk of slot 2 from rank 0 did not come: rank 1 waited 2 s") as got:
        words.await_chunk(0, 2, 7, 9)
    assert (got.value.rank, got.value.peer, got.value.slot, got.value.epoch) == (1, 0, 2, 7)
    status.words[0] = word_of(5, 9)  # the old word, as who looks at the slot all the same would note
    with pytest.raises(RuntimeTimeoutError, match="did not come"):
        status.end_call()
    status = DeviceStatus(1, CPU, 2.0)
    words = words_of(status, {SIZE.credit_at(0): 5}, said)
    words.await_bank([0], 7, aside=True)
    with pytest.raises(RuntimeTimeoutError, match="rank 2 has not read epoch 5") as got:
        words.await_bank([0, 2], 7, aside=True)
    assert (got.value.peer, got.value.epoch) == (2, 5) and said[-1] == (SIZE.credit_at(2), 5, 0, -3)
    assert status._seen[:, 1].tolist() == [0, 2]  # the copy of the side stream: the main one may not have got there


def test_a_chunk_of_another_call_is_noted() -> None:
    status = DeviceStatus(1, CPU, 2.0)
    words = words_of(status, {SIZE.signal_at(1, 0): word_of(5, 9)}, [])
    words.await_chunk(0, 0, 5, 8)
    assert int(status.words[0]) == word_of(5, 9)
