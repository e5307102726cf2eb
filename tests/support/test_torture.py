"""The judge of the table of faults sees what it must: records of good and bad jobs, without ranks."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from torture.job import JobRecord, RankRecord
from torture.judge import judge
from torture.kill_points import kill_points
from torture.table import Fault, all_faults

T = 4.0


def job(*ranks: tuple[int | None, list[dict[str, Any]]], left: tuple[str, ...] = ()) -> JobRecord:
    """A job that began at 0 and whose ranks ended with these exit codes and records."""

    def nothing(rank: object) -> None:
        """No rank runs it."""

    fault = Fault("name", "kind", nothing, "expected", timeout_s=T)
    records = [
        RankRecord(number, code, lines[-1]["at"] + 0.1 if lines else 1.0, lines, "")
        for number, (code, lines) in enumerate(ranks)
    ]
    return JobRecord(fault, 0.0, records, list(left))


def life(
    outcome: str, must: str = "exact", began: float = 1.0, ended: float = 2.0, **facts: Any
) -> list[dict[str, Any]]:
    """The record of a rank that made one attempt."""
    end = {
        "what": "end",
        "at": ended,
        "name": "call",
        "must": must,
        "outcome": outcome,
        "error": "E",
        "text": "t",
    } | facts
    begin = {"what": "begin", "at": began, "name": "call", "must": must}
    return [{"what": "start", "at": 0.1}, begin, end, {"what": "over", "at": ended}, {"what": "exit", "at": ended}]


def test_good_jobs_pass() -> None:
    assert judge(job((0, life("exact")), (0, life("exact")))).passes
    assert judge(job((0, life("ours", "error")), (0, life("ours", "error")))).passes
    assert judge(job((0, life("ours", "error")), (0, life("own", "error")))).passes


@pytest.mark.parametrize(
    ("ranks", "word"),
    [
        ([(0, life("exact")), (0, life("wrong"))], "SILENT WRONG rank 1"),
        ([(0, life("raw", "error")), (0, life("ours", "error"))], "RAW ERROR rank 0"),
        ([(0, life("ours", "error")), (0, life("exact", "error"))], "NO ERROR rank 1"),
        ([(0, life("ours")), (0, life("exact"))], "NOT EXACT rank 0"),
        ([(0, life("broken")), (0, life("exact"))], "BROKEN RULE rank 0"),
        ([(None, life("exact")[:2]), (0, life("exact"))], "HANG rank 0 in call"),
        ([(-signal.SIGSEGV, life("exact")[:2]), (0, life("exact"))], "CRASH rank 0 ended by signal 11"),
        ([(0, life("ours", "error", ended=1.0 + T + 5.1)), (0, life("ours", "error"))], "LATE rank 0"),
        ([(-signal.SIGKILL, []), (-signal.SIGKILL, [])], "CRASH"),
    ],
)
def test_bad_jobs_are_told(ranks: list[tuple[int | None, list[dict[str, Any]]]], word: str) -> None:
    verdict = judge(job(*ranks))
    assert any(problem.startswith(word) for problem in verdict.problems), verdict.problems


def test_what_is_left_and_what_never_happened_is_told() -> None:
    assert "LEFTOVERS /dev/shm/x" in judge(job((0, life("exact")), (0, life("exact")), left=("/dev/shm/x",))).problems
    armed = [*life("exact"), {"what": "armed", "at": 0.5, "target": "a:b"}]
    assert "BROKEN FAULT rank 0 never came to a:b" in judge(job((0, armed), (0, life("exact")))).problems
    code = [*life("exact"), {"what": "uncaught", "at": 3.0, "error": "KeyError", "text": "'q'"}]
    assert "RAW ERROR rank 0 ended with KeyError: 'q'" in judge(job((1, code), (0, life("exact")))).problems


def test_a_victim_may_end_as_it_likes_but_never_with_a_wrong_value() -> None:
    struck = {"what": "fault", "at": 1.5, "victim": True}
    killed = [*life("exact")[:2], struck]
    assert judge(job((-signal.SIGKILL, killed), (0, life("ours", "error")))).passes
    wrong = judge(job((0, [struck, *life("wrong")]), (0, life("ours", "error"))))
    assert not wrong.passes


def test_an_error_counts_from_the_fault_and_from_the_last_ranks_arrival() -> None:
    late, early = life("ours", "error", began=20.0, ended=21.0), life("ours", "error", began=1.0, ended=21.0)
    assert judge(job((0, early), (0, late))).passes


def test_the_table_has_every_kind_and_kill_points_repeat() -> None:
    faults = all_faults()
    assert len(faults) >= 60
    assert {"out_of_step", "compile", "process", "groups", "network", "disk"} <= {fault.kind for fault in faults}
    lives_s = {False: 4.0, True: 10.0}
    first, second = (kill_points(20, 3, lives_s) for _ in range(2))
    assert [fault.name for fault in first] == [fault.name for fault in second]
