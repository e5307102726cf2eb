"""The schedule of an attention: what chunks are, at one rank and at all."""

from __future__ import annotations

import math

import numpy as np
import pytest
from random_sites import attention_site, random_case

from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.torus import build_torus
from sfcompile.runtime.program.instructions import Chunk
from sfcompile.runtime.program.topology import Topology


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


def test_parts_cover_the_tokens_of_a_rank() -> None:
    schedule = build_torus(attention_site(2, tokens=21), Mesh.of(Topology.grid(2, 1), 2, 1), 3, 2)
    assert [schedule.rows("q", Chunk(1, p)) for p in range(3)] == [(0, 4), (4, 8), (8, 11)]
    assert [schedule.positions("k", Chunk(1, p)) for p in range(2)] == [((10, 6),), ((16, 5),)]
    assert np.array_equal(schedule.row_counts("o", 2), [3, 3])
