"""Meetings come about for all ranks or for none, and ranks that failed in one meet in the next."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from sfcompile.errors import (
    PeerDiedError,
    PeerFailedError,
    RankMismatchError,
    RuntimeTimeoutError,
    StreamFusionError,
)
from sfcompile.runtime.rank.job_store import JobStore
from sfcompile.runtime.rank.meetings import Meetings, ranks_in_words
from sfcompile.runtime.rank.presence import Presence


def run(ranks: int, work: Callable[[int, Meetings], Any], timeout_s: float = 30.0) -> list[Any]:
    """``work`` on one thread per rank, over one store; what it returned or raised, by rank."""
    shared, results = dist.HashStore(), [None] * ranks

    def body(rank: int) -> None:
        store = JobStore(shared)
        notice = lambda: store.get("failed", 5.0)  # noqa: E731
        meetings = Meetings(store, rank, ranks, Presence(store, rank, timeout_s), timeout_s, notice)
        try:
            results[rank] = work(rank, meetings)
        except BaseException as error:
            results[rank] = error
        store.close()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_everybody_gets_everybodys_value() -> None:
    def work(rank: int, meetings: Meetings) -> Any:
        return [meetings.exchange((rank, i), "meet") for i in range(3)]

    expected = [[(rank, i) for rank in range(3)] for i in range(3)]
    assert run(3, work) == [expected] * 3


def test_ranks_that_meet_for_different_things_all_hear_which() -> None:
    def work(rank: int, meetings: Meetings) -> Any:
        try:
            meetings.exchange(None, "compile a graph" if rank < 2 else "start afresh")
        except RankMismatchError as error:
            return str(error), meetings.exchange(rank, "meet")
        return None

    for text, after in run(3, work):
        assert "rank 0 is about to compile a graph, and rank 2 to start afresh" in text
        assert after == [0, 1, 2]


def test_who_is_late_joins_where_the_others_wait() -> None:
    """Two ranks give up twice; the third comes late, and all meet in the same attempt."""
    attempts = []

    def work(rank: int, meetings: Meetings) -> Any:
        if rank == 2:
            while len(attempts) < 4:
                time.sleep(0.01)
            return meetings.exchange(rank, "meet", 30.0)
        while True:
            try:
                return meetings.exchange(rank, "meet", 1.0 if len(attempts) < 4 else 30.0)
            except RuntimeTimeoutError as error:
                assert "rank 2 did not" in str(error)
                attempts.append(rank)

    assert run(3, work, timeout_s=1.0) == [[0, 1, 2]] * 3


def test_an_interrupt_in_a_meeting_ends_it_for_all() -> None:
    seen = threading.Event()

    def work(rank: int, meetings: Meetings) -> Any:
        if rank == 0:  # as if Ctrl-C came while this rank looked round
            meetings._presence.gone = interrupted  # type: ignore[method-assign]
            try:
                meetings.exchange(rank, "meet")
            except KeyboardInterrupt:
                del meetings._presence.gone
                seen.set()
        elif rank == 1:
            try:
                return meetings.exchange(rank, "meet")  # it came late, when the others met again
            except PeerFailedError as error:
                assert "rank 0: KeyboardInterrupt" in str(error)
        else:
            assert seen.wait(30.0)
        return meetings.exchange(rank, "meet")

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    assert run(3, work) == [[0, 1, 2]] * 3


def test_an_interrupt_when_all_have_met_leaves_ranks_in_step() -> None:
    """It hits a rank that has not heard how the meeting ended, or one that only lingers: the next one is in step."""

    def work(rank: int, meetings: Meetings) -> Any:
        for place in ("get_all", "add"):
            real = getattr(meetings._store, place)

            def hit(*args: Any, real: Any = real, place: str = place) -> Any:
                value = real(*args)
                if value is not None:
                    setattr(meetings._store, place, real)
                    raise KeyboardInterrupt
                return value

            if rank == 1:
                setattr(meetings._store, place, hit)
                try:
                    meetings.exchange(rank, "meet")
                except KeyboardInterrupt:
                    pass
            else:
                with contextlib.suppress(PeerFailedError):  # where the interrupt was first to say how it ended
                    meetings.exchange(rank, "meet")
            assert meetings.exchange(rank, "meet", 1.0) == [0, 1]
        return True

    assert run(2, work) == [True, True]


def test_a_rank_that_left_is_not_waited_for() -> None:
    def work(rank: int, meetings: Meetings) -> Any:
        if rank == 2:
            meetings._presence.leave(5.0)
            return None
        return meetings.exchange(rank, "meet", 20.0)

    for error in run(3, work)[:2]:
        assert isinstance(error, PeerDiedError) and "rank 2 has gone" in str(error) and "script ended" in str(error)


def test_a_notice_ends_the_meeting() -> None:
    def work(rank: int, meetings: Meetings) -> Any:
        if rank == 1:
            time.sleep(0.3)
            return meetings._store.first("failed", "rank 1: ValueError: mine", 5.0)
        return meetings.exchange(rank, "meet")

    error = run(2, work)[0]
    assert isinstance(error, PeerFailedError) and "rank 1: ValueError: mine" in str(error)


def test_a_notice_that_came_before_ends_it_too_but_where_ranks_start_afresh() -> None:
    given_up = threading.Event()

    def work(rank: int, meetings: Meetings) -> Any:
        meetings._store.first("failed", "rank 1: ValueError: mine", 5.0)
        if rank == 0:
            with pytest.raises(PeerFailedError, match="rank 1: ValueError: mine"):
                meetings.exchange(rank, "choose a plan", 20.0)
            given_up.set()
        assert given_up.wait(30.0)
        return meetings.exchange(rank, "compile a graph", afresh=True)

    assert run(2, work) == [[0, 1]] * 2


def test_who_hears_late_of_a_failure_is_told_of_it_and_not_of_other_calls() -> None:
    """Rank 1 failed and begins anew while rank 0 is still in the compile."""

    def work(rank: int, meetings: Meetings) -> Any:
        meetings._store.first("failed", "rank 1: ValueError: mine", 5.0)
        meetings._presence.gone = lambda ranks, limit_s: None  # type: ignore[method-assign]
        meetings._obstacle = lambda *facts: None  # type: ignore[method-assign]  # it has not looked round yet
        if rank == 0:
            return meetings.exchange(rank, "choose a plan")
        return meetings.exchange(rank, "compile a graph", afresh=True)

    first, second = run(2, work)
    assert isinstance(first, PeerFailedError) and "rank 1: ValueError: mine" in str(first)
    assert isinstance(second, RankMismatchError) and "rank 0 is about to choose a plan" in str(second)


def test_who_waits_in_vain_says_what_it_knows() -> None:
    """After a failure the missing rank has not called again; without one it may do something else."""

    def work(rank: int, meetings: Meetings, failed: bool) -> Any:
        if failed:
            meetings._store.first("failed", "rank 1: KeyboardInterrupt", 5.0)
        return meetings.exchange(rank, "start afresh", afresh=True) if rank == 0 else None

    after = run(2, lambda rank, meetings: work(rank, meetings, True), timeout_s=0.3)[0]
    before = run(2, lambda rank, meetings: work(rank, meetings, False), timeout_s=0.3)[0]
    assert isinstance(after, RuntimeTimeoutError) and isinstance(before, RuntimeTimeoutError)
    assert "failed before (rank 1: KeyboardInterrupt)" in str(after) and "Call again on every rank" in str(after)
    assert "failed before" not in str(before) and "inputs of the same shapes" in str(before)


def test_words_that_cannot_be_read() -> None:
    def work(rank: int, meetings: Meetings) -> Any:
        if rank == 1:
            meetings._store.set("meeting/0.0/1", "gASVpickle", 5.0)
            return meetings._store.get_all(["meeting/0.0/0", "meeting/0.0/1"], 5.0) and None
        return meetings.exchange(rank, "meet")

    error = run(2, work)[0]
    assert isinstance(error, RankMismatchError) and "cannot read" in str(error)


def test_the_last_rank_arrives_as_the_others_give_up() -> None:
    """Whatever the moment: a meeting has come about on every rank, or on none."""
    rng = random.Random(7)
    for _ in range(12):
        pause = 0.5 + rng.uniform(-0.08, 0.25)  # around the others' limit and their look round

        def work(rank: int, meetings: Meetings, pause: float = pause) -> Any:
            if rank == 2:
                time.sleep(pause)
            outcomes = []
            while "met" not in outcomes:
                try:
                    meetings.exchange(rank, "meet", 1.0 if not outcomes else 60.0)
                    outcomes.append("met")
                except StreamFusionError:
                    outcomes.append("gave up")
            return meetings._attempt, meetings._met, meetings.exchange(rank, "meet again", 60.0)

        results = run(3, work, timeout_s=0.5)
        assert results == [(0, 1, [0, 1, 2])] * 3, results


@pytest.mark.parametrize(
    ("some", "text"), [([3], "rank 3"), ([3, 5], "ranks 3, 5"), (list(range(9)), "ranks 0, 1, 2, 3, 4, 5, 6, 7 ...")]
)
def test_ranks_in_words(some: list[int], text: str) -> None:
    assert ranks_in_words(some) == text
