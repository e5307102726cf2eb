"""Connections of every rank with every other, strangers kept out, failure alike on all ranks."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import tcp_ranks

from sfcompile.errors import OptionError, RankMismatchError, StreamFusionError, UnsupportedError
from sfcompile.runtime.wires import handshake, tcp_links


@pytest.mark.parametrize("ranks", [2, 5])
def test_every_two_ranks_are_connected(ranks: int) -> None:
    links = tcp_ranks.connected(ranks)
    for rank, mine in enumerate(links):
        assert isinstance(mine, dict) and sorted(mine) == [peer for peer in range(ranks) if peer != rank]
    for a in range(ranks):
        for b in range(ranks):
            if a != b:
                links[a][b].send(bytes([a, b]))  # type: ignore[index]
    for a in range(ranks):
        for b in range(ranks):
            if a != b:
                link = links[a][b]  # type: ignore[index]
                link.setblocking(True)
                assert link.recv(2) == bytes([b, a])
    for mine in links:
        for link in mine.values():  # type: ignore[union-attr]
            link.close()


class Visitors:
    """Connections of strangers to every listener, made before the first rank calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, says: bytes, count: int = 1) -> None:
        self.sockets: list[socket.socket] = []
        create = socket.create_server

        def visited(*args: Any, **options: Any) -> socket.socket:
            listener = create(*args, **options)
            for _ in range(count):
                visitor = socket.create_connection(listener.getsockname())
                visitor.sendall(says)
                self.sockets.append(visitor)
            return listener

        monkeypatch.setattr(socket, "create_server", visited)

    def hung_up_on(self) -> bool:
        for visitor in self.sockets:
            visitor.settimeout(10)
            try:
                while visitor.recv(100):
                    pass
            except ConnectionResetError:
                pass
            visitor.close()
        return True


@pytest.mark.parametrize("says", [b"", b"s", b"GET / HTTP/1.1\r\n" * 20, b"sfcompile links 1"])
def test_strangers_delay_nobody_and_are_hung_up_on(monkeypatch: pytest.MonkeyPatch, says: bytes) -> None:
    """Silent ones above all: they came first, and would have been waited for. Well below HANDSHAKE_S each."""
    monkeypatch.setattr(tcp_links, "HANDSHAKE_S", 60.0)
    visitors = Visitors(monkeypatch, says, count=3)
    links = tcp_ranks.connected(3, timeout_s=60.0, join_s=20.0)
    assert [sorted(mine) for mine in links] == [[1, 2], [0, 2], [0, 1]]  # type: ignore[type-var]
    assert visitors.hung_up_on()
    tcp_ranks.close(links)


def test_more_strangers_than_are_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_links, "_GUESTS", 4)
    Visitors(monkeypatch, b"", count=20)
    links = tcp_ranks.connected(3, timeout_s=60.0, join_s=30.0)
    assert all(isinstance(mine, dict) and len(mine) == 2 for mine in links)
    tcp_ranks.close(links)


def test_a_rank_that_is_hung_up_on_calls_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first handshakes take too long: the machine was busy."""
    late = {0: 3}
    say = tcp_links._Hands._say

    def slow(hands: Any, hand: Any, heard: bytes | None) -> None:
        if hand.peer is None and heard is not None and late[0] > 0:
            late[0] -= 1
            raise ConnectionResetError("hung up on")
        say(hands, hand, heard)

    monkeypatch.setattr(tcp_links._Hands, "_say", slow)
    links = tcp_ranks.connected(3, timeout_s=60.0, join_s=30.0)
    assert all(isinstance(mine, dict) and len(mine) == 2 for mine in links) and late[0] == 0
    tcp_ranks.close(links)


def test_who_does_not_come_is_named_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 calls another address, at which nobody answers."""
    mute = socket.create_server(("127.0.0.1", 0))
    init = tcp_links._Hands.__init__

    def astray(hands: Any, rank: int, key: bytes, listener: socket.socket, addresses: Any) -> None:
        init(hands, rank, key, listener, dict.fromkeys(addresses, mute.getsockname()) if rank == 2 else addresses)

    monkeypatch.setattr(tcp_links, "HANDSHAKE_S", 0.2)
    monkeypatch.setattr(tcp_links._Hands, "__init__", astray)
    told = tcp_ranks.connected(3, timeout_s=1.0)
    assert told[0] == told[1] == told[2] and isinstance(told[0], str)
    assert "rank 2 has no connection with ranks 0, 1 after 1 s; rank 0: it does not answer within 0.2 s" in told[0]
    mute.close()


def test_somebody_else_at_a_ranks_address_is_said_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    init = tcp_links._Hands.__init__

    def impostor(hands: Any, rank: int, key: bytes, *rest: Any) -> None:
        init(hands, rank, key if rank else b"x" * 32, *rest)

    monkeypatch.setattr(tcp_links._Hands, "__init__", impostor)
    told = tcp_ranks.connected(2, timeout_s=1.0)
    assert told[0] == told[1] and "rank 0: rank 0's address has not the key of this job" in told[0]


def secrets_by_rank(monkeypatch: pytest.MonkeyPatch, secrets: Sequence[bytes | None]) -> None:
    monkeypatch.setattr(handshake, "given_secret", lambda: secrets[int(threading.current_thread().name)])


def test_ranks_with_one_secret_are_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets_by_rank(monkeypatch, [b"s" * 16] * 3)
    links = tcp_ranks.connected(3)
    assert [sorted(mine) for mine in links] == [[1, 2], [0, 2], [0, 1]]  # type: ignore[type-var]
    tcp_ranks.close(links)


@pytest.mark.parametrize(
    ("secrets", "kind", "text"),
    [
        ([b"s" * 16, b"s" * 16, b"x" * 16], RankMismatchError, "is another one on rank"),
        ([b"s" * 16, b"s" * 16, None], RankMismatchError, "is set on ranks 0, 1 and not on rank 2"),
        ([b"s" * 15] * 3, OptionError, "fewer than 16 bytes on ranks 0, 1, 2"),
    ],
)
def test_other_secrets_are_one_error_on_every_rank(
    monkeypatch: pytest.MonkeyPatch, secrets: list[bytes | None], kind: type[StreamFusionError], text: str
) -> None:
    secrets_by_rank(monkeypatch, secrets)
    for error in tcp_ranks.connected(3):
        assert isinstance(error, kind) and error.on_every_rank, error
        assert re.search(text, str(error))


def test_with_a_secret_nothing_falls_back_to_who_checks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets_by_rank(monkeypatch, [b"s" * 16] * 2)
    monkeypatch.setattr(tcp_links, "own_address", lambda: "192.0.2.7")  # not an address of this machine
    for error in tcp_ranks.connected(2):
        assert isinstance(error, UnsupportedError) and "rank 0 cannot listen" in str(error)
        assert "gloo, which would carry the messages instead, does not check" in str(error)


def test_what_goes_wrong_on_one_rank_is_said_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_address() -> str:
        if threading.current_thread().name.startswith("bad"):
            raise OSError("no such interface")
        return "127.0.0.1"

    monkeypatch.setattr(tcp_links, "own_address", no_address)
    meeting, answers = tcp_ranks.Meeting(3), dict[int, object]()

    def body(rank: int) -> None:
        answers[rank] = tcp_links.connect(rank, [p for p in range(3) if p != rank], meeting.of(rank), 5.0)

    threads = [threading.Thread(target=body, args=(r,), name=f"{'bad' if r == 2 else 'good'}{r}") for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [answers[rank] for rank in range(3)] == ["rank 2 cannot listen: no such interface"] * 3


def test_the_address_is_that_of_the_named_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert tcp_links.own_address() == "127.0.0.1" and tcp_links.own_interface() == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-0")
    assert tcp_links.own_interface() == ""
    with pytest.raises(OSError):
        tcp_links.own_address()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert tcp_links.own_address() == "127.0.0.1" and tcp_links.own_interface() == "lo"
