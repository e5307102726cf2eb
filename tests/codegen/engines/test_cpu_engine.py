"""attention='triton' on CPU ranks: the interpreter as the executor's engine."""

from __future__ import annotations

import device_workers
import pytest
from processes import run_outcomes, run_processes

from sfcompile.errors import PeerFailedError, RuntimeTimeoutError
from sfcompile.options import AS_IT_IS, Wire

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(
    ("ranks", "seed", "wire"), [pytest.param(2, 3, AS_IT_IS, marks=pytest.mark.thorough), (3, 8, Wire(*["fp8"] * 4))]
)
def test_attention_runs_in_the_interpreter_over_shared_memory(ranks: int, seed: int, wire: Wire) -> None:
    for result in run_processes(ranks, device_workers.interpreted, (seed, 2, wire)):
        assert result["error"] < 1e-5 and result["same"] and result["names"] == []


def test_a_rank_that_sleeps_is_named_from_inside_the_kernel() -> None:
    outcomes = run_outcomes(2, device_workers.sleeps, (1,))
    assert isinstance(outcomes[0].error, RuntimeTimeoutError | PeerFailedError)
    assert "inside an attention kernel" in str(outcomes[0].error)


def test_other_machines_are_refused() -> None:
    outcomes = run_outcomes(2, device_workers.interpreted, (3, 1), (0, 1))
    assert all("attention='triton' runs on CPU ranks" in str(outcome.error) for outcome in outcomes)
