"""Topologies: who shares a machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sfcompile.errors import TopologyError
from sfcompile.runtime.program.topology import Topology


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
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(TopologyError, match="cannot be read.*presets: a100-efa"):
        Topology.parse(text)


def test_presets_set_the_constants() -> None:
    topology = Topology.parse("4x8:a100-efa")
    assert topology.num_ranks == 32 and topology.nics_per_machine == 4
    assert topology.flops_per_s > 1e14 and topology.copy_bytes_per_s is None
    assert len(set(topology.nic_of())) == 16
    assert Topology.parse("2x2:cpu") == Topology.grid(2, 2)


def test_cards_are_dealt_in_groups() -> None:
    topology = Topology.grid(2, 3, nics_per_machine=2)
    assert topology.nic_of() == (0, 0, 1, 2, 2, 3)


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    topology = Topology.grid(2, 2, network_bytes_per_s=2.5e7, copy_bytes_per_s=None)
    path = tmp_path / "cluster.toml"
    path.write_text(topology.to_toml())
    assert Topology.parse(str(path)) == topology
    assert Topology.parse(f"3x4:{path}") == replace(topology, machine_of=Topology.grid(3, 4).machine_of)


def test_a_file_may_start_from_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text('preset = "h100-ib"\nmachines = 2\nranks_per_machine = 8\nnetwork_bytes_per_s = 1e9\n')
    topology = Topology.parse(str(path))
    assert (topology.num_ranks, topology.network_bytes_per_s, topology.nics_per_machine) == (16, 1e9, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("machines = 2\n", "does not say which ranks"),
        ("machines = 2\nranks_per_machine = 1\nbandwidth = 3\n", "sets 'bandwidth', which is no constant"),
        ("machines = 2\nranks_per_machine = 1\nflops_per_s = -1\n", "flops_per_s = -1"),
        ("machines = [", "cannot be read"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(TopologyError, match=message):
        Topology.parse(str(path))


def test_unknown_presets_are_listed() -> None:
    with pytest.raises(TopologyError, match="preset 'b300' is unknown.*a100-efa, a100-paper, h100-ib"):
        Topology.parse("2x8:b300")
    with pytest.raises(TopologyError, match="topology file gone.toml cannot be read"):
        Topology.parse("gone.toml")


def test_a_subset_keeps_the_hardware() -> None:
    topology = Topology.parse("2x2:h100-ib").subset((2, 3))
    assert topology.machine_of == (1, 1) and topology.nics_per_machine == 8
