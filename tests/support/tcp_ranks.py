"""Ranks as threads that connect over the loopback device."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

from sfcompile.runtime.wires import tcp_links
from sfcompile.runtime.wires.tcp import TcpTransport


class Meeting:
    """The exchange of some threads."""

    def __init__(self, ranks: int) -> None:
        self._barrier, self._table = threading.Barrier(ranks), dict[int, Any]()
        self.ranks = ranks

    def of(self, rank: int) -> Callable[[Any, str], list[Any]]:
        def exchange(value: Any, doing: str) -> list[Any]:
            self._table[rank] = value
            self._barrier.wait(10)
            everyone = [self._table[r] for r in range(self.ranks)]
            self._barrier.wait(10)
            return everyone

        return exchange


def connected(ranks: int, timeout_s: float = 10.0) -> list[dict[int, socket.socket] | str]:
    """What every rank's ``connect`` returns."""
    meeting, found = Meeting(ranks), [None] * ranks

    def body(rank: int) -> None:
        peers = [peer for peer in range(ranks) if peer != rank]
        found[rank] = tcp_links.connect(rank, peers, meeting.of(rank), timeout_s)  # type: ignore[call-overload]

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found  # type: ignore[return-value]


def transports(ranks: int, timeout_s: float = 10.0) -> list[TcpTransport]:
    """One transport per rank."""
    made = []
    for rank, links in enumerate(connected(ranks)):
        assert not isinstance(links, str)
        made.append(TcpTransport(rank, links, timeout_s, lambda: None))
    return made
