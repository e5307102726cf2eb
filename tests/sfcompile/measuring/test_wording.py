"""Constants for people."""

from __future__ import annotations

from sfcompile.measuring.wording import in_a_line, table
from sfcompile.runtime.program.topology import Topology

CONSTANTS = {"network_bytes_per_s": 98e6 / 8, "network_latency_s": 4e-4, "flops_per_s": 5.1e10}


def test_a_line_says_links_in_bits_and_how_sure_they_are() -> None:
    line = in_a_line(Topology.grid(2, 2, **CONSTANTS), 0.07)
    assert line.startswith("98 Mbit/s a machine (+-7%), 0.4 ms; inside a machine 5 GB/s, 50 us; compute 51 GFLOP/s")
    assert "98 Mbit/s a machine, 0.4 ms" in in_a_line(Topology.grid(2, 2, **CONSTANTS))


def test_a_line_leaves_out_links_that_are_not_there() -> None:
    assert "a machine" not in in_a_line(Topology.grid(2, 1)).partition("ms;")[2]
    assert in_a_line(Topology.grid(1, 2)).startswith("inside a machine 5 GB/s")


def test_all_cards_of_a_machine_count() -> None:
    line = in_a_line(Topology.grid(2, 4, network_bytes_per_s=1.25e9, nics_per_machine=4, flops_per_s=2e14))
    assert line.startswith("40 Gbit/s a machine") and "200 TFLOP/s of matmul" in line


def test_the_table_has_links_between_machines_if_there_are_any() -> None:
    assert "between" in table(Topology.grid(2, 1)) and "between" not in table(Topology.grid(1, 2))
