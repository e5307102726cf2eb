"""Ports and cards: a way must be free at both ends, cards are shared, bytes are counted."""

from __future__ import annotations

from dataclasses import replace

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


@pytest.mark.parametrize("cards", [1, 2, 4])
def test_cards_in_pairs_serve_as_any_cards_do(cards: int) -> None:
    """Whole machines send to whole machines: the quick way and the general one, message after message."""
    topology = Topology.grid(4, 4, nics_per_machine=cards, network_bytes_per_s=3.0, local_bytes_per_s=50.0)
    quick, general = Links(topology, two_sided=False), Links(topology, two_sided=False)
    rng = np.random.default_rng(cards)
    for _ in range(30):
        dst = (np.arange(16) + 4 * rng.integers(4)) % 16
        assert (quick.route(dst).queues is None) == (not quick.route(dst).crosses.any())
        general._routes[id(dst)] = dst, replace(general.route(dst), queues=None)
        ready, nbytes = rng.integers(0, 5, 16).astype(float), rng.integers(1, 9, 16).astype(float)
        for one, other in zip(quick.send(ready, dst, nbytes), general.send(ready, dst, nbytes), strict=True):
            assert (one == other).all()
    assert quick.least_s() == general.least_s() > 0
