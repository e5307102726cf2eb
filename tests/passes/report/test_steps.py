"""Steps beside their prediction: said after some calls; a cause for each way to be slower or faster."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from sfcompile.passes.report.steps import FIRST_CALLS, LAST_CALLS, LEAST_CALLS, PredictedStep, StepWatch
from sfcompile.runtime.program.topology import Topology

TOPOLOGY = Topology.grid(2, 2)
PLANNED = PredictedStep(1.0, 0.2)


def watch(seconds: float, waited_s: Mapping[int, float], calls: int = 5) -> StepWatch:
    """Of rank 0, after some like calls and the slow first ones."""
    watched = StepWatch(0, TOPOLOGY, lambda: PLANNED)
    for _ in range(FIRST_CALLS):
        watched.note(100.0, {1: 99.0})
    for _ in range(calls):
        watched.note(seconds, waited_s)
    return watched


def test_nothing_is_said_before_some_calls() -> None:
    assert watch(1.0, {}, LEAST_CALLS - 1).summary == ""
    assert watch(1.0, {}, LEAST_CALLS).summary != ""


@pytest.mark.parametrize("seconds", [0.8, 1.0, 1.29])
def test_steps_as_planned(seconds: float) -> None:
    text = watch(seconds, {2: 0.2}).summary
    assert text == f"{seconds:g} s (median of 5 calls on rank 0), predicted 1 s"


@pytest.mark.parametrize(
    ("seconds", "waited_s", "cause"),
    [
        (
            1.5,
            {2: 0.1, 3: 0.1},
            "compute is slower than the plan's constants say (1.3 s outside waits, 0.8 s predicted)",
        ),
        (2.0, {2: 0.6, 3: 0.5}, "links between machines are slower than the plan's constants say (1.1 s of waits"),
        (2.0, {2: 1.0, 3: 0.1}, "rank 2 is late, or the link to it is slow (1.1 s of waits, 0.2 s predicted, 91% of"),
        (2.0, {1: 1.0, 2: 0.1}, "rank 1 of the same machine is late (1.1 s of waits"),
        (2.0, {3: 1.1}, "links between machines are slower"),
    ],
)
def test_slower_steps_have_a_likely_cause(seconds: float, waited_s: Mapping[int, float], cause: str) -> None:
    text = watch(seconds, waited_s).summary
    assert "SLOWER than planned; likely cause: " in text and cause in text


@pytest.mark.parametrize(
    ("seconds", "waited_s", "cause"),
    [(0.5, {2: 0.2}, "compute is faster"), (0.6, {}, "compute is faster"), (0.75, {2: 0.001}, "links carry more")],
)
def test_faster_steps_have_one_too(seconds: float, waited_s: Mapping[int, float], cause: str) -> None:
    assert cause in watch(seconds, waited_s).summary


def test_the_last_calls_count() -> None:
    watched = watch(9.0, {2: 8.0})
    for _ in range(LAST_CALLS):
        watched.note(1.0, {2: 0.2})
    assert "planned" not in watched.summary and f"of {LAST_CALLS} calls" in watched.summary


def test_the_prediction_is_made_when_somebody_asks_and_once() -> None:
    made: list[None] = []

    def predict() -> PredictedStep:
        made.append(None)
        return PLANNED

    watched = StepWatch(0, TOPOLOGY, predict)
    for _ in range(10):
        watched.note(1.0, {})
    assert not made and watched.summary and watched.summary and len(made) == 1
