"""Topologies: who shares a machine."""

from __future__ import annotations

import pytest

from sfcompile.errors import TopologyError
from sfcompile.runtime.topology import Topology


def test_grid() -> None:
    topology = Topology.grid(2, 3)
    assert topology.machine_of == (0, 0, 0, 1, 1, 1)
    assert (topology.num_ranks, topology.num_machines) == (6, 2)
    assert topology.ranks_of(1) == (3, 4, 5)
    assert topology.same_machine(3, 5) and not topology.same_machine(2, 3)


def test_parse() -> None:
    assert Topology.parse("2x4") == Topology.grid(2, 4)
    assert hash(Topology.parse("2x4")) == hash(Topology.grid(2, 4))


@pytest.mark.parametrize("text", ["p4d", "cluster.yaml", "0x4", "2x", "2x4x8", "", "-1x2"])
def test_what_is_not_known_yet_is_refused(text: str) -> None:
    with pytest.raises(TopologyError, match="arrive with the cost model"):
        Topology.parse(text)
