"""The schedule object: one origin, every rank's program, bytes."""

from __future__ import annotations

from random_sites import attention_site

from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import lay_out
from sfcompile.codegen.schedule.torus import build_torus
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


def test_it_prints_for_people() -> None:
    text = str(build_torus(attention_site(4), Mesh.of(Topology.grid(2, 2), 2, 2)))
    assert text.startswith("torus ulysses 2 x ring 2 of site: 8 slots, ")
    assert "  attend          attend Q (+1,+0) x KV here (+0,+1)" in text.splitlines()
    assert "  collect         wait o(1) from (+1,+0)" in text.splitlines()
