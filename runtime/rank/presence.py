"""Who is still there: every rank beats its heart in the store, and leaves a word when it ends.

A rank has gone when its process has (seen at once from the same machine), when it has left the word that its script
ended, or when its heart has not been heard for ``timeout_s``: killed on another machine, stopped, or cut off.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from sfcompile.runtime.rank.job_store import JobStore
from sfcompile.runtime.wires.direct import process_lives

_WATCHED = 64
"""So many of the missing ranks are watched at a time."""
_EVERY_S = 1.0
"""Seconds between two beats: the same on all ranks and for ever, whatever ``timeout_s`` a later compile brings."""
_MISSED = 4
"""However short ``timeout_s`` is, so many beats must have been missed."""


def home() -> str:
    """Processes with the same answer see each other's process ids: one boot of one kernel, one pid namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
            return f"{boot.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"unknown/{os.getpid()}"


def how_it_ended() -> str:
    """Why this process ends, in words for other ranks, asked while it ends."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if error is None:
        return "its script ended"
    text = str(error).strip().splitlines()
    return f"its script ended with {type(error).__name__}{': ' + text[0][:200] if text else ''}"


class Presence:
    """This rank's heart, and what it hears of the others'.

    Args:
        timeout_s: silence after which a rank counts as gone.
    """

    def __init__(self, store: JobStore, rank: int, timeout_s: float) -> None:
        self._store = store
        self._rank = rank
        self._home = home()
        self._heard: dict[int, tuple[str, float]] = {}  # last word of each rank, and when it was new
        self.timeout_s = timeout_s
        store.beat(f"alive/{rank}", f"{self._home} {os.getpid()}", _EVERY_S)

    def leave(self, limit_s: float) -> None:
        """Say that this rank ends, and why."""
        self._store.set(f"left/{self._rank}", how_it_ended(), limit_s)

    def gone(self, ranks: Sequence[int], limit_s: float, silence: bool = True) -> tuple[int, str] | None:
        """The first of some ranks that has gone, and how that is known; None: all may still come.

        Args:
            silence: whether a rank whose heart is not heard counts; nobody who waits for it may only be at rest.

        Raises:
            StoreLostError: the store does not answer.
        """
        watched = list(ranks)[:_WATCHED]
        for rank, left in zip(watched, self._store.present([f"left/{r}" for r in watched], limit_s), strict=True):
            if left:
                return rank, self._store.get(f"left/{rank}", limit_s) or "its script ended"
        for rank in watched:
            word = self._store.get(f"alive/{rank}", limit_s)
            if word is not None and (why := self._silent(rank, word, silence)):
                return rank, why
        return None

    def _silent(self, rank: int, word: str, silence: bool) -> str | None:
        its_home, _, pid = word.rpartition(" ")[0].rpartition(" ")
        if its_home == self._home and pid.isdigit() and not process_lives(int(pid)):
            return f"its process {pid} has gone: killed, or crashed"
        if not silence:
            return None
        now = time.monotonic()
        last, since = self._heard.get(rank, ("", now))
        if word != last:
            self._heard[rank] = word, now
            return None
        if now - since > max(self.timeout_s, _MISSED * _EVERY_S):
            return f"its process {pid} has shown no sign of life for {now - since:.0f} s: stopped, killed or cut off"
        return None
