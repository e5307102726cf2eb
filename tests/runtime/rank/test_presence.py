"""Who has gone: a dead process, a word left at the end, silence."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch.distributed as dist

from sfcompile.runtime.rank import presence
from sfcompile.runtime.rank.job_store import JobStore
from sfcompile.runtime.rank.presence import Presence, home, how_it_ended


@pytest.fixture
def shared() -> Any:
    return dist.HashStore()


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_rank_that_is_here_has_not_gone(shared: Any) -> None:
    one, other = (Presence(JobStore(shared), rank, 60.0) for rank in range(2))
    assert one.gone([1], 1.0) is None and other.gone([0], 1.0) is None
    assert one.gone([5], 1.0) is None  # never seen: it may still start


def test_an_ended_process_of_this_machine_is_seen_at_once(shared: Any) -> None:
    one = Presence(JobStore(shared), 0, 60.0)
    shared.set("alive/1", f"{home()} {ended_process()} 7")
    gone = one.gone([1], 1.0)
    assert gone is not None and gone[0] == 1 and "killed, or crashed" in gone[1]


def test_process_ids_of_another_home_mean_nothing(shared: Any) -> None:
    one = Presence(JobStore(shared), 0, 60.0)
    shared.set("alive/1", f"elsewhere/1 {ended_process()} 7")
    assert one.gone([1], 1.0) is None


def test_garbage_is_no_sign_of_death(shared: Any) -> None:
    one = Presence(JobStore(shared), 0, 60.0)
    for word in ("", "x", f"{home()} -1 x", f"{home()} no 1", "\n \n \n"):
        shared.set("alive/1", word)
        assert one.gone([1], 1.0) is None


def test_who_left_said_why(shared: Any) -> None:
    one, other = (Presence(JobStore(shared), rank, 60.0) for rank in range(2))
    other.leave(1.0)
    assert one.gone([1], 1.0) == (1, "its script ended")


def test_silence_counts_from_the_last_new_word(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(presence.time, "monotonic", lambda: now)
    one = Presence(JobStore(shared), 0, 10.0)
    shared.set("alive/1", "elsewhere/1 7 1")
    assert one.gone([1], 1.0) is None
    now = 109.0
    assert one.gone([1], 1.0) is None
    shared.set("alive/1", "elsewhere/1 7 2")
    now = 118.0
    assert one.gone([1], 1.0) is None
    now = 128.5
    gone = one.gone([1], 1.0)
    assert gone is not None and "no sign of life for 10 s" in gone[1]


def test_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys, "last_exc", raising=False)
    monkeypatch.delattr(sys, "last_value", raising=False)
    assert how_it_ended() == "its script ended"
    monkeypatch.setattr(sys, "last_value", ValueError("no such prompt\nmore"), raising=False)
    assert how_it_ended() == "its script ended with ValueError: no such prompt"
    assert str(os.stat("/proc/self/ns/pid").st_ino) in home()
