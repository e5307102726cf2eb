"""The links of a simulated cluster: each rank's port inside its machine, and network cards that ranks may share.

A message waits until its way is free at both ends; cards serve the ranks behind them in the order of their readiness.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sfcompile.runtime.program.topology import Topology

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Route:
    """Where the messages of one permutation go.

    Attributes:
        crosses: by sender: to another machine; ``local`` and ``far`` are the senders that do not, and that do.
        queues: int64 [cards, senders of each], and ``to`` the card that each sends to, if cards are paired and share
            evenly; None: they are not.
    """

    crosses: NDArray[np.bool_]
    local: NDArray[np.int64]
    far: NDArray[np.int64]
    queues: NDArray[np.int64] | None
    to: NDArray[np.int64]


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
        self._routes: dict[int, tuple[NDArray[np.int64], Route]] = {}
        rate = topology.two_sided_rate if two_sided else 1.0
        self.local_rate = topology.local_bytes_per_s * rate
        self.network_rate = topology.network_bytes_per_s * rate

    def send(self, ready: Vector, dst: NDArray[np.int64], nbytes: Vector) -> tuple[Vector, Vector, NDArray[np.bool_]]:
        """``(start, end, crosses)`` of one message per sender; ``dst`` is a permutation of the ranks."""
        route = self.route(dst)
        start, end = ready.copy(), ready.copy()
        local = route.local
        if local.size:
            to = dst[local]
            begins = np.maximum(ready[local], np.maximum(self.port_out[local], self.port_in[to]))
            ends = begins + nbytes[local] / self.local_rate
            start[local], end[local] = begins, ends
            self.port_out[local] = ends
            self.port_in[to] = ends
            self.port_bytes[0, local] += nbytes[local]
            self.port_bytes[1, to] += nbytes[local]
        if route.far.size:
            if route.queues is None:
                self._cross(route.far, ready, dst, nbytes, start, end)
            else:
                self._queue(route.queues, route.to, ready, nbytes, start, end)
            self.card_bytes[0] += np.bincount(self.cards[route.far], nbytes[route.far], len(self.card_out))
            self.card_bytes[1] += np.bincount(self.cards[dst[route.far]], nbytes[route.far], len(self.card_out))
        return start, end, route.crosses

    def route(self, dst: NDArray[np.int64]) -> Route:
        """What is known of a permutation before any message is sent; kept, for schedules use few."""
        if id(dst) not in self._routes:
            self._routes[id(dst)] = dst, self._routed(dst)  # an array that is kept keeps its id
        return self._routes[id(dst)][1]

    def _routed(self, dst: NDArray[np.int64]) -> Route:
        crosses = self.machine[dst] != self.machine
        far = np.flatnonzero(crosses)
        out, into = self.cards[far], self.cards[dst[far]]
        used, first, share = np.unique(out, return_index=True, return_counts=True)
        # Cards in pairs: all that one card sends goes to one other, which gets nothing else.
        target = into[first] if far.size else into
        paired = np.unique(target).size == used.size and bool((into == target[np.searchsorted(used, out)]).all())
        queues = None
        if paired and far.size and np.unique(share).size == 1:
            queues = far[np.argsort(out, kind="stable")].reshape(used.size, -1)
        return Route(crosses, np.flatnonzero(~crosses), far, queues, target)

    def _queue(
        self, queues: NDArray[np.int64], to: NDArray[np.int64], ready: Vector, nbytes: Vector, start: Vector,
        end: Vector,
    ) -> None:  # fmt: skip
        """Cards in pairs, equally many ranks behind each: all pairs serve their ranks at a time, by readiness."""
        out = self.cards[queues[:, 0]]
        free = np.maximum(self.card_out[out], self.card_in[to])
        if queues.shape[1] > 1:
            queues = np.take_along_axis(queues, np.argsort(ready[queues], axis=1, kind="stable"), axis=1)
        for turn in range(queues.shape[1]):
            who = queues[:, turn]
            begins = np.maximum(ready[who], free)
            free = begins + nbytes[who] / self.network_rate
            start[who], end[who] = begins, free
        self.card_out[out] = free
        self.card_in[to] = free

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

    def least_s(self) -> float:
        """Seconds that the busiest link needs for its bytes at full bandwidth."""
        local = self.port_bytes.max(initial=0.0) / self.topology.local_bytes_per_s
        return float(max(local, self.card_bytes.max(initial=0.0) / self.topology.network_bytes_per_s))
