"""On-stream puts of one PE to itself: packed, signalled, credited. Several PEs: test_device_side.py."""

from __future__ import annotations

import pytest
import torch
from emulated_nvshmem import Library

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.gpu.nvshmem import Nvshmem, NvshmemHeap
from sfcompile.runtime.gpu.transport import NvshmemTransport
from sfcompile.runtime.wires.symmetric_heap import HeapSize
from sfcompile.runtime.wires.transport import word_of

SIZE = HeapSize(2, 512, 1)


def transport(timeout_s: float = 0.2) -> tuple[NvshmemTransport, NvshmemHeap]:
    library = Library(0, lambda: None, lambda pe: True, timeout_s)
    pe = Nvshmem(0, 1, torch.device("cpu"), lambda value, doing: [value], (library, library))
    heap = NvshmemHeap(pe, SIZE, (0,), lambda value, doing: [value])
    return NvshmemTransport(pe, heap, 256, torch.zeros(1, dtype=torch.int64)), heap


def test_chunks_arrive_before_their_signal_in_the_bank_of_their_epoch() -> None:
    wires, heap = transport()
    x = torch.arange(12.0).view(3, 4)
    for epoch in (1, 2, 3):
        wires.put(0, 1, 64, x.t() * epoch, epoch)  # a view that has to be packed
        wires.wait(0, 1, epoch)
        assert torch.equal(heap.chunk(epoch % 2, 64, (4, 3), torch.float32), x.t() * epoch)
        wires.finish(epoch)


def test_a_bank_waits_for_credit_and_a_wait_for_its_signal() -> None:
    wires, _ = transport()
    wires.put(0, 0, 0, torch.zeros(4), 1)
    wires.put(0, 0, 0, torch.zeros(4), 2)
    with pytest.raises(TimeoutError):  # epoch 1 was not finished
        wires.put(0, 0, 0, torch.zeros(4), 3)
    with pytest.raises(TimeoutError):
        wires.wait(0, 0, 3)


def test_a_captured_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wires, _ = transport()
    wires.open(1, [])
    monkeypatch.setattr(wires._nvshmem, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UnsupportedError, match="use attention='triton'"):
        wires.open(2, [])


def test_a_chunk_of_another_call_is_noted() -> None:
    wires, heap = transport()
    wires.open(1, [], tag=5)
    wires.put(0, 1, 64, torch.ones(4), 1)
    wires.wait(0, 1, 1)
    assert int(wires._status) == 0
    wires.open(1, [], tag=6)  # as another rank would be
    wires.wait(0, 1, 1)
    assert int(wires._status) == word_of(1, 5) == int(heap.words(SIZE.signal_at(1, 1), 1))
