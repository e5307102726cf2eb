"""Presets: each makes a topology whose constants make sense."""

from __future__ import annotations

import pytest

from sfcompile.runtime.program.presets import PRESETS
from sfcompile.runtime.program.topology import Topology


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_a_topology(name: str) -> None:
    topology = Topology.parse(f"2x8:{name}")
    assert topology.num_machines == 2
    network = topology.network_bytes_per_s * topology.nics_per_machine / 8
    assert topology.local_bytes_per_s > network, "ranks of one machine are closer than machines"
    assert 0 < topology.two_sided_rate <= 1 and 0 <= topology.slowdown < 1
