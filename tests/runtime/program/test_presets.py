"""Presets: each makes a topology whose constants make sense."""

from __future__ import annotations

import pytest

from sfcompile.runtime.program.presets import PRESETS, SOFTWARE
from sfcompile.runtime.program.topology import Topology


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_a_topology(name: str) -> None:
    topology = Topology.parse(f"2x8:{name}")
    assert topology.num_machines == 2
    network = topology.network_bytes_per_s * topology.nics_per_machine / 8
    assert topology.local_bytes_per_s > network, "ranks of one machine are closer than machines"
    assert 0 < topology.two_sided_rate <= 1 and 0 <= topology.slowdown < 1


@pytest.mark.parametrize("name", SOFTWARE)
def test_assumed_costs_lie_in_their_range(name: str) -> None:
    for cost, assumed in SOFTWARE[name].items():
        low, high = sorted((assumed.low, assumed.high))
        assert low <= assumed.value <= high, cost


def test_the_papers_software_is_in_no_other_preset() -> None:
    """What was fitted to somebody's table says nothing of our kernels."""
    paper = Topology.parse("1x8:a100-paper")
    assert paper.software == ""
    for name in PRESETS:
        topology = Topology.parse(f"1x8:{name}")
        if name not in ("a100-paper", "cpu"):
            assert topology.software == "nvshmem" and topology.message_s < paper.message_s / 10


def test_who_measures_no_longer_assumes() -> None:
    topology = Topology.parse("1x8:h100-ib")
    assert topology.with_constants({"message_s": 3e-6}).software == ""
    assert topology.with_constants({"flops_per_s": 1e14}).software == "nvshmem"
    assert topology.subset((0, 1)).software == "nvshmem"
