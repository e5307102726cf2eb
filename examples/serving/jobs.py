"""What a server was asked for: jobs, the events that they tell, and the queue in which they wait."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any

WAITING, REMEMBERED = 64, 256  # jobs that may wait, and jobs that are known by their id; the oldest is forgotten
ENDS = ("done", "cancelled", "error")  # events after which none comes

Event = tuple[int, str, dict[str, Any]]


class Refused(Exception):
    """A job is not taken: too many wait, or the server ends."""


class Job:
    """One request. The thread that computes tells it events; any number of clients may follow them."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.seed, self.steps = int(asked["seed"]) % 2**63, min(max(int(asked["steps"]), 1), 1000)
        self.id, self.picture = secrets.token_hex(8), b""
        self.started = self.cancelled = False
        self._events: list[Event] = []
        self._told = threading.Condition()

    def tell(self, event: str, **data: Any) -> None:
        """Add an event, unless the job has ended."""
        with self._told:
            if not (self._events and self._events[-1][1] in ENDS):
                self._events.append((len(self._events), event, data))
                self._told.notify_all()

    @property
    def last_event(self) -> str:
        """What it told last."""
        return self._events[-1][1]

    def start(self) -> bool:
        """Whether it is still wanted; from here on :meth:`cancel` takes effect after the step that runs."""
        with self._told:
            self.started = not self.cancelled
            return self.started

    def cancel(self) -> None:
        """Ask for its end: at once while it waits, else between two steps."""
        with self._told:
            self.cancelled = True
            waits = not self.started
        if waits:
            self.tell("cancelled")

    def events(self, first: int = 0, every_s: float = 1.0) -> Iterator[Event | None]:
        """The events from number ``first`` on, each as it comes, to the last; None where none came for ``every_s``."""
        while True:
            with self._told:
                if len(self._events) <= first:
                    self._told.wait(every_s)
                fresh = self._events[first:]
            yield from fresh or [None]
            first += len(fresh)
            if fresh and fresh[-1][1] in ENDS:
                return


class Jobs:
    """The jobs that wait, in the order in which they came, and the last ones by their id."""

    def __init__(self) -> None:
        self.ready = False  # the model is compiled
        self.stop_at = float("inf")  # time.monotonic() from which on no step is started
        self._waiting: queue.Queue[Job] = queue.Queue()
        self._by_id: dict[str, Job] = {}
        self._closed = ""
        self._lock = threading.Lock()

    @property
    def stopping(self) -> bool:
        """Whether a signal has asked for the end."""
        return self.stop_at != float("inf")

    def stop(self, within_s: float) -> None:
        """Ask for the end; what waits has so many seconds. For signal handlers: it takes no lock."""
        self.stop_at = time.monotonic() + within_s

    def put(self, job: Job) -> None:
        """Let it wait for its turn.

        Raises:
            Refused: too many wait, or the server ends.
        """
        with self._lock:
            ahead = self._waiting.qsize()
            if self._closed or self.stopping or ahead >= WAITING:
                raise Refused(self._closed or ("the server stops" if self.stopping else f"{ahead} requests wait"))
            self._by_id[job.id] = job
            while len(self._by_id) > REMEMBERED:
                del self._by_id[next(iter(self._by_id))]
            job.tell("queued", ahead=ahead)
            self._waiting.put(job)

    def get(self, job_id: str) -> Job | None:
        """The job of that id, if it is remembered."""
        return self._by_id.get(job_id)

    def next(self, timeout_s: float) -> Job | None:
        """The next job, to be computed; None where none comes in time."""
        try:
            return self._waiting.get(timeout=0.0 if self.stopping else timeout_s)
        except queue.Empty:
            return None

    def over(self) -> bool:
        """Whether to end now: asked for, and nothing waits or the time for what waits is over."""
        return self.stopping and (self._waiting.empty() or time.monotonic() > self.stop_at)

    def close(self, why: str) -> None:
        """Take no more, and tell those that have not ended why they are not computed."""
        with self._lock:
            self._closed, self.ready = why, False
            for job in self._by_id.values():
                job.tell("error", error=why)
