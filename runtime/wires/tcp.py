"""Chunks over TCP, in the order in which they were put: for ranks that share no memory.

Why not a message library. A rank sends to several peers at a time, and what it sends first is needed first, by all of
them. Given to several connections at once, chunks share the link as congestion control likes: one peer gets its keys
late while another already has the queries of the next part, and attention waits for the slowest. Here one thread hands
chunks to the kernel in the order of the puts, across all peers, each connection at most UNSENT_BYTES ahead of the link.
If the first chunk's connection takes no more, those of other peers may go on, but only within _AHEAD_BYTES of it: the
link stays busy while a connection finds its speed, and nobody gets far ahead of anybody.

What makes which bytes visible. A message is ``epoch, slot, tag, length`` and the chunk; the thread reads the chunk into
the slot's view and then notes its arrival under the lock that the waiting thread takes, which orders the two. A chunk
whose epoch is not open here yet stays in the connection, unread, until :meth:`TcpTransport.open`: that is the credit,
and so a bank is never overwritten before its reader has opened the epoch that uses it next.

Why waiting for the first chunk cannot block for ever. All ranks run one program (codegen/schedule/schedule.py) in which
every put stands before its wait. Say rank D waits for Y, and Y stands at its sender behind a chunk H that some rank F
does not read: F has not opened the epoch of H. The sender put H before Y, so it opened that epoch before it put Y; F is
thus before the place of Y's put, hence before the place where D waits. So behind every rank that waits there is one
that stands earlier in the program; the earliest waits for nobody.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sfcompile.errors import RuntimeTimeoutError
from sfcompile.runtime.program.instructions import Arrival
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS
from sfcompile.runtime.wires.transport import (
    TAG_BITS,
    Source,
    connection_lost,
    left_early,
    out_of_step,
    peer_failed,
    too_late,
    word_of,
)

_HEAD = struct.Struct("<QIIQ")
"""Epoch, slot, the call's tag, length."""
_LEAVES = 2**64 - 1
"""In place of an epoch: no chunk follows, but how the sender ended."""
_WORD_BYTES = 1024
_WINDOW_SHARE = 8
_AHEAD_BYTES = 256 * 1024
_LINGER_S = 10.0
_LOOK_AROUND_S = 0.5


@dataclass(eq=False)
class _Link:
    """One connection and what is being read from it."""

    peer: int
    socket: socket.socket
    head: bytearray = field(default_factory=lambda: bytearray(_HEAD.size))
    got: int = 0
    place: memoryview | None = None  # where the chunk goes; None: its head is being read
    key: tuple[int, int] = (0, 0)  # epoch and slot of the chunk
    tag: int = 0  # of its call
    length: int = 0
    word: bytearray | None = None  # how the peer ended, while it is being read
    wake_at: int = 1  # bytes that the kernel lets come together before it wakes the thread
    most_at: int = 1  # and the most of them


@dataclass(eq=False)
class _Send:
    """A chunk on its way out."""

    peer: int
    epoch: int
    source: Source
    parts: list[memoryview]


class TcpTransport:
    """Ordered messages over connections that others made (tcp_links.py).

    Args:
        rank: this rank.
        links: connections by peer, not blocking; closed by :meth:`disconnect`.
        timeout_s: longest wait.
        notice: reads the failure notice that some rank may have left, to explain a closed connection.
    """

    def __init__(
        self,
        rank: int,
        links: Mapping[int, socket.socket],
        timeout_s: float,
        notice: Callable[[], str | None],
    ) -> None:
        self.timeout_s = timeout_s
        self._rank = rank
        self._notice = notice
        self._links = {peer: _Link(peer, link) for peer, link in links.items()}
        self._giving = threading.Lock()  # held while the thread reads chunks; taken before the next one, never after
        self._changed = threading.Condition()  # guards all of the following
        self._places: dict[tuple[int, int], torch.Tensor] = {}
        self._expected: set[tuple[int, int]] = set()
        self._arrived: set[tuple[int, int]] = set()
        self._queue: deque[_Send] = deque()
        self._parked: list[_Link] = []
        self._lost: dict[int, str] = {}
        self._left: dict[int, str] = {}  # peers that said how they end
        self._strayed: dict[int, str] = {}  # peers that are in another call
        self._tags: dict[int, int] = {}  # by epoch
        self._opened = 0
        self._closing = self._rung = False
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._ear.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._writing: set[int] = set()  # peers whose connections are watched for room
        for link in self._links.values():
            self._selector.register(link.socket, selectors.EVENT_READ, link)
        self._thread = threading.Thread(target=self._serve, name=f"sfcompile-tcp-{rank}", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ the rank's thread

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        """From now on the chunks of the epoch may be read into their slots."""
        with self._changed:
            self._tags = {open_epoch: its for open_epoch, its in self._tags.items() if open_epoch > epoch - NUM_BANKS}
            self._tags[epoch] = tag
            self._opened = max(self._opened, epoch)
            for arrival, view in arrivals:
                if view.numel():
                    self._places[epoch, arrival.slot] = view
                    self._expected.add((epoch, arrival.slot))
            if self._parked:
                self._ring()

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        """Queue the chunk behind all that were put before."""
        if not chunk.numel():
            return
        whole = chunk.contiguous()
        data = _bytes(whole)
        parts = [memoryview(_HEAD.pack(epoch, slot, self._tag(epoch), len(data))), data]
        with self._changed:
            if dst in self._lost:
                return  # nobody reads it: what this rank waits for from there says so
            if not self._queue:  # nothing of ours is before it: no need to wake the thread
                with contextlib.suppress(OSError):  # what is wrong, the thread finds again
                    _give(self._links[dst].socket, parts)
                if not parts:
                    return
            if source is Source.REUSED and whole.data_ptr() == chunk.data_ptr():
                parts[-1] = _bytes(whole.clone())[len(data) - len(parts[-1]) :]
            self._queue.append(_Send(dst, epoch, source, parts))
            if dst not in self._writing and any(send.peer == dst for send in self._next()):
                self._ring()

    def wait(self, src: int, slot: int, epoch: int) -> None:
        """Until the thread has read the chunk."""
        key = (epoch, slot)
        with self._changed:
            if key not in self._expected:
                return
            deadline = time.monotonic() + self.timeout_s
            while key not in self._arrived:
                if src in self._strayed:
                    raise out_of_step(self._strayed[src], self._rank, src, slot, epoch)
                if src in self._lost:
                    raise self._why_lost(src, slot, epoch)
                if time.monotonic() > deadline:
                    what = f"rank {self._rank} waited {self.timeout_s:g} s for its message from rank {src}"
                    raise too_late(what, self._rank, src, slot, epoch)
                self._changed.wait(_LOOK_AROUND_S)
            self._arrived.remove(key)
            self._expected.remove(key)

    def finish(self, epoch: int) -> None:
        """Until no slot of this and earlier epochs is being sent on; everything else that is queued is ours alone."""

        def leaving() -> _Send | None:
            own = (send for send in self._queue if send.source is Source.BANK and send.epoch <= epoch)
            return next(own, None)

        with self._changed:
            if not self._changed.wait_for(lambda: leaving() is None, self.timeout_s):
                send = leaving()
                assert send is not None
                raise RuntimeTimeoutError(
                    f"rank {self._rank} has tried for {self.timeout_s:g} s to send a chunk on to rank {send.peer}",
                    "the peer does not read: it is slower than timeout_s, or it runs another program",
                    "look at the peer's log; raise options={'timeout_s': ...} if it is only slow",
                    rank=self._rank, peer=send.peer, epoch=send.epoch,
                )  # fmt: skip

    def settle(self) -> None:
        """Copy what has not left yet of chunks whose memory may change from now on.

        It is little: a call ends when this rank has received all that was for it, and its own chunks were put before.
        Waiting instead would wait for a peer that is slow.
        """
        with self._giving, self._changed:  # the thread is not inside of a send now, nor between looking and sending
            for send in self._queue:
                if send.source is Source.CALL and send.parts:
                    send.parts[-1] = memoryview(bytes(send.parts[-1]))
                    send.source = Source.KEPT

    def notice(self) -> str | None:
        """The first connection that ended or that carried a chunk of another call."""
        with self._changed:
            return next(iter({**self._lost, **self._strayed}.values()), None)

    def abort(self, text: str) -> None:
        """Close every connection, so that peers stop waiting and read the notice."""
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Forget what is expected; the connections stay, for the next heap."""
        with self._changed:
            self._places.clear()
            self._expected.clear()
            self._arrived.clear()
            self._tags.clear()

    def disconnect(self, how: str = "") -> None:
        """Close the connections, once what was put has left; what cannot leave for a while is given up."""
        word = how.encode(errors="replace")[:_WORD_BYTES]
        with self._changed:
            self._changed.wait_for(lambda: not self._queue, _LINGER_S)
            if word and not self._queue:  # else the thread may stand in the middle of a chunk
                for link in self._links.values():
                    with contextlib.suppress(OSError):  # it has gone itself, or does not read
                        link.socket.send(_HEAD.pack(_LEAVES, 0, 0, len(word)) + word)
            self._closing = True
            self._ring()
        self._thread.join(_LINGER_S)
        for link in self._links.values():
            link.socket.close()
        self._bell.close()
        self._ear.close()
        self._selector.close()

    def _tag(self, epoch: int) -> int:
        return word_of(epoch, self._tags.get(epoch, 0)) & (1 << TAG_BITS) - 1

    def _why_lost(self, peer: int, slot: int, epoch: int) -> Exception:
        notice = self._notice()
        if notice is not None:
            return peer_failed(self._rank, notice, peer, slot, epoch)
        if peer in self._left:
            return left_early(self._rank, peer, self._left[peer], slot, epoch)
        return connection_lost(self._rank, peer, self._lost[peer], slot, epoch)

    def _ring(self) -> None:
        """Wake the thread (lock held)."""
        if not self._rung:
            self._rung = True
            self._bell.send(b"!")

    # ------------------------------------------------------------------ the thread of the connections

    def _serve(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # whoever waits must not wait in vain
            for link in self._links.values():
                self._note_lost(link, f"the thread of the connections failed: {error!r}")
            raise

    def _loop(self) -> None:
        while True:
            if self._queue or self._writing:  # without the lock: what is queued after this rings the bell
                self._aim()
            for key, events in self._selector.select():
                if key.data is None:
                    with self._changed:  # in this order: a ring from now on is heard anew
                        self._ear.recv(4096)
                        self._rung = False
                    self._unpark()
                elif events & selectors.EVENT_READ:
                    self._read(key.data)
            if self._closing:
                return
            if self._queue:
                self._write()

    def _next(self) -> list[_Send]:
        """The first queued chunk of every peer, as long as it is not far behind the first of all (lock held)."""
        firsts: dict[int, _Send] = {}
        ahead = 0
        for send in self._queue:
            firsts.setdefault(send.peer, send)
            ahead += sum(map(len, send.parts))
            if ahead >= _AHEAD_BYTES:
                break
        return list(firsts.values())

    def _aim(self) -> None:
        """Be woken when a connection that has something to send can take more."""
        with self._changed:
            wanted = {send.peer for send in self._next()}
            changed, self._writing = wanted ^ self._writing, wanted
        for peer in changed:
            if peer not in self._lost:
                self._interest(self._links[peer], peer in wanted)

    def _interest(self, link: _Link, writes: bool) -> None:
        reads = 0 if link in self._parked else selectors.EVENT_READ
        self._watch(link, reads | (selectors.EVENT_WRITE if writes else 0))

    def _watch(self, link: _Link, events: int) -> None:
        registered = link.socket in self._selector.get_map()
        if events and registered:
            self._selector.modify(link.socket, events, link)
        elif events:
            self._selector.register(link.socket, events, link)
        elif registered:
            self._selector.unregister(link.socket)

    def _unpark(self) -> None:
        with self._changed:
            ready = [link for link in self._parked if link.key in self._places]
            self._parked = [link for link in self._parked if link not in ready]
        for link in ready:
            self._interest(link, link.peer in self._writing)
            try:
                self._begin(link)
            except OSError as error:
                self._lose(link, error)
            else:
                self._read(link)

    def _begin(self, link: _Link) -> bool:
        """Start to read a chunk into its slot; False if its epoch is not open here yet."""
        with self._changed:
            view = self._places.pop(link.key, None)
            epoch = link.key[0]
            late = view is None and epoch <= self._opened  # its epoch was opened and does not expect it (any more)
            if late or (view is not None and link.tag != self._tag(epoch)):
                text = f"rank {link.peer} sent a chunk of another call than rank {self._rank} is in"
                self._strayed.setdefault(link.peer, text)
                raise ConnectionAbortedError(text)
            if view is None:
                self._parked.append(link)
        if view is None:
            self._interest(link, link.peer in self._writing)
            return False
        link.place, link.got = _bytes(view), 0
        if len(link.place) != link.length:
            raise ConnectionAbortedError(
                f"rank {link.peer} sent {link.length} bytes into slot {link.key[1]} of {len(link.place)} bytes"
            )
        # A fraction of the receive window, which the kernel lets grow: what is not read yet must not close it.
        link.most_at = link.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // _WINDOW_SHARE
        return True

    def _read(self, link: _Link) -> None:
        """Read until the kernel has no more."""
        try:
            while True:
                place = memoryview(link.head) if link.place is None else link.place
                self._together(link, min(len(place) - link.got, link.most_at))
                count = link.socket.recv_into(place[link.got :])
                if count == 0:
                    raise ConnectionResetError("connection closed by the peer")
                link.got += count
                if link.got < len(place):
                    continue
                link.got = 0
                if link.word is not None:
                    raise self._farewell(link)
                if link.place is None:
                    epoch, slot, link.tag, link.length = _HEAD.unpack(link.head)
                    if epoch == _LEAVES:
                        link.word = bytearray(min(link.length, _WORD_BYTES) or 1)
                        link.place = memoryview(link.word)
                        continue
                    link.key = (epoch, slot)
                    if not self._begin(link):
                        return
                    continue
                link.place = None
                with self._changed:
                    self._arrived.add(link.key)
                    self._changed.notify_all()
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(link, error)

    def _farewell(self, link: _Link) -> ConnectionResetError:
        """The peer has said how it ended."""
        assert link.word is not None
        how = link.word.decode(errors="replace")
        with self._changed:
            self._left[link.peer] = how
        return ConnectionResetError(f"rank {link.peer} has left the job: {how}")

    def _together(self, link: _Link, count: int) -> None:
        """Be woken for so many bytes at once."""
        if count != link.wake_at:
            link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            link.wake_at = count

    def _write(self) -> None:
        """Give the kernel what it takes, first things first."""
        full: set[int] = set()
        while True:
            with self._changed:
                send = next((send for send in self._next() if send.peer not in full), None)
                lost = send is not None and send.peer in self._lost
            if send is None:
                return
            link = self._links[send.peer]
            try:
                if not lost:
                    with self._giving:
                        _give(link.socket, send.parts)
                    if send.parts:
                        continue
            except BlockingIOError:
                full.add(send.peer)
                continue
            except OSError as error:
                self._lose(link, error)
            with self._changed:
                self._queue.remove(send)
                self._changed.notify_all()

    def _lose(self, link: _Link, error: OSError) -> None:
        self._note_lost(link, error.strerror or str(error))
        self._watch(link, 0)

    def _note_lost(self, link: _Link, why: str) -> None:
        with self._changed:
            self._lost.setdefault(link.peer, why)
            if link in self._parked:  # its chunk will not come, and it is not looked at any more
                self._parked.remove(link)
            self._changed.notify_all()


def _give(link: socket.socket, parts: list[memoryview]) -> None:
    """Give the kernel what it takes of ``parts``, and drop that from them; raises BlockingIOError if it takes none."""
    count = link.sendmsg(parts)
    while parts and count >= len(parts[0]):
        count -= len(parts.pop(0))
    if parts:
        parts[0] = parts[0][count:]


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
