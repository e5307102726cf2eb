"""Meetings: all ranks of a job tell each other a value, or all of them learn why that did not come about.

Every rank leaves what it has to say at the meeting's key, and waits for the others' words. How a meeting ended is
decided once, by whoever is first to write it (``end``): "met", by a rank that has seen everybody's words, or the reason
of a rank that waits no longer. So no rank goes on from a meeting that another has given up, and the other way round:
who gives up and finds "met" there has met.

A meeting that failed is tried again under the next number. Ranks count what they went through together, so that a rank
which comes late passes over the attempts that the others have given up and joins the one in which they wait: however
ranks failed, once all of them call again they meet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sfcompile.errors import (
    PeerDiedError,
    PeerFailedError,
    RankMismatchError,
    RuntimeTimeoutError,
    StreamFusionError,
)
from sfcompile.runtime.rank.job_store import BOUND, JobStore, StoreLostError
from sfcompile.runtime.rank.presence import Presence
from sfcompile.runtime.rank.values import decode, encode
from sfcompile.runtime.wires.transport import notice_of, peer_failed

_MET = "met"
_LINGER_S = 1.0
_NAP_S, _NAP_S_A_RANK = 0.05, 1e-3
_LOOK_AROUND_S, _LOOK_S_A_RANK = 0.2, 2e-3
"""Who waits asks the store about every rank: of a thousand ranks each does so once a second, and looks round for those
that have gone every two."""
_SHORT_S = 2.0
"""Limit of a call of the store that an error must not wait for."""


class Meetings:
    """The meetings of one rank.

    Args:
        timeout_s: longest wait for a rank that has no reason to be late, and for the store.
        notice: reads the failure notice that some rank may have left.
    """

    def __init__(
        self,
        store: JobStore,
        rank: int,
        num_ranks: int,
        presence: Presence,
        timeout_s: float,
        notice: Callable[[], str | None],
    ) -> None:
        self.timeout_s = timeout_s
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._presence = presence
        self._notice = notice
        self._met = 0
        self._attempt = 0

    def exchange(self, value: Any, doing: str, patience: float = 1.0, afresh: bool = False) -> list[Any]:
        """All-gather: every rank's value, by rank.

        Args:
            value: this rank's; what values.py has a text for.
            doing: what the ranks do together, for errors: "compile a graph".
            patience: how many times ``timeout_s`` to wait for ranks that show signs of life.
            afresh: here ranks get over failures: a notice that is there already keeps nobody from meeting.

        Raises:
            RuntimeTimeoutError: names the ranks that did not come.
            PeerFailedError: another rank failed before it came, or gave up.
            PeerDiedError: a rank has gone, or the store has.
            RankMismatchError: ranks meet for different things; on every rank.
        """
        text = encode([doing, value])
        with self._store_errors(doing):
            words = self._meet(text, doing, patience * self.timeout_s, self._notice() if afresh else None)
        everyone = []
        for rank, word in enumerate(words):
            try:
                its_doing, its_value = decode(word)
            except ValueError as error:
                raise RankMismatchError(
                    f"rank {rank} left words in the job's store that rank {self._rank} cannot read ({error})",
                    "it runs another version of sfcompile or has SFCOMPILE_SECRET set, or something else writes there",
                    "install one version, and set one secret or none, on every rank",
                    rank=self._rank,
                    peer=rank,
                ) from error
            everyone.append((its_doing, its_value))
        for rank, (its_doing, _) in enumerate(everyone):
            if its_doing != everyone[0][0]:
                notice = None if afresh else self._notice()
                if notice is not None:  # a rank that failed has begun anew before this one heard of it
                    raise peer_failed(self._rank, notice)
                raise _different(self._rank, rank, everyone[0][0], its_doing)
        return [its_value for _, its_value in everyone]

    # ------------------------------------------------------------------ one meeting

    def _meet(self, text: str, doing: str, limit_s: float, known: str | None) -> list[str]:
        while (ended := self._store.get(self._key("end"), self.timeout_s)) is not None and ended != _MET:
            self._attempt += 1  # the others have given it up: where they wait now is further on
        here, end, read = self._met, self._key("end"), self._key("read")
        keys = [self._key(rank) for rank in range(self._num_ranks)]
        try:
            self._store.set(keys[self._rank], text, self.timeout_s)
            words = self._await(keys, doing, limit_s, known)
            self._count(here)
        except StoreLostError:
            raise
        except BaseException as error:
            if isinstance(error, StreamFusionError):
                ended = ""  # this rank has ended it, or read that another has
            else:  # an interrupt, while this rank waited; it may come when all have met
                with contextlib.suppress(StoreLostError):
                    ended = self._store.first(end, _reason(PeerFailedError(notice_of(self._rank, error))), _SHORT_S)
            if ended == _MET:
                self._count(here)
            else:
                self._attempt += 1
            if isinstance(
                error, RankMismatchError
            ):  # words that no rank can use: everybody finds them, if there is time
                with contextlib.suppress(StoreLostError):
                    self._leave(read)
            raise
        self._leave(read)
        return words

    def _leave(self, read: str) -> None:
        """This rank has read what it came for."""
        self._store.add(read, 1, self.timeout_s)
        if self._rank == 0:
            self.linger(read)

    def _count(self, here: int) -> None:
        """The meeting of number ``here`` has come about, for every rank: whatever happens now, the next one follows."""
        self._met, self._attempt = here + 1, 0

    def _await(self, keys: Sequence[str], doing: str, limit_s: float, known: str | None) -> list[str]:
        start, nap, look, longest = time.monotonic(), 1e-3, 0.0, max(_NAP_S, _NAP_S_A_RANK * self._num_ranks)
        while True:
            words = self._store.get_all(keys, self.timeout_s)
            if words is not None:
                ended = self._store.first(self._key("end"), _MET, self.timeout_s)
                if ended == _MET:
                    return words
                raise self._given_up(ended)
            now = time.monotonic()
            if now >= look:
                look = now + max(_LOOK_AROUND_S, _LOOK_S_A_RANK * self._num_ranks)
                error = self._obstacle(keys, doing, known, now - start, limit_s)
                if error is not None:
                    if self._store.first(self._key("end"), _reason(error), self.timeout_s) != _MET:
                        raise error
                    continue  # they came after all
            time.sleep(nap)
            nap = min(1.5 * nap, longest)

    def _obstacle(
        self, keys: Sequence[str], doing: str, known: str | None, waited_s: float, limit_s: float
    ) -> StreamFusionError | None:
        """Why this rank should wait no longer, if there is a reason."""
        ended = self._store.get(self._key("end"), self.timeout_s)
        if ended is not None and ended != _MET:
            return self._given_up(ended)
        notice = self._notice()
        there = self._store.present(keys, self.timeout_s)
        missing = [rank for rank, came in enumerate(there) if not came]
        # The notice was read before the look round: who failed after this meeting cannot have ended it.
        if notice is not None and known is None and missing:
            return peer_failed(self._rank, notice)
        gone = self._presence.gone(missing, self.timeout_s)
        if gone is not None:
            rank, how = gone
            return PeerDiedError(
                f"rank {self._rank} is ready to {doing}, but rank {rank} has gone",
                how,
                f"look at the log of rank {rank}",
                rank=self._rank,
                peer=rank,
            )
        if waited_s <= limit_s or not missing:
            return None
        return RuntimeTimeoutError(
            f"rank {self._rank} is ready to {doing} (step {self._met}), but not every rank came along "
            f"within {limit_s:g} s: {ranks_in_words(missing)} did not",
            *_cure(missing[0], known or notice),
            rank=self._rank,
            peer=missing[0],
        )

    def _given_up(self, ended: str) -> StreamFusionError:
        """The error of the rank that ended the meeting is everybody's: all waited for the same ranks."""
        try:
            kind, what, why, fix, peer = decode(ended)
        except ValueError:
            kind, what, why, fix, peer = "", ended, "", "", None
        if kind in (RuntimeTimeoutError.__name__, PeerDiedError.__name__):
            cls = RuntimeTimeoutError if kind == RuntimeTimeoutError.__name__ else PeerDiedError
            return cls(what, why, fix, rank=self._rank, peer=peer)
        return peer_failed(self._rank, what, peer)

    def linger(self, counter: str) -> None:
        """The store may end with this process: stay, for a moment, until every rank has read what it came for."""
        deadline = time.monotonic() + _LINGER_S
        while self._store.add(counter, 0, self.timeout_s) < self._num_ranks and time.monotonic() < deadline:
            time.sleep(1e-3)

    def _key(self, what: object) -> str:
        """Of the first meeting, which makes the session, nothing can be bound to that session yet."""
        room = BOUND if self._met else "meeting/"
        return f"{room}{self._met}.{self._attempt}/{what}"

    @contextlib.contextmanager
    def _store_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except StoreLostError as error:
            raise PeerDiedError(
                f"rank {self._rank} was about to {doing} and lost the job's store: {error}",
                "rank 0, or the launcher, keeps the store and has ended, was stopped, or is cut off",
                "look at the log of rank 0, and at the network between the machines",
                rank=self._rank,
                peer=0,
            ) from error


def _reason(error: StreamFusionError) -> str:
    """Why a meeting ended without having come about, for the other ranks."""
    what = notice_of(error.rank or 0, error) if isinstance(error, PeerFailedError) else error.what
    return encode((type(error).__name__, what, error.why, error.fix, error.peer))


def _cure(missing: int, notice: str | None) -> tuple[str, str]:
    """Why a rank may not have come to a meeting, as far as it is known, and what to do."""
    if notice is not None:
        return (
            f"the job failed before ({notice}), and ranks start afresh together: all of them must call again",
            f"call again on every rank, or end them all; look at the log of rank {missing}",
        )
    return (
        "every rank must make this call: one that raised before it, that runs other code, or that was given inputs of "
        "shapes which it has compiled already (or that the others have) does not come",
        f"make the same calls with inputs of the same shapes on every rank; look at the log of rank {missing}",
    )


def ranks_in_words(some: Sequence[int]) -> str:
    """ "rank 3" or "ranks 3, 5"; of many, the first eight."""
    listed = ", ".join(map(str, some[:8]))
    return f"rank {listed}" if len(some) == 1 else f"ranks {listed}" + (" ..." if len(some) > 8 else "")


def _different(rank: int, other: int, first: str, second: str) -> RankMismatchError:
    error = RankMismatchError(
        f"rank 0 is about to {first}, and rank {other} to {second}",
        "the ranks compute one model together, so all must make the same calls in the same order",
        "make the same calls on every rank; after an error, call again on all of them",
        rank=rank,
        peer=other,
    )
    error.on_every_rank = True
    return error
