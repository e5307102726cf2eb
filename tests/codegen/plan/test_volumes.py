"""Closed forms equal what schedules really send, and the paper's formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp
from random_sites import attention_site

from sfcompile.codegen.plan.volumes import B, D, E, H, K, L, N, across_of, volume, w
from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import ACROSS, Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.options import Wire
from sfcompile.runtime.program.topology import Topology


def schedule_of(kind: str, topology: Topology, ulysses: int, across: str, kv_heads: int, group: int) -> Schedule:
    ranks = topology.num_ranks
    site = replace(
        attention_site(ranks, heads=kv_heads * group, tokens=3 * ranks, head_dim=8), kv_heads=kv_heads, v_head_dim=4
    )
    return build(kind, site, Mesh.of(topology, ulysses, ranks // ulysses, across))


@pytest.mark.parametrize("inside", [1, 2, 4])
@pytest.mark.parametrize("machines", [1, 2, 3, 4])
def test_forms_equal_what_is_sent(machines: int, inside: int) -> None:
    """Every mesh whose outer axis divides the machines or is divided by them, with and without grouped heads."""
    topology = Topology.grid(machines, inside)
    tried = 0
    for ulysses in (u for u in range(1, topology.num_ranks + 1) if topology.num_ranks % u == 0):
        for across in ACROSS:
            outer = ulysses if across == "ulysses" else topology.num_ranks // ulysses
            if outer % machines and machines % outer:
                continue
            for kind in ("torus", "usp"):
                for kv_heads, group in ((ulysses, 1), (ulysses, 2), (2 * ulysses, 1)):
                    schedule = schedule_of(kind, topology, ulysses, across, kv_heads, group)
                    assert volume(schedule, topology).bytes == schedule.bytes_by_link(topology)
                    tried += 1
    schedule = schedule_of("allgather", topology, machines, "ulysses", 2, 3)
    assert volume(schedule, topology).bytes == schedule.bytes_by_link(topology)
    assert tried >= 6


@pytest.mark.parametrize("wire", [Wire(*["bf16"] * 4), Wire(*["fp8"] * 4), Wire(k="fp8", q="bf16", o="bf16")])
@pytest.mark.parametrize("kind", ["torus", "usp", "allgather"])
def test_forms_know_how_chunks_travel(wire: Wire, kind: str) -> None:
    topology = Topology.grid(4, 1)
    plain = schedule_of(kind, topology, 4, "ulysses", 4, 2)
    schedule = build(kind, replace(plain.site, wire=wire), plain.mesh)
    sent = schedule.bytes_by_link(topology)
    assert volume(schedule, topology).bytes == sent
    assert sent[1] < plain.bytes_by_link(topology)[1] and schedule.heap_bytes < plain.heap_bytes


def test_key_heads_shared_by_groups() -> None:
    """More Ulysses groups than key heads: every group still needs one."""
    topology = Topology.grid(4, 1)
    schedule = schedule_of("torus", topology, 4, "ulysses", 2, 4)
    assert volume(schedule, topology).bytes == schedule.bytes_by_link(topology)


def test_groups_side_by_side_send_what_each_sends() -> None:
    """Two groups of a schedule, each on one machine or each across both; a group's own topology counts one of them."""
    schedule = schedule_of("torus", Topology.grid(1, 2), 2, "ulysses", 2, 1)
    one = sum(schedule.bytes_by_link(Topology.grid(1, 2)))
    job = Topology.grid(2, 2)
    assert replace(schedule, groups=((0, 1), (2, 3))).bytes_by_link(job) == (2 * one, 0)
    assert replace(schedule, groups=((0, 2), (1, 3))).bytes_by_link(job) == (0, 2 * one)


def test_the_papers_formulas_come_out() -> None:
    """V_tas = 4 (N-1)/N BLHD, V_usp = 2 (N-1) BLHD elements over all ranks: ratio N / 2."""
    topology = Topology.grid(4, 2)
    plain = {K: H, E: D, w: 1}
    tas = volume(schedule_of("tas", topology, 4, "ulysses", 8, 1), topology).across.subs(plain)
    usp = volume(schedule_of("usp", topology, 2, "ring", 8, 1), topology).across.subs(plain)
    machines = {sp.Symbol("U", positive=True): N, sp.Symbol("R", positive=True): N}
    assert sp.simplify(tas - 4 * (N - 1) / N * B * L * H * D) == 0
    assert sp.simplify(usp.subs(machines) - 2 * (N - 1) * B * L * H * D) == 0


def test_it_prints_symbols_and_numbers() -> None:
    topology = Topology.grid(2, 2)
    text = str(volume(schedule_of("torus", topology, 2, "ulysses", 4, 1), topology))
    assert "between machines  B*L*w*(D + E)*(H + K)*(N - 1)/N = " in text and "N = 2" in text


def test_the_outer_axis_is_read_off_the_mesh() -> None:
    topology = Topology.grid(2, 2)
    assert [across_of(Mesh.of(topology, 2, 2, across)) for across in ACROSS] == list(ACROSS)
