"""The links of a simulated cluster: each rank's port inside its machine, and network cards that ranks may share.

A message waits until its way is free at both ends; cards serve the ranks behind them in the order of their readiness.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sfcompile.runtime.program.topology import Topology

Vector = NDArray[np.float64]


class Links:
    """Ports and cards: when each is free, and how many bytes went through."""

    def __init__(self, topology: Topology, two_sided: bool) -> None:
        ranks = topology.num_ranks
        self.topology = topology
        self.machine = np.array(topology.machine_of)
        cards = np.unique(np.array(topology.nic_of()), return_inverse=True)[1]
        self.cards = cards
        count = int(cards.max(initial=0)) + 1
        self.port_out, self.port_in = np.zeros(ranks), np.zeros(ranks)
        self.card_out, self.card_in = np.zeros(count), np.zeros(count)
        self.port_bytes = np.zeros((2, ranks))
        self.card_bytes = np.zeros((2, count))
        rate = topology.two_sided_rate if two_sided else 1.0
        self.local_rate = topology.local_bytes_per_s * rate
        self.network_rate = topology.network_bytes_per_s * rate

    def send(self, ready: Vector, dst: NDArray[np.int64], nbytes: Vector) -> tuple[Vector, Vector, NDArray[np.bool_]]:
        """``(start, end, crosses)`` of one message per sender; ``dst`` is a permutation of the ranks."""
        crosses = self.machine[dst] != self.machine
        start, end = ready.copy(), ready.copy()
        local = np.flatnonzero(~crosses)
        if local.size:
            to = dst[local]
            start[local] = np.maximum(ready[local], np.maximum(self.port_out[local], self.port_in[to]))
            end[local] = start[local] + nbytes[local] / self.local_rate
            self.port_out[local] = end[local]
            self.port_in[to] = end[local]
            self.port_bytes[0, local] += nbytes[local]
            self.port_bytes[1, to] += nbytes[local]
        far = np.flatnonzero(crosses)
        if far.size:
            self._cross(far, ready, dst, nbytes, start, end)
        return start, end, crosses

    def _cross(
        self, far: NDArray[np.int64], ready: Vector, dst: NDArray[np.int64], nbytes: Vector, start: Vector, end: Vector
    ) -> None:
        order = far[np.lexsort((ready[far], self.cards[far]))]
        cards = self.cards[order]
        first = np.flatnonzero(np.diff(cards, prepend=-1))
        turn = np.arange(order.size) - np.repeat(first, np.diff(np.append(first, order.size)))
        for k in range(int(turn.max()) + 1):
            senders = order[turn == k]
            out, to = self.cards[senders], self.cards[dst[senders]]
            # Two senders of one turn may meet at one card: then one after the other, by readiness.
            groups = [senders] if np.unique(to).size == to.size else [
                np.array([who]) for who in senders[np.argsort(ready[senders], kind="stable")]
            ]  # fmt: skip
            for who in groups:
                out, to = self.cards[who], self.cards[dst[who]]
                start[who] = np.maximum(ready[who], np.maximum(self.card_out[out], self.card_in[to]))
                end[who] = start[who] + nbytes[who] / self.network_rate
                self.card_out[out] = end[who]
                self.card_in[to] = end[who]
        np.add.at(self.card_bytes[0], self.cards[far], nbytes[far])
        np.add.at(self.card_bytes[1], self.cards[dst[far]], nbytes[far])

    def least_s(self) -> float:
        """Seconds that the busiest link needs for its bytes at full bandwidth."""
        local = self.port_bytes.max(initial=0.0) / self.topology.local_bytes_per_s
        return float(max(local, self.card_bytes.max(initial=0.0) / self.topology.network_bytes_per_s))
