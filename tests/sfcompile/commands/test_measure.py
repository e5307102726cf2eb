"""The command that measures on real ranks, and writes a file that reads back."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sfcompile.commands.launch import launch
from sfcompile.measuring.wording import table
from sfcompile.runtime.program.topology import Topology

pytestmark = pytest.mark.ranks


@pytest.mark.thorough  # `sfcompile doctor --measure` runs in tests/examples/test_docs.py
@pytest.mark.parametrize(("ranks", "machines"), [(2, 1), (2, 2)])
def test_ranks_measure_themselves(tmp_path: Path, ranks: int, machines: int) -> None:
    path = tmp_path / "cluster.toml"
    assert launch(["-m", "sfcompile.commands.measure", "--out", str(path)], ranks, machines, timeout_s=120) == 0
    topology = Topology.parse(str(path))
    assert (topology.num_ranks, topology.num_machines) == (ranks, machines)
    assert topology.flops_per_s > 1e8 and topology.copy_bytes_per_s is not None and topology.copy_bytes_per_s > 1e7
    assert ("between" in table(topology)) == (machines > 1)
    rates = (topology.network_bytes_per_s, topology.memory_bytes_per_s, topology.local_bytes_per_s)
    assert all(rate > 1e5 for rate in rates) and all(a >= 0 for a in itertools.islice(rates, 1))
