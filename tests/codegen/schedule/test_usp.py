"""Unstaged schedules: everything is waited for, computed, sent; the ring overlaps."""

from __future__ import annotations

from random_sites import attention_site

from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.usp import build_usp
from sfcompile.runtime.program.instructions import Attend, Push, Wait
from sfcompile.runtime.program.topology import Topology


def test_ulysses_is_one_call_between_two_all_to_alls() -> None:
    steps = build_usp(attention_site(4), Mesh.of(Topology.grid(4, 1), 4, 1)).program(1).phases["attend"]
    kinds = [type(step) for step in steps]
    assert kinds == [Wait] * 9 + [Attend] + [Push] * 3


def test_ring_attends_hop_by_hop() -> None:
    steps = build_usp(attention_site(3), Mesh.of(Topology.grid(1, 3), 1, 3)).program(0).phases["attend"]
    calls = [step for step in steps if isinstance(step, Attend)]
    assert [[c.src for c in call.kv] for call in calls] == [[0], [2], [1]]
    assert isinstance(steps[0], Attend)


def test_usp_moves_the_same_bytes_as_its_formula() -> None:
    """Method section 1: 2 (N-1) B L H D / P elements per rank cross machines when the ring does."""
    machines, inside, heads, tokens, dim = 3, 2, 4, 60, 8
    topology = Topology.grid(machines, inside)
    mesh = Mesh.of(topology, inside, machines, across="ring")
    across = build_usp(attention_site(6, heads, tokens, dim), mesh).bytes_by_link(topology)[1]
    assert across == 2 * (machines - 1) * tokens * heads * dim * 4
