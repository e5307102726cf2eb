"""All-gathered keys and values: queries stay, each chunk crosses to a machine once."""

from __future__ import annotations

from dataclasses import replace

from random_sites import attention_site

from sfcompile.codegen.schedule.allgather import build_allgather
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.runtime.program.topology import Topology


def test_queries_and_outputs_stay_at_home() -> None:
    schedule = build_allgather(attention_site(4), Mesh.of(Topology.grid(2, 2), 2, 2))
    assert schedule.origin.phases["put_q"] == schedule.origin.phases["collect"] == ()
    assert {arrival.tensor for arrival in schedule.origin.arrivals} == {"k", "v"}
    assert schedule.heads(3) == (0, 4)


def test_a_chunk_crosses_to_each_machine_once() -> None:
    """Grouped heads make K and V small: (N-1) copies of both cross, whatever the ranks per machine."""
    machines, inside, tokens, dim = 3, 4, 48, 8
    topology = Topology.grid(machines, inside)
    site = replace(attention_site(12, heads=8, tokens=tokens, head_dim=dim), kv_heads=2)
    across = build_allgather(site, Mesh.of(topology, machines, inside)).bytes_by_link(topology)[1]
    assert across == 2 * (machines - 1) * tokens * 2 * dim * 4


def test_more_ranks_than_heads_are_fine() -> None:
    assert build_allgather(attention_site(4, heads=1), Mesh.of(Topology.grid(4, 1), 4, 1)).heads(2) == (0, 1)
