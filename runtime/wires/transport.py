"""What the executor asks of the wires, and the transport that sends each chunk the right way.

Orders that every transport keeps:

* ``wait(slot, epoch)`` returns only when all bytes of that epoch's chunk are visible to the caller.
* ``put`` returns when the source may be reused (it was copied or handed over).
* A bank is not overwritten before its reader has called ``finish(epoch)`` for the epoch that used it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Protocol

import torch

from sfcompile.errors import PeerDiedError, PeerFailedError, RankMismatchError, RuntimeTimeoutError, StreamFusionError
from sfcompile.runtime.program.instructions import Arrival

_FIRST = "another rank failed first: "
_OUT_OF_STEP = "the ranks are not in the same call: "


def out_of_step(
    what: str, rank: int, peer: int | None = None, slot: int | None = None, epoch: int | None = None
) -> RankMismatchError:
    """Ranks run different calls, or one call with different inputs; ``what`` says which."""
    return RankMismatchError(
        f"{_OUT_OF_STEP}{what}",
        "every rank must make the same calls in the same order with equal inputs, or chunks of different calls meet",
        "seed the inputs, and what the model draws (dropout without model.eval()), alike on all ranks, and let no rank "
        "skip a call; ranks that work on other inputs need a group of their own: options={'mesh': a DeviceMesh or "
        "ProcessGroup of the ranks that share them}",
        rank=rank, peer=peer, slot=slot, epoch=epoch,
    )  # fmt: skip


def with_calls(error: BaseException, calls: Mapping[int, str]) -> RankMismatchError | None:
    """An error of :func:`out_of_step` that says which call each of some ranks is in; None: it is another error."""
    if not isinstance(error, RankMismatchError) or not error.what.startswith(_OUT_OF_STEP):
        return None
    named = "; ".join(f"rank {rank} is in {call}" for rank, call in sorted(calls.items()))
    what = f"{error.what.removeprefix(_OUT_OF_STEP)} ({named})"
    return out_of_step(what, -1 if error.rank is None else error.rank, error.peer, _slot_of(error), error.epoch)


def _slot_of(error: StreamFusionError) -> int | None:
    return error.slot if isinstance(error.slot, int) else None


def peer_failed(
    rank: int, notice: str, peer: int | None = None, slot: int | None = None, epoch: int | None = None
) -> StreamFusionError:
    """The error of a rank that reads another rank's failure notice; out of step is everybody's own error."""
    if _OUT_OF_STEP in notice:
        return out_of_step(notice.split(_OUT_OF_STEP, 1)[1], rank, peer, slot, epoch)
    return PeerFailedError(
        f"{_FIRST}{notice}",
        "the ranks compute one model together",
        "mend the first failure",
        rank=rank, peer=peer, slot=slot, epoch=epoch,
    )  # fmt: skip


def notice_of(rank: int, error: BaseException) -> str:
    """What a failing rank tells the others; it passes on what it was told itself."""
    what = error.what if isinstance(error, StreamFusionError) else f"{type(error).__name__}: {error}".splitlines()[0]
    return what.removeprefix(_FIRST) if isinstance(error, PeerFailedError) else f"rank {rank}: {what}"


def too_late(what: str, rank: int, peer: int, slot: int, epoch: int) -> RuntimeTimeoutError:
    """A message did not come within timeout_s; ``what`` says who waited how long for which."""
    return RuntimeTimeoutError(
        what,
        "the peer is slower than timeout_s, or it runs another program",
        "look at the peer's log; raise options={'timeout_s': ...} if it is only slow",
        rank=rank, peer=peer, slot=slot, epoch=epoch,
    )  # fmt: skip


def connection_lost(rank: int, peer: int, reason: str, slot: int, epoch: int) -> PeerDiedError:
    """A connection between machines ended, and no rank left a notice that says why."""
    return PeerDiedError(
        f"rank {rank} lost its connection while it waited for rank {peer} ({reason})",
        "that rank, or one it depends on, has gone without a word: it was killed (often by the system, for lack of "
        "memory), crashed, or the network failed",
        "look at the log of the rank that ended first",
        rank=rank, peer=peer, slot=slot, epoch=epoch,
    )  # fmt: skip


def left_early(rank: int, peer: int, how: str, slot: int | None = None, epoch: int | None = None) -> PeerDiedError:
    """A rank ended while others waited for it, and said how."""
    return PeerDiedError(
        f"rank {peer} has left the job while rank {rank} waited for it: {how}",
        "the ranks compute one model together: none may end before all have made their calls",
        f"look at the log of rank {peer}",
        rank=rank, peer=peer, slot=slot, epoch=epoch,
    )  # fmt: skip


TAG_BITS = 24
"""A signal is the epoch and, below it, so many bits of the call's tag."""


def word_of(epoch: int, tag: int) -> int:
    """What a signal word holds for an epoch of a call."""
    return epoch << TAG_BITS | tag & (1 << TAG_BITS) - 1


class Source(Enum):
    """What becomes of a chunk's memory after it was put."""

    REUSED = "it may change as soon as the put has returned"
    BANK = "a slot of the sender's own bank: it does not change before finish() of this epoch"
    KEPT = "it never changes while anyone holds the tensor"
    CALL = "it does not change before settle(), which ends the call"


class Transport(Protocol):
    """One rank's way to the others."""

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        """A site begins: chunks of this epoch may arrive into the given slot views from now on.

        Args:
            tag: of the call (calls.py), below 2**TAG_BITS. It goes out with every chunk of the epoch; a chunk that
                comes with another one is of another call, and its wait raises a RankMismatchError.
        """

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        """Send ``chunk`` into ``slot`` (at ``offset`` bytes of the bank) of rank ``dst`` and raise its signal.

        Only what is REUSED has to be copied if it leaves later.
        """

    def wait(self, src: int, slot: int, epoch: int) -> None:
        """Block until the chunk of ``epoch`` from rank ``src`` lies in this rank's ``slot``."""

    def finish(self, epoch: int) -> None:
        """This rank has read everything of ``epoch`` and of all epochs before."""

    def notice(self) -> str | None:
        """What is known here of another rank's failure, without asking anyone; None: nothing."""

    def abort(self, text: str) -> None:
        """This rank failed: wake whoever waits for it. ``text`` is the notice."""

    def close(self) -> None:
        """Release what is held; never blocks on a peer."""


class MessageTransport(Transport, Protocol):
    """A transport to ranks that share no memory. It serves one heap after the other: close() forgets the calls only.

    Attributes:
        timeout_s: longest wait on a peer; may be changed.
    """

    timeout_s: float

    def settle(self) -> None:
        """A call ends: what was put with Source.CALL may change from now on. Never waits for a peer."""

    def disconnect(self, how: str = "") -> None:
        """The end: close the connections, once what was put has left. ``how`` tells peers that this rank ends, and
        why."""


class GroupTransport:
    """The job's transport seen by one group: its ``members`` are ranks of the job, callers number them from 0."""

    def __init__(self, transport: Transport, members: Sequence[int]) -> None:
        self._transport = transport
        self._members = members

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        self._transport.open(epoch, [(a._replace(src=self._members[a.src]), view) for a, view in arrivals], tag)

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        self._transport.put(self._members[dst], slot, offset, chunk, epoch, source)

    def wait(self, src: int, slot: int, epoch: int) -> None:
        self._transport.wait(self._members[src], slot, epoch)

    def finish(self, epoch: int) -> None:
        self._transport.finish(epoch)

    def notice(self) -> str | None:
        return self._transport.notice()

    def abort(self, text: str) -> None:
        self._transport.abort(text)

    def close(self) -> None:
        self._transport.close()


class RoutedTransport:
    """Direct stores to ranks of this machine, messages to the others: the rank of a put or a wait picks the way."""

    def __init__(self, direct: Transport | None, messages: Transport | None, is_direct: Sequence[bool]) -> None:
        self._direct = direct
        self._messages = messages
        self._is_direct = is_direct

    def _to(self, rank: int) -> Transport:
        chosen = self._direct if self._is_direct[rank] else self._messages
        assert chosen is not None
        return chosen

    def _all(self) -> list[Transport]:
        return [transport for transport in (self._messages, self._direct) if transport is not None]

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        """Messages need their receives posted; direct stores need the tag."""
        if self._messages is None or self._direct is None:  # nothing to choose
            self._all()[0].open(epoch, arrivals, tag)
            return
        for transport in self._all():
            transport.open(epoch, [pair for pair in arrivals if self._to(pair[0].src) is transport], tag)

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        self._to(dst).put(dst, slot, offset, chunk, epoch, source)

    def wait(self, src: int, slot: int, epoch: int) -> None:
        self._to(src).wait(src, slot, epoch)

    def finish(self, epoch: int) -> None:
        """Messages first: a slot that is still being sent on must not be declared free to direct writers."""
        for transport in self._all():
            transport.finish(epoch)

    def notice(self) -> str | None:
        return next((text for text in (transport.notice() for transport in self._all()) if text is not None), None)

    def abort(self, text: str) -> None:
        for transport in self._all():
            transport.abort(text)

    def close(self) -> None:
        for transport in self._all():
            transport.close()
