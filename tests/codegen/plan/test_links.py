"""Ports and cards: a way must be free at both ends, cards are shared, bytes are counted."""

from __future__ import annotations

import numpy as np
import pytest

from sfcompile.codegen.plan.links import Links
from sfcompile.runtime.program.topology import Topology


def test_a_port_carries_one_message_at_a_time() -> None:
    links = Links(Topology.grid(1, 2, local_bytes_per_s=2.0), two_sided=False)
    swap = np.array([1, 0])
    ends = [links.send(np.zeros(2), swap, np.array([4.0, 6.0]))[1].tolist() for _ in range(2)]
    assert ends == [[2.0, 3.0], [4.0, 6.0]] and links.least_s() == 12.0 / 2.0


def test_ranks_of_a_machine_share_its_card() -> None:
    links = Links(Topology.grid(2, 2, network_bytes_per_s=1.0), two_sided=False)
    _, end, crosses = links.send(np.array([0.0, 1.0, 0.0, 0.0]), np.array([2, 3, 0, 1]), np.full(4, 3.0))
    assert crosses.all() and sorted(end[:2]) == [3.0, 6.0] and end[0] == 3.0
    assert links.least_s() == 6.0


def test_two_sided_links_are_slower() -> None:
    top = Topology.grid(1, 2, local_bytes_per_s=2.0, two_sided_rate=0.5)
    _, end, _ = Links(top, two_sided=True).send(np.zeros(2), np.array([1, 0]), np.full(2, 2.0))
    assert end.tolist() == pytest.approx([2.0, 2.0])
