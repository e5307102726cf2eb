"""The schedule object: one origin, every rank's program, chunks, bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from random_sites import attention_site, random_case

from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import lay_out
from sfcompile.codegen.schedule.torus import build_torus
from sfcompile.runtime.program.instructions import Chunk
from sfcompile.runtime.program.topology import Topology


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


@pytest.mark.parametrize("seed", range(12))
def test_chunks_of_all_ranks_at_once_are_those_of_each_rank(seed: int) -> None:
    schedule = random_case(seed).schedule()
    width = schedule.site.dtype.itemsize
    for rank in range(schedule.mesh.num_ranks):
        program = schedule.program(rank)
        for arrival, general in zip(program.arrivals, schedule.origin.arrivals, strict=True):
            size = math.prod(schedule.shape(rank, arrival)) * width
            assert size == schedule.arrival_bytes(general)[rank]
            assert size <= schedule.slots[arrival.slot].nbytes
            assert schedule.slots[arrival.slot].offset + size <= schedule.heap_bytes
    assert schedule.program(0) is schedule.program(0)


def test_pieces_cover_the_tokens_of_a_rank() -> None:
    schedule = build_torus(attention_site(2, tokens=21), Mesh.of(Topology.grid(2, 1), 2, 1), 3, 2)
    assert [schedule.rows("q", Chunk(1, p)) for p in range(3)] == [(0, 4), (4, 8), (8, 11)]
    assert [schedule.positions("k", Chunk(1, p)) for p in range(2)] == [((10, 6),), ((16, 5),)]
    assert np.array_equal(schedule.row_counts("o", 2), [3, 3])


def test_it_prints_for_people() -> None:
    text = str(build_torus(attention_site(4), Mesh.of(Topology.grid(2, 2), 2, 2)))
    assert text.startswith("torus ulysses 2 x ring 2 of site: 8 slots, ")
    assert "  attend        attend Q (+1,+0) x KV here (+0,+1)" in text.splitlines()
    assert "  collect       wait o(1) from (+1,+0)" in text.splitlines()
