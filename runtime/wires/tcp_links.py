"""One TCP connection between every two ranks that share no memory, made collectively.

Of two ranks the higher one connects, and both prove to each other that they are of this job (handshake.py). All
handshakes of a rank go on side by side: one thread serves whichever has something to read, so that a stranger who
connects and says nothing, or a rank that is slow, delays nobody else. A stranger has HANDSHAKE_S. So has a rank, but
it comes again: who called and was not answered, or was hung up on, calls anew until ``timeout_s`` is over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sfcompile.errors import OptionError, RankMismatchError, StreamFusionError, UnsupportedError
from sfcompile.runtime.wires import handshake
from sfcompile.runtime.wires.handshake import SECRET, SECRET_BYTES, Talk

Exchange = Callable[[Any, str], list[Any]]
"""Collective: every rank's value, by rank; the text says what the ranks do together."""

_SIOCGIFADDR = 0x8915
_TOKEN_BYTES = 32
_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)

HANDSHAKE_S = 2.0
"""Longest handshake, until the other side has proved that it is of this job."""
_AGAIN_S = 0.1
_GUESTS = 256
"""So many unproved callers are listened to at a time; of more, the oldest is hung up on."""

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
            return _address_of(interface, probe)
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))))
        return str(probe.getsockname()[0])


def own_interface() -> str:
    """The name of the interface with that address; the address itself if none has it, "" if there is none."""
    try:
        own = own_address()
    except (OSError, ValueError):
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                if _address_of(interface, probe) == own:
                    return interface
    return own


def _address_of(interface: str, probe: socket.socket) -> str:
    request = struct.pack("256s", interface.encode()[:15])
    return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])


def connect(rank: int, peers: Sequence[int], exchange: Exchange, timeout_s: float) -> dict[int, socket.socket] | str:
    """Collective: a connection to every peer, by rank.

    Args:
        peers: with whom this rank shares no memory; the relation is mutual.
        timeout_s: longest wait for a connection.

    Returns:
        The connections; on every rank alike, what went wrong, if any of them could not be made.

    Raises:
        OptionError: SFCOMPILE_SECRET is too short on some rank; on every rank.
        RankMismatchError: it is not the same on every rank; on every rank.
        UnsupportedError: it is set, and the connections cannot be made: nothing else would check who sends; on every
            rank.
    """
    problem = ""
    listener: socket.socket | None = None
    address: tuple[str, int] | None = None
    try:
        listener = socket.create_server((own_address(), 0), backlog=socket.SOMAXCONN)
        address = listener.getsockname()[:2]
    except OSError as error:
        problem = f"rank {rank} cannot listen: {error}"
    secret = handshake.given_secret()
    length = None if secret is None else min(len(secret), SECRET_BYTES)  # no more of it travels
    hands: _Hands | None = None
    try:
        everyone = exchange((address, secrets.token_hex(_TOKEN_BYTES), length), "find each other's addresses")
        _require_secrets(rank, [length for _, _, length in everyone])
        key = handshake.make_key(bytes.fromhex(everyone[0][1]), secret)
        if secret is not None:
            proofs = exchange(handshake.rank_proof(key, rank), "compare their secrets")
            _require_one_key(rank, [proof == handshake.rank_proof(key, other) for other, proof in enumerate(proofs)])
        if listener is not None and all(address is not None for address, _, _ in everyone):
            hands = _Hands(rank, key, listener, {peer: tuple(everyone[peer][0]) for peer in peers if peer < rank})
            problem = hands.shake(peers, timeout_s)
    except BaseException:
        if hands is not None:
            hands.drop()
        raise
    finally:
        if listener is not None:
            listener.close()
    problems = [text for text in exchange(problem, "connect") if text]
    if problems:
        if hands is not None:
            hands.drop()
        if secret is not None:
            _refuse(rank, problems)
        return "; ".join(problems)
    links = {} if hands is None else hands.links
    for link in links.values():
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):  # not on every system: order among peers is coarser then
            link.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, UNSENT_BYTES)
        link.setblocking(False)
    return links


def _require_secrets(rank: int, lengths: Sequence[int | None]) -> None:
    """All ranks have a secret that is long enough, or none has one."""
    having = [other for other, length in enumerate(lengths) if length is not None]
    short = [other for other, length in enumerate(lengths) if length is not None and length < SECRET_BYTES]
    error: StreamFusionError
    if having and len(having) < len(lengths):
        without = [other for other in range(len(lengths)) if other not in having]
        error = RankMismatchError(
            f"{SECRET} is set on {_listed(having)} and not on {_listed(without)}",
            "a connection is made only between ranks that have the same secret",
            f"set {SECRET} to the same value on every rank, or on none",
            rank=rank,
        )
    elif short:
        error = OptionError(
            f"{SECRET} has fewer than {SECRET_BYTES} bytes on {_listed(short)}",
            "who records a handshake could try short secrets one after the other",
            f"make one with: export {SECRET}=$(openssl rand -hex 32)",
            rank=rank,
        )
    else:
        return
    error.on_every_rank = True
    raise error


def _require_one_key(rank: int, equal: Sequence[bool]) -> None:
    """Every rank has this rank's key, or all of them raise: where keys differ, every rank finds one that does."""
    if all(equal):
        return
    others = [other for other, is_equal in enumerate(equal) if not is_equal]
    error = RankMismatchError(
        f"{SECRET} is another one on {_listed(others)} than on rank {rank}",
        "a connection is made only between ranks that have the same secret",
        f"set {SECRET} to the same value on every rank",
        rank=rank,
    )
    error.on_every_rank = True
    raise error


def _refuse(rank: int, problems: Sequence[str]) -> NoReturn:
    error = UnsupportedError(
        f"ranks cannot be connected: {'; '.join(problems)}",
        f"{SECRET} is set, and gloo, which would carry the messages instead, does not check who sends them",
        f"mend the network between the machines, or unset {SECRET}",
        rank=rank,
    )
    error.on_every_rank = True
    raise error


def _listed(some: Sequence[int]) -> str:
    listed = ", ".join(map(str, some[:8])) + (" ..." if len(some) > 8 else "")
    return f"rank{'s' * (len(some) > 1)} {listed}"


@dataclass(eq=False)
class _Hand:
    """One handshake under way."""

    socket: socket.socket
    talk: Talk
    ends_at: float
    peer: int | None  # whom this rank calls; None: who called is not known yet
    wanted: int = 0
    heard: bytearray = field(default_factory=bytearray)
    connected: bool = True


class _Hands:
    """All handshakes of one rank.

    Attributes:
        links: connections to ranks that have proved themselves, by rank; blocking or not as it happens.
    """

    def __init__(
        self, rank: int, key: bytes, listener: socket.socket, addresses: Mapping[int, tuple[str, int]]
    ) -> None:
        self.links: dict[int, socket.socket] = {}
        self._rank, self._key, self._listener, self._addresses = rank, key, listener, addresses
        self._call_at = dict.fromkeys(addresses, 0.0)  # whom to call next, and when
        self._why: dict[int, str] = {}  # why the last call failed
        self._open: dict[_Hand, None] = {}  # in the order in which they began
        self._selector = selectors.DefaultSelector()

    def shake(self, peers: Collection[int], timeout_s: float) -> str:
        """Until every peer is connected; what went wrong, if that does not come about in time, or "".

        A higher rank than this one calls; a lower one is called, again and again.
        """
        deadline = time.monotonic() + timeout_s
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        try:
            while missing := [peer for peer in peers if peer not in self.links]:
                now = time.monotonic()
                if now > deadline:
                    why = "".join(f"; rank {peer}: {self._why[peer]}" for peer in missing if peer in self._why)
                    return f"rank {self._rank} has no connection with {_listed(missing)} after {timeout_s:g} s{why}"
                self._begin_calls(now)
                self._end_late_ones(now)
                for key, _ in self._selector.select(self._nap(now, deadline)):
                    if key.data is None:
                        self._welcome_guests(peers)
                    elif key.data in self._open:
                        self._go_on(key.data, peers, deadline)
            return ""
        finally:
            for hand in list(self._open):
                self._end(hand)
            self._selector.close()

    def drop(self) -> None:
        """Close what was connected."""
        for link in self.links.values():
            link.close()

    def _nap(self, now: float, deadline: float) -> float:
        until = [deadline, *self._call_at.values(), *(hand.ends_at for hand in self._open)]
        return max(0.0, min(until) - now) + 1e-3

    def _begin_calls(self, now: float) -> None:
        for peer in [peer for peer, at in self._call_at.items() if at <= now]:
            del self._call_at[peer]
            link = socket.socket()
            link.setblocking(False)
            hand = _Hand(link, handshake.call(self._key, self._rank, peer), now + HANDSHAKE_S, peer, connected=False)
            self._open[hand] = None
            refused = link.connect_ex(self._addresses[peer])
            if refused not in (0, errno.EINPROGRESS):
                self._fail(hand, OSError(refused, os.strerror(refused)))
                continue
            self._selector.register(link, selectors.EVENT_WRITE, hand)

    def _welcome_guests(self, peers: Collection[int]) -> None:
        with contextlib.suppress(OSError):  # no more of them; or one that has gone again
            while True:
                link, _ = self._listener.accept()
                link.setblocking(False)
                hand = _Hand(link, handshake.answer(self._key, self._rank), time.monotonic() + HANDSHAKE_S, None)
                self._open[hand] = None
                self._selector.register(link, selectors.EVENT_READ, hand)
                self._say(hand, None)
                guests = [other for other in self._open if other.peer is None]
                if len(guests) > _GUESTS + len(peers):
                    self._end(guests[0])

    def _end_late_ones(self, now: float) -> None:
        for hand in [hand for hand in self._open if hand.ends_at < now]:
            self._fail(hand, TimeoutError(f"it does not answer within {HANDSHAKE_S:g} s"))

    def _go_on(self, hand: _Hand, peers: Collection[int], deadline: float) -> None:
        """Take the next step of a handshake whose connection has something to read, or has come about."""
        try:
            if not hand.connected:
                refused = hand.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if refused:
                    raise OSError(refused, os.strerror(refused))
                hand.connected = True
                self._selector.modify(hand.socket, selectors.EVENT_READ, hand)
                self._say(hand, None)
                return
            while len(hand.heard) < hand.wanted:
                more = hand.socket.recv(hand.wanted - len(hand.heard))
                if not more:
                    raise ConnectionResetError("it hung up")
                hand.heard += more
            if hand.peer is not None:  # what it said was its proof, or will be found to be none
                hand.ends_at = deadline
            heard, hand.heard = bytes(hand.heard), bytearray()
            self._say(hand, heard)
        except BlockingIOError:
            return
        except StopIteration as done:
            self._join(hand, done.value, peers)
        except OSError as error:
            self._fail(hand, error)

    def _say(self, hand: _Hand, heard: bytes | None) -> None:
        """Let the talk go on; raises StopIteration when it has ended well."""
        words, hand.wanted = next(hand.talk) if heard is None else hand.talk.send(heard)
        if words and hand.socket.send(words) < len(words):
            raise ConnectionResetError("it does not read")  # a new connection takes these few bytes at once
        if hand.wanted == 0:
            next(hand.talk)

    def _join(self, hand: _Hand, peer: int, peers: Collection[int]) -> None:
        self._end(hand, close=False)
        calls = hand.peer is not None
        if peer not in peers or (not calls and peer <= self._rank):
            hand.socket.close()  # a rank of this job, but one that has no business here
            return
        if peer in self.links:
            self.links[peer].close()  # it called again, so it has given up the first one
        self.links[peer] = hand.socket

    def _fail(self, hand: _Hand, error: OSError) -> None:
        self._end(hand)
        if hand.peer is None:
            return
        self._why[hand.peer] = error.strerror or str(error)
        self._call_at[hand.peer] = time.monotonic() + _AGAIN_S

    def _end(self, hand: _Hand, close: bool = True) -> None:
        del self._open[hand]
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(hand.socket)
        if close:
            hand.socket.close()
