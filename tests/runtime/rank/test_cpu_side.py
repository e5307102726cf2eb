"""A heap on CPUs: made, outgrown, made anew after a failure; wires that follow the options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from random_sites import gather_site

from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.errors import RuntimeTimeoutError, UnsupportedError
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.cpu_side import CpuSide
from sfcompile.runtime.rank.sides import Wires
from sfcompile.runtime.rank.site_call import SiteCall
from sfcompile.runtime.wires.direct import DirectTransport
from sfcompile.runtime.wires.symmetric_heap import HeapSize, Segment, local_segment

GATHER = build_exchange(gather_site(2), Mesh.of(Topology.grid(1, 2), 1, 2))


class World:
    """One rank that meets nobody: it makes the heaps of all ranks itself."""

    def __init__(self, stores: bool = True) -> None:
        self.rank = 0
        self.topology = Topology((0, 0))
        self.timeout_s = 0.1
        self.stores = stores
        self.told: list[str] = []

    def make_segments(self, size: HeapSize) -> Sequence[Segment | None]:
        self.told.append("new heap")
        return [local_segment(size) for _ in range(2)]

    def make_wires(self, segments: Sequence[Segment | None]) -> Wires:
        direct = DirectTransport(self.rank, segments, self.timeout_s)
        return Wires(direct, direct if self.stores else None)

    def exchange(self, value: Any, doing: str, patience: float = 1.0, afresh: bool = False) -> list[Any]:
        return [value, value]

    def reconfigure(self, transport: str, timeout_s: float) -> bool:
        return True

    def announce(self, text: str) -> None:
        """Nobody is there."""

    life = 0
    group = ""

    def reset(self, life: int) -> None:
        self.told.append("reset")

    def close(self) -> None:
        """Nothing to release."""


class KernelEngine:
    """An attend phase that looks at what it is given."""

    bank_bytes = 64
    own_at: Mapping[str, int] = {"x": 0}
    sends = ((1, 0),)

    def run(self, out: torch.Tensor, access: Any, epoch: int, mask: torch.Tensor | None) -> None:
        """Nothing."""


def heap_of(side: CpuSide) -> Segment:
    segment = side._segments[0]
    assert segment is not None
    return segment


def test_a_heap_is_made_outgrown_and_given_back() -> None:
    world = World()
    side = CpuSide(world)
    assert side.size is None and side.device == torch.device("cpu") and side.domains == (0, 0)
    small = side.room([GATHER], [None])
    side.make_heap(small, 0)
    large = small.grown(HeapSize(9, 0))
    side.make_heap(large, 4)
    assert side.size == large and world.told == ["new heap", "new heap"]
    assert heap_of(side).done == 4, "what was read on the old heap is read"
    heap = heap_of(side)
    side.close(failed=False)
    assert side.size is None and heap.left == "its script ended"


def test_a_heap_may_be_made_in_inference_mode() -> None:
    side = CpuSide(World())
    with torch.inference_mode():
        side.make_heap(side.room([GATHER], [None]), 0)
    heap_of(side).chunk(0, 0, (4,), torch.float32).fill_(1.0)


def test_a_restart_connects_anew_and_forgets_the_notice() -> None:
    world = World()
    side = CpuSide(world)
    side.restart(0, 1)
    assert world.told == ["reset"] and side.size is None
    side.make_heap(side.room([GATHER], [None]), 0)
    side.abort("rank 0: it broke")
    assert heap_of(side).aborted == "rank 0: it broke"
    side.restart(6, 2)
    assert heap_of(side).aborted is None and heap_of(side).done == 6
    assert world.told == ["reset", "new heap", "reset", "new heap"]


def test_wires_follow_the_options() -> None:
    """For the executor, and for kernels that look at the heaps: both wait as long as the options say now."""
    world = World()
    side = CpuSide(world)
    side.rewire(1.0)  # nothing to make anew yet
    side.make_heap(side.room([GATHER], [None]), 0)
    before = heap_of(side)
    side.open(SiteCall(0, 0, 0, GATHER, 1), KernelEngine())
    world.timeout_s = 0.3
    side.rewire(0.3)
    assert heap_of(side) is before and world.told == ["new heap"]
    run = side.open(SiteCall(0, 0, 0, GATHER, 2), KernelEngine())
    with pytest.raises(RuntimeTimeoutError, match=r"waited 0\.3 s for a chunk from rank 1"):
        run._transport.wait(1, 0, 2)
    assert run._kernel is not None
    with pytest.raises(RuntimeTimeoutError, match=r"waited 0\.3 s for its bank to be free"):
        run._kernel[1].await_banks(KernelEngine.sends, 3)


def test_kernels_need_heaps_in_reach() -> None:
    side = CpuSide(World(stores=False))
    side.make_heap(side.room([GATHER], [None]), 0)
    with pytest.raises(UnsupportedError, match="transport='c10d'"):
        side.open(SiteCall(0, 0, 0, GATHER, 1), KernelEngine())
    side.open(SiteCall(0, 0, 0, GATHER, 1), None)
