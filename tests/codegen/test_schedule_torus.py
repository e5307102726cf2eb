"""Torus Attention: the order of stages, heads, grouped heads, refusals. What it computes is tests/runtime's matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
from random_sites import attention_site

from sfcompile.codegen.schedule import Mesh
from sfcompile.codegen.schedule_torus import build_torus, kv_slice
from sfcompile.errors import MeshError
from sfcompile.runtime.instructions import Attend, Forward, Push, Wait
from sfcompile.runtime.topology import Topology


def test_stages_of_three_groups() -> None:
    """Method section 2 on rank 0 of U = 3: stationary, pull Q, pull KV, push O."""
    schedule = build_torus(attention_site(3, heads=3), Mesh.of(Topology.grid(3, 1), 3, 1))
    steps = schedule.program(0).phases["attend"]
    pairs = [(step.q_src, step.kv_src) for step in steps if isinstance(step, Attend)]
    assert pairs == [
        (0, 0),  # stationary
        (1, 0), (2, 0),  # each Q as it lands, against the stationary KV
        (0, 1), (1, 1), (2, 1),  # all Q against the next KV
        (1, 2), (2, 2), (0, 2),  # last KV: remote outputs first, the stationary one last
    ]  # fmt: skip
    pushes = [i for i, step in enumerate(steps) if isinstance(step, Push)]
    assert [steps[i].q_src for i in pushes] == [1, 2]  # type: ignore[union-attr]
    assert all(isinstance(steps[i - 1], Attend) and steps[i - 1].kv_src == 2 for i in pushes)  # type: ignore[union-attr]
    assert isinstance(steps[0], Attend) and isinstance(steps[-1], Attend)


def test_the_stationary_chunk_waits_for_nobody() -> None:
    schedule = build_torus(attention_site(8), Mesh.of(Topology.grid(4, 2), 4, 2))
    for rank in range(8):
        assert isinstance(schedule.program(rank).phases["attend"][0], Attend)


def test_a_ring_chunk_is_sent_on_before_it_is_attended() -> None:
    schedule = build_torus(attention_site(3), Mesh.of(Topology.grid(1, 3), 1, 3))
    steps = schedule.program(1).phases["attend"]
    for i, step in enumerate(steps):
        if isinstance(step, Forward):
            assert step.dst == 2 and isinstance(steps[i - 1], Wait) and steps[i - 1].slot == step.slot  # type: ignore[union-attr]
            assert not any(isinstance(s, Attend) and step.slot in (s.k_slot, s.v_slot) for s in steps[:i])
    # Chunk 1 of the ring passes rank 2 and ends at rank 0: ring - 1 hops, never back to its owner.
    hops = [s for rank in range(3) for s in schedule.program(rank).phases["attend"] if isinstance(s, Forward)]
    assert len(hops) == 2 * 3 * (3 - 2)


def test_heads_that_do_not_divide_are_split_unevenly() -> None:
    schedule = build_torus(attention_site(3, heads=7), Mesh.of(Topology.grid(3, 1), 3, 1))
    assert schedule.program(0).heads == {0: (0, 3), 1: (3, 5), 2: (5, 7)}


def test_grouped_heads_send_only_the_key_heads_they_need() -> None:
    site = replace(attention_site(4, heads=8), kv_heads=2)
    assert [kv_slice(site, heads) for heads in ((0, 2), (2, 6), (4, 8), (0, 8))] == [(0, 1), (0, 2), (1, 2), (0, 2)]
    schedule = build_torus(site, Mesh.of(Topology.grid(4, 1), 4, 1))
    keys = [arrival for arrival in schedule.program(3).arrivals if schedule.slots[arrival.slot].name.startswith("k.")]
    assert {arrival.shape[1] for arrival in keys} == {1}


def test_every_machine_pair_is_used_evenly_at_every_stage() -> None:
    schedule = build_torus(attention_site(4), Mesh.of(Topology.grid(4, 1), 4, 1))
    for stage in range(3):
        targets = [schedule.program(rank).phases["put_q"][stage].dst for rank in range(4)]  # type: ignore[union-attr]
        assert sorted(targets) == [0, 1, 2, 3]


def test_more_ulysses_ranks_than_heads_is_refused() -> None:
    with pytest.raises(MeshError, match="site has 3 heads for 4 Ulysses ranks.*use ulysses <= 3"):
        build_torus(attention_site(4, heads=3), Mesh.of(Topology.grid(4, 1), 4, 1))
