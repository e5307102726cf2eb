"""Measuring: on real ranks, through the runtime, into a file that reads back."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sfcompile.codegen.proof.checker import check
from sfcompile.commands.launch import launch
from sfcompile.commands.measure import SIZES, _line, shift, table
from sfcompile.runtime.program.topology import Topology

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("across", [False, True])
def test_a_shift_crosses_machines_or_does_not(across: bool) -> None:
    topology = Topology.grid(3, 2)
    schedule = shift(topology, across, 8)
    check(schedule)
    for rank, program in ((rank, schedule.program(rank)) for rank in range(6)):
        (arrival,) = program.arrivals
        assert topology.same_machine(rank, arrival.src) != across and arrival.src != rank


def test_a_line_through_times() -> None:
    times = [2e-3 + 4.0 * size / 1e9 for size in SIZES]
    start, slope = _line(times)
    assert start == pytest.approx(2e-3) and 1.0 / slope == pytest.approx(1e9)


@pytest.mark.parametrize(("ranks", "machines"), [pytest.param(2, 1, marks=pytest.mark.thorough), (2, 2)])
def test_ranks_measure_themselves(tmp_path: Path, ranks: int, machines: int) -> None:
    path = tmp_path / "cluster.toml"
    assert launch(["-m", "sfcompile.commands.measure", "--out", str(path)], ranks, machines, timeout_s=120) == 0
    topology = Topology.parse(str(path))
    assert (topology.num_ranks, topology.num_machines) == (ranks, machines)
    assert topology.flops_per_s > 1e8 and topology.copy_bytes_per_s is not None and topology.copy_bytes_per_s > 1e7
    assert ("between" in table(topology)) == (machines > 1)
    rates = (topology.network_bytes_per_s, topology.memory_bytes_per_s, topology.local_bytes_per_s)
    assert all(rate > 1e5 for rate in rates) and all(a >= 0 for a in itertools.islice(rates, 1))
