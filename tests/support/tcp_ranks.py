"""Ranks as threads that connect over the loopback device."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from sfcompile.errors import StreamFusionError
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


def connected(ranks: int, timeout_s: float = 10.0, join_s: float = 20.0) -> list[Any]:
    """What every rank's ``connect`` returns, or raises; threads are named after their ranks."""
    meeting, found = Meeting(ranks), [None] * ranks

    def body(rank: int) -> None:
        peers = [peer for peer in range(ranks) if peer != rank]
        try:
            found[rank] = tcp_links.connect(rank, peers, meeting.of(rank), timeout_s)  # type: ignore[call-overload]
        except StreamFusionError as error:
            found[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=body, args=(rank,), name=str(rank), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(join_s)
    return found


def close(links: Sequence[dict[int, socket.socket]]) -> None:
    """Every connection of every rank."""
    for mine in links:
        for link in mine.values():
            link.close()


def transports(ranks: int, timeout_s: float = 10.0) -> list[TcpTransport]:
    """One transport per rank."""
    made = []
    for rank, links in enumerate(connected(ranks)):
        assert not isinstance(links, str)
        made.append(TcpTransport(rank, links, timeout_s, lambda: None))
    return made
