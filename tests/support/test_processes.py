"""Ranks as processes."""

from __future__ import annotations

import os

import pytest
import rank_workers
from processes import RankError, run_outcomes, run_processes

from sfcompile.errors import RuntimeTimeoutError

pytestmark = pytest.mark.ranks


def test_processes_return_by_rank() -> None:
    assert run_processes(3, rank_workers.environment, machine_of=(0, 1, 1)) == [
        ("0", "3", "0", "0"),
        ("1", "3", "0", "1"),
        ("2", "3", "1", "1"),
    ]


def test_the_first_error_of_processes_is_raised_with_its_rank() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_processes(2, rank_workers.divides)
    where, log = caught.value.__notes__
    assert where == "on rank 1 of 2" and "return 1 / (1 - rank)" in log


def test_a_process_that_hangs_is_ended() -> None:
    outcomes = run_outcomes(2, rank_workers.hangs, timeout_s=2.5)
    assert [outcome.exit_code for outcome in outcomes] == [0, None]
    with pytest.raises(RuntimeTimeoutError, match="rank 1 of 2 ended with exit code None"):
        run_processes(2, rank_workers.hangs, timeout_s=2.5)


def test_ranks_are_forked_from_a_server_that_has_imported() -> None:
    """Else every rank would import for seconds: multiprocessing passes over what its server cannot import."""
    (first, rank0), (second, rank1) = run_processes(2, rank_workers.imported_by)
    assert first == second and first not in (rank0, rank1, os.getpid())


def test_an_error_that_cannot_travel_says_the_same() -> None:
    (outcome,) = run_outcomes(1, rank_workers.raises_what_cannot_travel)
    assert isinstance(outcome.error, RankError) and "Private: of two arguments: a, b" in str(outcome.error)
    assert "raise Private" in outcome.log and "on the way" in outcome.log
