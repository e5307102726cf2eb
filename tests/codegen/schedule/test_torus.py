"""Torus Attention: the order of stages. What it computes is tests/runtime's matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
from random_sites import attention_site

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.schedule.torus import build_torus
from sfcompile.runtime.program.instructions import Attend, Forward, Push, Wait
from sfcompile.runtime.program.topology import Topology


def torus(machines: int, ring: int, heads: int = 8, q_parts: int = 1, kv_parts: int = 1) -> Schedule:
    """Ulysses across machines, ring inside."""
    mesh = Mesh.of(Topology.grid(machines, ring), machines, ring)
    return build_torus(attention_site(machines * ring, heads), mesh, q_parts, kv_parts)


def test_stages_of_three_groups() -> None:
    """Method section 2 on rank 0 of U = 3: stationary, pull Q, pull KV, push O."""
    steps = torus(3, 1, heads=3).program(0).phases["attend"]
    calls = [([c.src for c in s.q], [c.src for c in s.kv]) for s in steps if isinstance(s, Attend)]
    assert calls == [
        ([0], [0]),  # stationary
        ([1], [0]), ([2], [0]),  # each Q as it lands, against the stationary KV
        ([0, 1, 2], [1]),  # all Q against the next KV
        ([1], [2]), ([2], [2]), ([0], [2]),  # last KV: remote outputs first, the stationary one last
    ]  # fmt: skip
    pushes = [i for i, step in enumerate(steps) if isinstance(step, Push)]
    assert [steps[i].q.src for i in pushes] == [1, 2]  # type: ignore[union-attr]
    assert all(isinstance(steps[i - 1], Attend) and steps[i - 1].kv[0].src == 2 for i in pushes)  # type: ignore[union-attr]
    assert isinstance(steps[0], Attend) and isinstance(steps[-1], Attend)


def test_the_stationary_chunk_waits_for_nobody() -> None:
    for rank in range(8):
        assert isinstance(torus(4, 2).program(rank).phases["attend"][0], Attend)


def test_a_ring_chunk_is_sent_on_before_it_is_attended() -> None:
    schedule = torus(1, 3)
    steps = schedule.program(1).phases["attend"]
    for i, step in enumerate(steps):
        if isinstance(step, Forward):
            assert step.dst == 2 and isinstance(steps[i - 1], Wait) and steps[i - 1].slot == step.slot  # type: ignore[union-attr]
            assert not any(isinstance(s, Attend) and step.slot in (*s.k_slots, *s.v_slots) for s in steps[:i])
    # Chunk 1 of the ring passes rank 2 and ends at rank 0: ring - 1 hops, never back to its owner.
    hops = [s for rank in range(3) for s in schedule.program(rank).phases["attend"] if isinstance(s, Forward)]
    assert len(hops) == 2 * 3 * (3 - 2)


def test_who_is_visited_first_is_sent_to_first() -> None:
    """The first put of every rank goes to the rank that waits for it first, and every pair is used evenly."""
    schedule = torus(4, 1)
    for stage in range(3):
        targets = [schedule.program(rank).phases["put_q"][stage].dst for rank in range(4)]  # type: ignore[union-attr]
        assert sorted(targets) == [0, 1, 2, 3]
    put = schedule.program(2).phases["put_k"][0]
    first = next(s for s in schedule.program(put.dst).phases["attend"] if isinstance(s, Wait) and s.slot == put.slot)  # type: ignore[union-attr]
    waits = [s for s in schedule.program(put.dst).phases["attend"] if isinstance(s, Wait)]  # type: ignore[union-attr]
    names = [schedule.slots[s.slot].name for s in waits]
    assert first.src == 2 and names.index(schedule.slots[first.slot].name) == names.index("k(1,0)")


def test_pieces_of_queries_leave_one_by_one() -> None:
    steps = torus(2, 1, q_parts=2, kv_parts=3).program(0).phases["attend"]
    last = [str(s) for s in steps if isinstance(s, Push | Attend)][-5:]
    assert [text.split()[0] for text in last] == ["attend", "push", "attend", "push", "attend"]


def test_groups_of_one_machine_are_visited_together() -> None:
    """Lanes: one call per machine and not per group; the way home inside the machine goes last."""
    mesh = Mesh.of(Topology.grid(3, 2), 6, 1, lanes=2)
    steps = build_torus(attention_site(6, heads=6), mesh).program(0).phases["attend"]
    calls = [({c.src for c in s.q}, {c.src for c in s.kv}) for s in steps if isinstance(s, Attend)]
    assert calls == [
        ({0, 1}, {0, 1}),
        ({2, 3}, {0, 1}), ({4, 5}, {0, 1}),
        ({0, 1, 2, 3, 4, 5}, {2, 3}),
        ({2, 3}, {4, 5}), ({4, 5}, {4, 5}), ({0, 1}, {4, 5}),
    ]  # fmt: skip
    assert [step.q.src for step in steps if isinstance(step, Push)] == [2, 3, 4, 5, 1]


@pytest.mark.parametrize(("machines", "inside", "lanes"), [(3, 1, 1), (2, 2, 2), (2, 2, 1)])
@pytest.mark.parametrize("parts", [2, 3])
def test_tokens_in_parts_are_attended_as_they_come(machines: int, inside: int, lanes: int, parts: int) -> None:
    ulysses = machines * (inside if lanes > 1 else 1)
    mesh = Mesh.of(Topology.grid(machines, inside), ulysses, machines * inside // ulysses, "ulysses", lanes)
    site = replace(attention_site(machines * inside, 12), parts=parts)
    schedule = build_torus(site, mesh, parts, parts)
    check(schedule)
    near = set(range(lanes if lanes > 1 else 1))
    steps = schedule.origin.phases["attend"]
    calls = [s for s in steps if isinstance(s, Attend)]
    # Queries of a part are not waited for before keys of that part, and outputs of the first parts leave before the
    # last part's queries have come.
    arrivals = {a.slot: a for a in schedule.origin.arrivals}
    waits = [arrivals[s.slot] for s in steps if isinstance(s, Wait) and mesh.step(arrivals[s.slot].src)[0] not in near]
    order = [(a.chunk.part, a.tensor == "q") for a in waits]
    assert order == sorted(order)
    last_query = max(i for i, s in enumerate(steps) if isinstance(s, Wait) and arrivals[s.slot].tensor == "q")
    early = [s for s in steps[:last_query] if isinstance(s, Push) and mesh.step(s.q.src)[0] not in near]
    assert {s.q.part for s in early} >= set(range(parts - 1))
    assert len({(q, kv) for call in calls for q in call.q for kv in call.kv}) == sum(
        len(call.q) * len(call.kv) for call in calls
    )
