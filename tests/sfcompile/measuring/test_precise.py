"""The slow measuring: sizes, and every constant on ranks that are threads."""

from __future__ import annotations

import pytest
from threads import run_threads

from sfcompile.measuring import precise
from sfcompile.measuring.shifts import shift
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import current_session


def test_all_ranks_come_to_the_same_constants() -> None:
    def work(rank: int) -> Topology:
        said: list[str] = []
        topology = precise.measure(current_session(), said.append)
        assert said == ["compute: matmul, attention, pointwise ops", "messages inside machines"]
        return topology

    first, second = run_threads(2, work)
    assert first == second
    assert first.flops_per_s > 1e6 and first.copy_bytes_per_s is not None and first.local_latency_s > 0.0


def test_two_machines_of_two_ranks() -> None:
    def work(rank: int) -> Topology:
        return precise.measure(current_session())

    everyone = run_threads(4, work, (0, 0, 1, 1))
    assert all(topology == everyone[0] for topology in everyone)
    assert everyone[0].network_bytes_per_s > 1e5 and everyone[0].network_latency_s > 0.0


def test_messages_double_to_four_megabytes() -> None:
    assert precise.SIZES[-1] * 4 == 4 << 20 and list(precise.SIZES) == sorted(precise.SIZES)


@pytest.mark.parametrize(
    ("machine_of", "messages"),
    [((0, 0, 1, 1), 2), ((0, 1), 1), ((0, 0, 0, 1), 1), ((0, 0, 1), 1), ((0, 0, 0, 1, 1), 2)],
)
def test_the_messages_that_share_a_link(machine_of: tuple[int, ...], messages: int) -> None:
    """On machines of unequal numbers of ranks some send nothing: a link carries less than ranks a machine."""
    topology = Topology(machine_of)
    assert precise.messages_of_a_machine(shift(topology, True, 16), topology) == messages
