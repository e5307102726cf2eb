"""The test beds themselves."""

from __future__ import annotations

import pytest
import rank_workers
from threads import run_outcomes, run_processes, run_threads

from sfcompile.errors import RuntimeTimeoutError
from sfcompile.runtime.rank.session import current_session


def test_threads_have_sessions_of_their_own() -> None:
    assert run_threads(3, lambda rank: (rank, current_session().rank, current_session().topology.num_ranks)) == [
        (0, 0, 3),
        (1, 1, 3),
        (2, 2, 3),
    ]


def test_the_real_error_of_threads_is_raised() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            raise KeyError("rank 1's own")
        current_session().agree("x", {})

    with pytest.raises(KeyError, match="rank 1's own"):
        run_threads(2, work)


def test_processes_return_by_rank() -> None:
    assert run_processes(3, rank_workers.environment, machine_of=(0, 1, 1)) == [
        ("0", "3", "0", "0"),
        ("1", "3", "0", "1"),
        ("2", "3", "1", "1"),
    ]


def test_the_first_error_of_processes_is_raised_with_its_rank() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_processes(2, rank_workers.divides)
    assert caught.value.__notes__ == ["on rank 1 of 2"]


def test_a_process_that_hangs_is_ended() -> None:
    outcomes = run_outcomes(2, rank_workers.hangs, timeout_s=2.5)
    assert [outcome.exit_code for outcome in outcomes] == [0, None]
    with pytest.raises(RuntimeTimeoutError, match="rank 1 of 2 ended with exit code None"):
        run_processes(2, rank_workers.hangs, timeout_s=2.5)
