"""One TCP connection between every two ranks that share no memory, made collectively.

Of two ranks the higher one connects; a token that only the job's ranks know keeps strangers out.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

Exchange = Callable[[Any, str], list[Any]]
"""Collective: every rank's value, by rank; the text says what the ranks do together."""

_SIOCGIFADDR = 0x8915
_RANK = struct.Struct("<I")
_TOKEN_BYTES = 16
_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)

UNSENT_BYTES = 128 * 1024
"""The kernel takes more of a connection's bytes only while fewer than this wait in it unsent: what it has not taken can
still be ordered among peers."""


def own_address() -> str:
    """The address at which other machines reach this rank: of gloo's interface if one is named, else of the route to
    the job's master.

    Raises:
        OSError: there is no such interface or route.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if interface:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))))
        return str(probe.getsockname()[0])


def connect(rank: int, peers: Sequence[int], exchange: Exchange, timeout_s: float) -> dict[int, socket.socket] | str:
    """Collective: a connection to every peer, by rank.

    Args:
        peers: with whom this rank shares no memory; the relation is mutual.
        timeout_s: longest wait for a connection.

    Returns:
        The connections; on every rank alike, what went wrong, if any of them could not be made.
    """
    links: dict[int, socket.socket] = {}
    problem = ""
    listener: socket.socket | None = None
    address: tuple[str, int] | None = None
    try:
        listener = socket.create_server((own_address(), 0), backlog=max(1, len(peers)))
        address = listener.getsockname()[:2]
    except OSError as error:
        problem = f"rank {rank} cannot listen: {error}"
    secret = secrets.token_bytes(_TOKEN_BYTES)
    everyone = exchange((address, secret), "find each other's addresses")
    token = everyone[0][1]
    deadline = time.monotonic() + timeout_s
    try:
        if listener is not None and all(address is not None for address, _ in everyone):
            for peer in (peer for peer in peers if peer < rank):
                links[peer] = _call(everyone[peer][0], rank, token, deadline)
            waiting = {peer for peer in peers if peer > rank}
            while waiting:
                link, peer = _answer(listener, token, deadline)
                if peer in waiting:
                    links[peer] = link
                    waiting.remove(peer)
    except OSError as error:
        problem = f"rank {rank} cannot connect: {error}"
    finally:
        if listener is not None:
            listener.close()
    problems = [text for text in exchange(problem, "connect") if text]
    if problems:
        for link in links.values():
            link.close()
        return "; ".join(problems)
    for link in links.values():
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):  # not on every system: order among peers is coarser then
            link.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, UNSENT_BYTES)
        link.setblocking(False)
    return links


def _left(deadline: float) -> float:
    return max(1e-3, deadline - time.monotonic())


def _call(address: tuple[str, int], rank: int, token: bytes, deadline: float) -> socket.socket:
    link = socket.create_connection(address, timeout=_left(deadline))
    link.sendall(token + _RANK.pack(rank))
    return link


def _answer(listener: socket.socket, token: bytes, deadline: float) -> tuple[socket.socket, int]:
    """The next caller that knows the token, and its rank; strangers are hung up on."""
    while True:
        listener.settimeout(_left(deadline))
        link, _ = listener.accept()
        with contextlib.suppress(OSError):
            link.settimeout(_left(deadline))
            said = b""
            while len(said) < _TOKEN_BYTES + _RANK.size:
                more = link.recv(_TOKEN_BYTES + _RANK.size - len(said))
                if not more:
                    break
                said += more
            if hmac.compare_digest(said[:_TOKEN_BYTES], token):
                return link, int(_RANK.unpack(said[_TOKEN_BYTES:])[0])
        link.close()
