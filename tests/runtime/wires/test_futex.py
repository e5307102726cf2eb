"""Futexes: sleep, wake, and no wake-up lost."""

from __future__ import annotations

import threading
import time

import numpy as np

from sfcompile.runtime.wires import futex


def test_a_word_that_has_changed_does_not_sleep() -> None:
    word = np.array([5], dtype=np.int64)
    start = time.monotonic()
    futex.wait(word.ctypes.data, 4, 5.0)
    assert time.monotonic() - start < 1.0


def test_a_sleep_ends_at_its_limit() -> None:
    word = np.array([5], dtype=np.int64)
    start = time.monotonic()
    futex.wait(word.ctypes.data, 5, 0.05)
    assert time.monotonic() - start < 1.0


def test_every_turn_of_two_threads_is_seen() -> None:
    """Ping-pong: a lost wake-up would cost the whole limit of a wait."""
    words = np.zeros(16, dtype=np.int64)
    turns = 500

    def play(mine: int, other: int, ahead: int) -> None:
        for turn in range(1, turns + 1):
            while (seen := int(words[other])) < turn - ahead:
                futex.wait(words.ctypes.data + 8 * other, seen, 5.0)
            words[mine] = turn
            futex.wake(words.ctypes.data + 8 * mine)

    start = time.monotonic()
    threads = [threading.Thread(target=play, args=(0, 8, 1)), threading.Thread(target=play, args=(8, 0, 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert words[0] == words[8] == turns
    assert time.monotonic() - start < 5.0
