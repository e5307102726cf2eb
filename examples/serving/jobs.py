"""The queue in which jobs wait, and where they are found by their id."""

from __future__ import annotations

import queue
import threading
import time

from serving.job import Job

WAITING, REMEMBERED = 64, 256  # jobs that may wait, and jobs that are known by their id; the oldest is forgotten


class Refused(Exception):
    """A job is not taken: too many wait, or the server ends."""


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
