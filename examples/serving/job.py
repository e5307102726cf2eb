"""What a client asked for, and the events that it tells: any number of clients may follow them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from typing import Any

ENDS = ("done", "cancelled", "error")  # events after which none comes

Event = tuple[int, str, dict[str, Any]]


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
            if not self._has_ended():
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
                if len(self._events) <= first and not self._has_ended():
                    self._told.wait(every_s)
                fresh, ended = self._events[first:], self._has_ended()
            yield from fresh or ([] if ended else [None])
            first += len(fresh)
            if ended:  # also for who has had the last event, or asks for later ones
                return

    def _has_ended(self) -> bool:
        return bool(self._events) and self._events[-1][1] in ENDS
