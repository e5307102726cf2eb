"""What a program needs of a heap, and calls whose ranks are a group of the job."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_sites import gather_site

from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank import recorder
from sfcompile.runtime.rank.executor import SiteRun
from sfcompile.runtime.rank.sides import aligned, bank_room, run_on_host
from sfcompile.runtime.rank.site_call import SiteCall
from sfcompile.runtime.wires.direct import DirectTransport
from sfcompile.runtime.wires.symmetric_heap import HeapSize, local_segment
from sfcompile.runtime.wires.transport import GroupTransport

GATHER = build_exchange(gather_site(2), Mesh.of(Topology.grid(1, 2), 1, 2))


class Engine:
    bank_bytes = 3 * 4096 + 1


def test_room_is_what_the_largest_site_needs() -> None:
    assert [aligned(n) for n in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
    assert bank_room([], []) == HeapSize(0, 0)
    assert bank_room([GATHER, GATHER], [None, None]) == HeapSize(len(GATHER.slots), aligned(GATHER.heap_bytes))
    assert bank_room([GATHER, GATHER], [None, Engine()]) == HeapSize(len(GATHER.slots), 4 * 4096)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_group_of_the_job_sees_its_own_ranks(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 2 and 3 of the job gather: rank 3 of the job is rank 1 there, and its bytes go to rank 2."""
    monkeypatch.setattr(recorder, "active", recorder.Recorder() if recorded else None)
    size = bank_room([GATHER], [None])
    segments = [local_segment(size) for _ in range(4)]
    chunk = torch.full(GATHER.site.local_shape(1), 7.0)

    class InGroup:
        """The schedule, run by the second half of the job."""

        def __getattr__(self, name: str) -> Any:
            return getattr(GATHER, name)

        def members(self, rank: int) -> tuple[int, tuple[int, ...]]:
            return rank - 2, (2, 3)

    call = SiteCall(3, 0, 0, InGroup(), 1)
    run = run_on_host(call, Topology((0, 0, 0, 0)), segments[3], DirectTransport(3, segments, 0.2))
    assert (type(run) is SiteRun) is not recorded
    run.put("exchange_start", chunk)
    assert [bool(segment.signals.any()) for segment in segments] == [False, False, True, False]
    arrival = GATHER.program(0).arrivals[0]
    got = segments[2].chunk(1, GATHER.slots[arrival.slot].offset, chunk.shape, chunk.dtype)
    assert torch.equal(got, chunk)
    run.finish(1)
    assert [segment.done for segment in segments] == [0, 0, 0, 1]


def test_the_whole_job_needs_no_renumbering() -> None:
    size = bank_room([GATHER], [None])
    segments = [local_segment(size) for _ in range(2)]
    wires = DirectTransport(0, segments, 0.2)
    run = run_on_host(SiteCall(0, 0, 0, GATHER, 1), Topology((0, 0)), segments[0], wires)
    assert run._transport is wires
    run = run_on_host(SiteCall(0, 0, 0, GATHER, 1), Topology((0, 0, 0)), segments[0], wires)
    assert isinstance(run._transport, GroupTransport)
