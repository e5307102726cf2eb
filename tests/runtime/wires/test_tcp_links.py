"""Connections of every rank with every other, strangers kept out, failure alike on all ranks."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import tcp_ranks

from sfcompile.runtime.wires import tcp_links


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


def test_a_stranger_is_hung_up_on() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address, token = listener.getsockname(), b"t" * 16
    stranger = socket.create_connection(address)
    stranger.sendall(b"x" * 20)
    short = socket.create_connection(address)
    short.close()
    deadline = time.monotonic() + 10
    caller = threading.Thread(target=lambda: calls.append(tcp_links._call(address, 3, token, deadline)))
    calls: list[socket.socket] = []
    caller.start()
    link, rank = tcp_links._answer(listener, token, deadline)
    caller.join()
    assert rank == 3
    assert stranger.recv(1) == b""
    for sock in (stranger, link, listener, *calls):
        sock.close()


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
    assert tcp_links.own_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-0")
    with pytest.raises(OSError):
        tcp_links.own_address()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert tcp_links.own_address() == "127.0.0.1"
