"""What kernels of CPU ranks see of the heaps."""

from __future__ import annotations

import pytest

from sfcompile.errors import RuntimeTimeoutError, UnsupportedError
from sfcompile.runtime.rank.engine import KernelAccess
from sfcompile.runtime.wires.direct import DirectTransport
from sfcompile.runtime.wires.symmetric_heap import HeapSize, local_segment
from sfcompile.runtime.wires.transport import word_of

SIZE = HeapSize(2, 64)


def test_addresses_places_and_waits_of_a_group() -> None:
    segments = [local_segment(SIZE) for _ in range(3)]
    access = KernelAccess((2, 0), segments, DirectTransport(0, segments, 0.2))
    assert access.heaps[:, 0].tolist() == [segments[2].address, segments[0].address]
    assert access.place(5).tolist() == SIZE.place(5, word_of(5, 0), access._watched)
    access.await_banks([(0, 1)], 2)
    segments[2].done = 1
    access.await_banks([(0, 1)], 3)
    with pytest.raises(RuntimeTimeoutError):
        access.await_banks([(0, 1)], 4)
    access.wake([(0, 1)], 3)
    watch = access.watch()
    with pytest.raises(RuntimeTimeoutError, match="inside an attention kernel"):
        for _ in range(10**7):
            watch()


def test_ranks_out_of_reach_are_named() -> None:
    segments = [local_segment(SIZE), None]
    with pytest.raises(UnsupportedError, match="ranks 1 are on other machines"):
        KernelAccess((0, 1), segments, DirectTransport(0, segments, 0.2))
