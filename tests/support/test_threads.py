"""Ranks as threads."""

from __future__ import annotations

import pytest
from threads import run_threads

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
