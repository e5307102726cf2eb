"""On-stream puts of one PE to itself: packed, signalled, credited. Several PEs: test_device_side.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from emulated_nvshmem import Library

from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.engines.transfers import WaitKernel
from sfcompile.codegen.toolchain.interpreter import interpreting
from sfcompile.errors import PeerFailedError, RuntimeTimeoutError, UnsupportedError
from sfcompile.runtime.gpu.nvshmem import Nvshmem, NvshmemHeap
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.gpu.transport import NvshmemTransport
from sfcompile.runtime.program.instructions import Arrival, Chunk
from sfcompile.runtime.wires.symmetric_heap import HeapSize
from sfcompile.runtime.wires.transport import word_of

SIZE = HeapSize(2, 512, 1)


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with interpreting(lambda: time.sleep(0)):  # nothing but a wait's own limit ends it
        yield


def transport(timeout_s: float = 0.2, ranks: int = 1) -> tuple[NvshmemTransport, NvshmemHeap, DeviceStatus]:
    """Rank 0's; the others are not there."""
    library = Library(0, lambda: None, lambda pe: True)
    pe = Nvshmem(0, 1, CPU, lambda value, doing: [value], (library, library))
    heap = NvshmemHeap(pe, replace(SIZE, num_credits=ranks), (0,), lambda value, doing: [value])
    pe.num_ranks = ranks
    status = DeviceStatus(0, CPU, timeout_s)
    return NvshmemTransport(pe, heap, 256, status, WaitKernel(0, KernelTarget(CPU))), heap, status


def test_chunks_arrive_before_their_signal_in_the_bank_of_their_epoch() -> None:
    wires, heap, _ = transport()
    x = torch.arange(12.0).view(3, 4)
    for epoch in (1, 2, 3):
        wires.open(epoch, [])
        wires.put(0, 1, 64, x.t() * epoch, epoch)  # a view that has to be packed
        wires.wait(0, 1, epoch)
        assert torch.equal(heap.chunk(epoch % 2, 64, (4, 3), torch.float32), x.t() * epoch)
        packed = heap.chunk(epoch % 2, 256 + 64, (4, 3), torch.float32)  # beside where chunks of others arrive
        assert torch.equal(packed, x.t() * epoch)
        wires.finish(epoch)


def test_a_bank_waits_for_credit_and_a_wait_for_its_signal() -> None:
    for awaits_credit in (True, False):
        wires, heap, _ = transport()
        for epoch in (1, 2):
            wires.put(0, 0, 0, torch.zeros(4), epoch)
        with pytest.raises(RuntimeTimeoutError) as caught:
            if awaits_credit:  # epoch 1 was not finished
                wires.open(3, [])
                wires.put(0, 0, 0, torch.ones(4), 3)
            else:
                wires.wait(0, 0, 3)
        said = "rank 0 has not read epoch 1" if awaits_credit else "the chunk of slot 0 from rank 0 did not come"
        assert said in str(caught.value) and "waited 0.2 s" in str(caught.value)
        assert not heap.chunk(1, 0, (4,), torch.float32).any(), "a put that did not wait"


def test_a_bank_is_free_when_all_ranks_have_ended_its_epoch() -> None:
    """Not only those that get something now: another's chunk may still be read from where this one is packed."""
    wires, heap, _ = transport(ranks=3)
    credits = heap.words(heap.size.credits_at, 3)
    credits.copy_(torch.tensor([1, 1, 0]))
    with pytest.raises(RuntimeTimeoutError, match="rank 2 has not read epoch 1"):
        wires.open(3, [])


def test_what_has_no_elements_is_neither_sent_nor_awaited() -> None:
    """Its signal could come late and take back a later one of the slot."""
    wires, heap, _ = transport()
    wires.open(1, [(Arrival(1, 0, "k", Chunk(0, 0)), torch.empty(1, 2, 0, 4))])
    wires.put(0, 1, 64, torch.empty(1, 2, 0, 4), 1)
    wires.wait(0, 1, 1)
    assert not heap.words(SIZE.signal_at(1, 0), 2).any()


def test_waits_get_a_new_limit_and_end_when_the_host_says_so() -> None:
    wires, _, status = transport(timeout_s=600.0)
    threading.Timer(0.3, status.stop, ("rank 1: its process has ended",)).start()
    with pytest.raises(PeerFailedError, match="rank 1: its process has ended"):
        wires.wait(0, 0, 1)
    wires, _, status = transport(timeout_s=600.0)
    status.limit_s = 0.1
    wires.limit_waits()
    with pytest.raises(RuntimeTimeoutError, match=r"waited 0\.1 s"):
        wires.wait(0, 0, 1)


def test_a_captured_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wires, _, _ = transport()
    wires.open(1, [])
    monkeypatch.setattr(wires._nvshmem, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UnsupportedError, match="Use attention='triton'"):
        wires.open(2, [])


def test_a_chunk_of_another_call_is_noted() -> None:
    wires, heap, status = transport()
    wires.open(1, [], tag=5)
    wires.put(0, 1, 64, torch.ones(4), 1)
    wires.wait(0, 1, 1)
    assert int(status.words[0]) == 0
    wires.open(1, [], tag=6)  # as another rank would be
    wires.wait(0, 1, 1)
    assert int(status.words[0]) == word_of(1, 5) == int(heap.words(SIZE.signal_at(1, 1), 1))
