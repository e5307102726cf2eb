"""Messages between ranks that believe they sit on different machines."""

from __future__ import annotations

import pytest
import rank_workers

from sfcompile.errors import PeerDiedError, PeerFailedError, RuntimeTimeoutError
from sfcompile.runtime.testing import run_outcomes, run_processes


@pytest.mark.parametrize(("machine_of", "transport"), [((0, 1), "auto"), ((0, 0, 1, 1), "auto"), ((0, 0, 0), "c10d")])
@pytest.mark.parametrize("seed", [11, 12])
def test_attention_between_machines(machine_of: tuple[int, ...], transport: str, seed: int) -> None:
    results = run_processes(len(machine_of), rank_workers.attention, (seed, transport, 4), machine_of)
    for result in results:
        assert result["error"] < 1e-5 and result["same"] and result["machines"] == machine_of


def test_a_killed_rank_closes_its_connections() -> None:
    outcomes = run_outcomes(3, rank_workers.one_dies, ("auto", 2, "kill"), (0, 0, 1))
    assert outcomes[2].exit_code == -9
    for outcome in outcomes[:2]:
        assert isinstance(outcome.error, PeerDiedError | PeerFailedError) and "rank 2" in str(outcome.error)
        assert outcome.seconds < outcomes[2].seconds + 5


def test_a_failure_reaches_other_machines_with_its_first_words() -> None:
    outcomes = run_outcomes(3, rank_workers.one_dies, ("auto", 0, "raise"), (0, 1, 1))
    assert isinstance(outcomes[0].error, ValueError)
    for outcome in outcomes[1:]:
        assert isinstance(outcome.error, PeerFailedError)
        assert "failed first: rank 0: ValueError: the victim's own mistake" in str(outcome.error)


def test_a_rank_that_fails_and_lives_on_keeps_nobody_waiting() -> None:
    outcomes = run_outcomes(2, rank_workers.fails_and_lingers, (), (0, 1))
    assert isinstance(outcomes[0].error, PeerFailedError)
    assert outcomes[0].seconds < outcomes[1].seconds - 1


def test_a_slow_rank_is_a_timeout() -> None:
    outcomes = run_outcomes(2, rank_workers.one_dies, ("c10d", 1, "sleep"))
    assert isinstance(outcomes[0].error, RuntimeTimeoutError)
    assert "waited 2 s for its message with rank 1" in str(outcomes[0].error)
