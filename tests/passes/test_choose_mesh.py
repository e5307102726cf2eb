from __future__ import annotations

import pytest
import torch
from helpers import captured
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sfcompile.errors import MeshError
from sfcompile.passes.analyse_attention import Site, analyse_attention
from sfcompile.passes.choose_mesh import choose_mesh
from sfcompile.runtime.topology import Topology


def sites(*heads: int) -> list[Site]:
    args = [torch.zeros(1, count, 5, 4) for count in heads]
    return analyse_attention(captured(lambda *xs: [sdpa(x, x, x) for x in xs], *args).gm.graph)


@pytest.mark.parametrize(
    ("heads", "machines", "ranks", "ulysses"),
    [((24,), 4, 8, 8), ((24,), 3, 8, 24), ((4,), 1, 3, 1), ((4,), 1, 6, 2), ((24, 16), 4, 8, 8), ((30,), 1, 4, 2)],
)
def test_largest_ulysses_degree_that_divides_the_heads(
    heads: tuple[int, ...], machines: int, ranks: int, ulysses: int
) -> None:
    mesh = choose_mesh(sites(*heads), Topology.grid(machines, ranks), None)
    assert (mesh.ulysses, mesh.ring) == (ulysses, machines * ranks // ulysses)


def test_ulysses_crosses_machines_first() -> None:
    mesh = choose_mesh(sites(2), Topology((0, 1, 0, 1)), None)
    assert [mesh.rank_at(0, r) for r in range(2)] == [0, 2], "the ring stays inside machine 0"


def test_a_mesh_asked_for_is_taken_or_refused() -> None:
    assert choose_mesh(sites(4), Topology.grid(1, 3), {"ulysses": 3, "ring": 1}).ulysses == 3
    with pytest.raises(MeshError, match="has 4 heads"):
        choose_mesh(sites(4), Topology.grid(1, 8), {"ulysses": 8, "ring": 1})
    with pytest.raises(MeshError, match="there are 4"):
        choose_mesh(sites(4), Topology.grid(1, 4), {"ulysses": 2, "ring": 1})


def test_no_attention_needs_no_ulysses() -> None:
    assert choose_mesh([], Topology.grid(2, 2), None).ulysses == 1
