"""A timed stretch of one rank's work: what simulators predict, real runs record, and pictures show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """From ``start_s`` to ``stop_s``, in seconds since the start of the run.

    Attributes:
        lane: what was busy: "compute", "wait" (blocked), "send" (inside the machine) or "network" (between machines).
        name: for people.
        nbytes: bytes moved, for sends.
        peer: the receiver of a send.
    """

    rank: int
    lane: str
    name: str
    start_s: float
    stop_s: float
    nbytes: int = 0
    peer: int | None = None
