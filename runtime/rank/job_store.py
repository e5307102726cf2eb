"""The job's key-value store, with a limit on every call.

torch's store waits for its host as long as that takes: a host that is stopped, or cut off without a reset, would hold
a rank for ever. Here one thread of this rank asks the store and the rank waits for the thread, up to a limit. The same
thread beats this rank's heart (presence.py), between what it is asked: a rank that cannot reach the store is one that
the others can no longer hear.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from sfcompile.errors import OptionError, RankMismatchError, StreamFusionError
from sfcompile.runtime.wires.handshake import SECRET, SECRET_BYTES

T = TypeVar("T")

BOUND = "agreed/"
"""Keys of what ranks act on begin so, once they know of each other. Signs of life and notices of failure do not: ranks
that have not met yet read them, and all that a recording of one could do is to end the job."""


def check_secret() -> None:
    """What signs what ranks tell each other is long enough, where there is one.

    Raises:
        OptionError: it is shorter than SECRET_BYTES.
    """
    length = len(os.environ.get(SECRET, "").encode())
    if 0 < length < SECRET_BYTES:
        raise OptionError(
            f"{SECRET} has {length} bytes, and {SECRET_BYTES} at least are needed",
            "who records what ranks say could try short secrets one after the other",
            f"make one with: export {SECRET}=$(openssl rand -hex 32)",
        )


class StoreLostError(Exception):
    """The store does not answer any more, or has gone. Never reaches a user: who asks says what it was about."""


class _Reply:
    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.done = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None


class JobStore:
    """Text by key, under a prefix of the job's own.

    What ranks leave in it is signed, if they have a secret: the HMAC of a text is over the store's name, its key and
    the text, and, once ranks have met, over :meth:`bind`'s session too, so that what was recorded in another job, or in
    an earlier session of this one, is refused.

    Args:
        store: torch's, used by this object's thread alone.
        name: of what the store is for, the same on every rank: a world's own.
    """

    def __init__(self, store: Any, name: str = "") -> None:
        self._store = store
        self._name = name
        self._session = ""
        self._secret = os.environ.get(SECRET, "").encode()
        self._asked: queue.SimpleQueue[_Reply | None] = queue.SimpleQueue()
        self._beat: Callable[[], None] | None = None
        self._every_s = 1.0
        self._thread = threading.Thread(target=self._serve, name="sfcompile-store", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ what ranks ask

    def set(self, key: str, text: str, limit_s: float) -> None:
        """Leave a text."""
        signed = self._signed(key, text)
        self._ask(lambda: self._store.set(key, signed), limit_s)

    def get(self, key: str, limit_s: float) -> str | None:
        """A text that is there; None: there is none."""
        return self._ask(lambda: self._get(key), limit_s)

    def get_all(self, keys: Sequence[str], limit_s: float) -> list[str] | None:
        """The texts of all keys; None: not all are there yet."""
        return self._ask(lambda: self._get_all(list(keys)), limit_s)

    def present(self, keys: Sequence[str], limit_s: float) -> list[bool]:
        """Which keys are there."""
        return self._ask(lambda: [self._store.check([key]) for key in keys], limit_s)

    def first(self, key: str, text: str, limit_s: float) -> str:
        """Leave a text if there is none; the one that stays. All ranks get the same."""
        signed = self._signed(key, text)
        return self._ask(lambda: self._checked(key, self._store.compare_set(key, "", signed)), limit_s)

    def add(self, key: str, number: int, limit_s: float) -> int:
        """Add to a counter; what it is then."""
        return self._ask(lambda: int(self._store.add(key, number)), limit_s)

    def beat(self, key: str, text: str, every_s: float) -> None:
        """From now on leave ``text`` and a growing number at ``key``, every so many seconds."""
        count = 0

        def once() -> None:
            nonlocal count
            count += 1
            self._store.set(key, self._signed(key, f"{text} {count}"))

        self._every_s = every_s
        self._beat = once
        self._ask(once, every_s + 5.0)

    def close(self) -> None:
        """The thread ends when it has done what it was asked; nobody waits for it."""
        self._beat = None
        self._asked.put(None)

    # ------------------------------------------------------------------ the thread

    def _ask(self, work: Callable[[], T], limit_s: float) -> T:
        reply = _Reply(work)
        self._asked.put(reply)
        if not reply.done.wait(limit_s):
            raise StoreLostError(f"it has not answered for {limit_s:.3g} s")
        if isinstance(reply.error, StreamFusionError):
            raise reply.error
        if reply.error is not None:
            if isinstance(reply.error, (dist.DistError, RuntimeError)):
                raise StoreLostError(str(reply.error).splitlines()[0]) from reply.error
            raise reply.error
        return reply.value  # type: ignore[no-any-return]

    def _serve(self) -> None:
        due = time.monotonic()
        while True:
            beat, left = self._beat, due - time.monotonic()
            try:
                if beat is not None and left <= 0.0:
                    raise queue.Empty  # first of all, however much is asked
                reply = self._asked.get(timeout=None if beat is None else left)
            except queue.Empty:
                reply = _Reply(beat or (lambda: None))
                due = time.monotonic() + self._every_s
            if reply is None:
                return
            try:
                reply.value = reply.work()
            except BaseException as error:  # the one who waits raises it; a beat that fails is missed by the others
                reply.error = error
            reply.done.set()

    def _get(self, key: str) -> str | None:
        return self._checked(key, self._store.get(key)) if self._store.check([key]) else None

    def _get_all(self, keys: list[str]) -> list[str] | None:
        if not self._store.check(keys):
            return None
        return [self._checked(key, raw) for key, raw in zip(keys, self._store.multi_get(keys), strict=True)]

    # ------------------------------------------------------------------ the secret

    def _signed(self, key: str, text: str) -> str:
        return f"{self._signature(key, text)}{text}" if self._secret else text

    def _checked(self, key: str, raw: bytes) -> str:
        text = raw.decode(errors="replace")
        if not self._secret:
            return text
        length = 2 * hashlib.sha256().digest_size
        if not hmac.compare_digest(text[:length].encode(), self._signature(key, text[length:]).encode()):
            raise RankMismatchError(
                f"what lies at {key!r} in the job's store is not signed with this rank's {SECRET}",
                "some rank has another secret, or something else writes there",
                f"set {SECRET} to the same value on every rank, or on none",
            )
        return text[length:]

    def bind(self, nonces: Sequence[str]) -> None:
        """From now on :data:`BOUND` keys hold what was signed for this session alone.

        Args:
            nonces: of all ranks, each drawn for this session by its rank. A recording holds other ones: who plays it to
                some rank in their place gives that rank another session than its own, and is found out.
        """
        self._session = hashlib.sha256("\0".join(nonces).encode()).hexdigest()

    def _signature(self, key: str, text: str) -> str:
        session = self._session if key.startswith(BOUND) else ""
        said = "\0".join((self._name, session, key, text))
        return hmac.new(self._secret, said.encode(), hashlib.sha256).hexdigest()
