"""What a model reads beside its inputs: ranks compare it, or get rank 0's. Never silently different."""

from __future__ import annotations

from pathlib import Path

import hidden_cases
import pytest
from processes import preload, run_outcomes, run_processes

pytestmark = pytest.mark.ranks

preload("hidden_cases")


@pytest.mark.parametrize("machine_of", [(0, 0), pytest.param((0, 1), marks=pytest.mark.thorough)], ids=str)
def test_generators_and_written_buffers_are_compared_or_shared(machine_of: tuple[int, ...]) -> None:
    run_processes(2, hidden_cases.run, ("hidden_inputs",), machine_of)


def test_python_numbers_that_change_are_inputs() -> None:
    run_processes(2, hidden_cases.run, ("numbers",))


def test_inputs_of_a_class_of_their_own_are_inputs_like_others() -> None:
    run_processes(2, hidden_cases.run, ("named_tensors",))


def test_so_it_is_with_packages(tmp_path: Path) -> None:
    run_processes(2, hidden_cases.run, ("package", str(tmp_path / "noisy.sf")))


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("other_constants", "traced other code than rank 0, or has other constants"),
        ("other_memory", "the ranks are not in the same call"),
    ],
)
def test_other_constants_and_moved_weights_are_errors(case: str, text: str) -> None:
    for outcome in run_outcomes(2, hidden_cases.run, (case,)):
        assert text in str(outcome.error), f"rank {outcome.rank}:\n{outcome.log[-3000:]}"
