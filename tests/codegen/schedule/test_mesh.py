"""The mesh: how it lies on machines, and arithmetic of steps."""

from __future__ import annotations

import itertools

import pytest

from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.errors import MeshError
from sfcompile.runtime.program.topology import Topology


def test_ulysses_crosses_machines_and_the_ring_stays_inside() -> None:
    topology = Topology((0, 1, 0, 1, 2, 2))
    mesh = Mesh.of(topology, 3, 2)
    assert mesh.order == (0, 2, 1, 3, 4, 5)
    for u in range(3):
        assert len({topology.machine_of[mesh.rank_at(u, r)] for r in range(2)}) == 1
    assert [mesh.place(rank) for rank in mesh.order] == [(u, r) for u in range(3) for r in range(2)]
    assert mesh.rank_at(4, -1) == mesh.rank_at(1, 1)


def test_usp_puts_the_ring_across_and_ulysses_inside() -> None:
    topology = Topology.grid(3, 2)
    mesh = Mesh.of(topology, 2, 3, across="ring")
    for r in range(3):
        assert len({topology.machine_of[mesh.rank_at(u, r)] for u in range(2)}) == 1
    for u in range(2):
        assert len({topology.machine_of[mesh.rank_at(u, r)] for r in range(3)}) == 3


def test_a_mesh_has_every_rank_once() -> None:
    with pytest.raises(MeshError, match="2 x ring 2 = 4 ranks in bundles of 1, but there are 6"):
        Mesh.of(Topology.grid(2, 3), 2, 2)


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_offsets_form_a_group(lanes: int) -> None:
    mesh = Mesh.of(Topology.grid(4, 2), 4, 2, "ring", lanes)
    for first, second in itertools.product(range(8), repeat=2):
        both = mesh.add(first, second)
        assert mesh.add(first, mesh.back(first)) == 0
        for rank in range(8):
            one_by_one = mesh.rank_after(mesh.rank_after(rank, first), second)
            assert one_by_one == mesh.rank_after(rank, both) == mesh.ranks_after(both)[rank]
    assert [mesh.offset(*mesh.step(offset)) for offset in range(8)] == list(range(8))


def test_bundles_are_the_groups_of_a_machine() -> None:
    """Steps between bundles always cross machines; steps inside a bundle never do."""
    topology = Topology.grid(3, 4)
    mesh = Mesh.of(topology, 12, 1, lanes=4)
    for rank, offset in itertools.product(range(12), range(1, 12)):
        crosses = not topology.same_machine(rank, mesh.rank_after(rank, offset))
        assert crosses == (offset >= 4)


def test_lanes_divide_the_groups() -> None:
    with pytest.raises(MeshError, match="bundles of 3"):
        Mesh.of(Topology.grid(2, 2), 4, 1, lanes=3)
