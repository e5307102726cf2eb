"""What all attention schedules share: chunks, slots, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from random_sites import attention_site

from sfcompile.codegen.schedule.chunk_flow import ChunkFlow
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.torus import build_torus
from sfcompile.errors import MeshError, OptionError
from sfcompile.runtime.program.topology import Topology


def grid(machines: int, ring: int) -> Mesh:
    return Mesh.of(Topology.grid(machines, ring), machines, ring)


def test_heads_that_do_not_divide_are_split_unevenly() -> None:
    schedule = build_torus(attention_site(3, heads=7), grid(3, 1))
    assert [schedule.heads(rank) for rank in range(3)] == [(0, 3), (3, 5), (5, 7)]


def test_grouped_heads_send_only_the_key_heads_they_need() -> None:
    schedule = build_torus(replace(attention_site(4, heads=8), kv_heads=2), grid(4, 1))
    keys = [arrival for arrival in schedule.program(3).arrivals if arrival.tensor == "k"]
    assert {schedule.shape(3, arrival)[1] for arrival in keys} == {1}
    assert [schedule.kv_heads(rank) for rank in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]


def test_every_chunk_has_a_slot_of_its_own() -> None:
    flow = ChunkFlow(attention_site(6), grid(3, 2), q_parts=2, kv_parts=3)
    schedule = flow.schedule("none", [])
    assert len(schedule.slots) == 2 * 2 + 2 * 5 * 3 + 2 * 2
    assert len({slot.name for slot in schedule.slots}) == len(schedule.slots)
    assert {arrival.slot for arrival in schedule.origin.arrivals} == set(range(len(schedule.slots)))


def test_more_ulysses_ranks_than_heads_is_refused() -> None:
    with pytest.raises(MeshError, match="site has 3 heads for 4 Ulysses ranks.*Use ulysses <= 3"):
        ChunkFlow(attention_site(4, heads=3), grid(4, 1))


def test_less_than_a_piece_is_refused() -> None:
    with pytest.raises(OptionError, match="0 Q and 1 KV parts"):
        ChunkFlow(attention_site(2), grid(2, 1), q_parts=0)
