"""The mesh and the schedule object."""

from __future__ import annotations

import pytest
from random_sites import attention_site, random_case

from sfcompile.codegen.schedule import Mesh, lay_out, slice_of
from sfcompile.codegen.schedule_torus import build_torus
from sfcompile.errors import MeshError
from sfcompile.runtime.topology import Topology


def test_ulysses_crosses_machines_and_the_ring_stays_inside() -> None:
    topology = Topology((0, 1, 0, 1, 2, 2))
    mesh = Mesh.of(topology, 3, 2)
    assert mesh.order == (0, 2, 1, 3, 4, 5)
    for u in range(3):
        assert len({topology.machine_of[mesh.rank_at(u, r)] for r in range(2)}) == 1
    assert [mesh.place(rank) for rank in mesh.order] == [(u, r) for u in range(3) for r in range(2)]
    assert mesh.rank_at(4, -1) == mesh.rank_at(1, 1)


def test_a_mesh_has_every_rank_once() -> None:
    with pytest.raises(MeshError, match="2 x ring 2 = 4 ranks, but there are 6"):
        Mesh.of(Topology.grid(2, 3), 2, 2)


@pytest.mark.parametrize(("total", "parts"), [(8, 4), (7, 3), (2, 5), (0, 2)])
def test_slices_are_even_and_cover(total: int, parts: int) -> None:
    slices = [slice_of(total, parts, index) for index in range(parts)]
    assert slices[0][0] == 0 and slices[-1][1] == total
    assert all(left[1] == right[0] for left, right in zip(slices, slices[1:], strict=False))
    sizes = [stop - start for start, stop in slices]
    assert max(sizes) - min(sizes) <= 1


def test_slots_are_aligned_and_apart() -> None:
    slots = lay_out([("a", 3), ("b", 64), ("c", 0), ("d", 65)])
    assert [slot.offset for slot in slots] == [0, 64, 128, 128]
    assert all(slot.offset % 64 == 0 for slot in slots)


def test_bytes_by_link_of_ulysses_across_machines() -> None:
    """Method section 1: per rank 4 (N-1)/N * B L H D / P elements cross machines, and nothing else does."""
    machines, ring, heads, tokens, dim = 4, 2, 8, 64, 16
    topology = Topology.grid(machines, ring)
    site = attention_site(machines * ring, heads, tokens, dim)
    inside, across = build_torus(site, Mesh.of(topology, machines, ring)).bytes_by_link(topology)
    assert across == 4 * (machines - 1) * tokens * heads * dim // machines * 4
    # Every K and V chunk of a head slice makes ring - 1 hops, in every group.
    assert inside == 2 * (ring - 1) * tokens * heads * dim * 4


@pytest.mark.parametrize("seed", range(6))
def test_heap_holds_every_chunk(seed: int) -> None:
    case = random_case(seed)
    schedule = build_torus(case.site, case.mesh)
    for rank in range(case.mesh.num_ranks):
        for arrival in schedule.program(rank).arrivals:
            elements = 1
            for size in arrival.shape:
                elements *= size
            assert schedule.slots[arrival.slot].offset + elements * 4 <= schedule.heap_bytes
    assert schedule.program(0) is schedule.program(0)


def test_it_prints_for_people() -> None:
    text = str(build_torus(attention_site(4), Mesh.of(Topology.grid(2, 2), 2, 2)))
    assert text.startswith("torus site: ulysses 2 x ring 2, ")
    for line in ("rank 3", "put q[h2:4] -> rank 2", "attend Q0 x KV0", "push O -> rank 2", "forward slot"):
        assert line in text
