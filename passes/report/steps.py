"""Steps of a graph as they were beside the predicted one, and where they differ, the likely cause."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from sfcompile.runtime.program.topology import Topology

FIRST_CALLS = 2
"""The first calls of a graph set things up: they do not count."""
LEAST_CALLS = 3
LAST_CALLS = 32
"""So many of the last calls count."""
TOLERANCE = 0.3
_MOST = 0.6


class PredictedStep(NamedTuple):
    """A predicted step of one rank: its seconds, and of them those in which it waits for others."""

    seconds: float
    waits_s: float


class _Took(NamedTuple):
    seconds: float
    waited_s: Mapping[int, float]


class StepWatch:
    """The last calls of one graph on this rank.

    Args:
        rank: this one, of ``topology``'s.
        predict: the step on that topology; called when somebody asks, once.
    """

    def __init__(self, rank: int, topology: Topology, predict: Callable[[], PredictedStep]) -> None:
        self._rank, self._topology, self._predict = rank, topology, predict
        self._expected: PredictedStep | None = None
        self._skipped = 0
        self._calls: deque[_Took] = deque(maxlen=LAST_CALLS)

    def note(self, seconds: float, waited_s: Mapping[int, float]) -> None:
        """One call has ended.

        Args:
            waited_s: seconds of it spent waiting for another rank, by rank; not changed any more.
        """
        if self._skipped < FIRST_CALLS:
            self._skipped += 1
        else:
            self._calls.append(_Took(seconds, waited_s))

    @property
    def summary(self) -> str:
        """Measured and predicted seconds; if they differ by more than TOLERANCE, why. "" before LEAST_CALLS calls."""
        if len(self._calls) < LEAST_CALLS:
            return ""
        self._expected = self._expected or self._predict()
        expected = self._expected
        took = statistics.median(call.seconds for call in self._calls)
        where = f"median of {len(self._calls)} calls on rank {self._rank}"
        text = f"{took:.3g} s ({where}), predicted {expected.seconds:.3g} s"
        if took > (1.0 + TOLERANCE) * expected.seconds:
            return f"{text}: SLOWER than planned; {self._why_slower(took, expected)}"
        if expected.seconds > (1.0 + TOLERANCE) * took:
            return f"{text}: faster than planned; {self._why_faster(took, expected)}"
        return text

    def _waited(self) -> float:
        return statistics.median(sum(call.waited_s.values()) for call in self._calls)

    def _why_slower(self, took: float, expected: PredictedStep) -> str:
        waited = self._waited()
        computed, planned = took - waited, expected.seconds - expected.waits_s
        if computed - planned >= waited - expected.waits_s:
            return (
                f"likely cause: compute is slower than the plan's constants say ({computed:.3g} s outside waits, "
                f"{planned:.3g} s predicted): is something else running on these cores?"
            )
        waits = f"{waited:.3g} s of waits, {expected.waits_s:.3g} s predicted"
        by_rank: Counter[int] = Counter()
        for call in self._calls:
            by_rank.update(call.waited_s)
        (latest, most), *others = by_rank.most_common()
        share = most / max(sum(by_rank.values()), 1e-12)
        if self._topology.same_machine(latest, self._rank):
            return f"likely cause: rank {latest} of the same machine is late ({waits}, {share:.0%} of them for it)"
        if share > _MOST and others:
            return (
                f"likely cause: rank {latest} is late, or the link to it is slow ({waits}, {share:.0%} of them for it)"
            )
        return f"likely cause: links between machines are slower than the plan's constants say ({waits})"

    def _why_faster(self, took: float, expected: PredictedStep) -> str:
        waited = self._waited()
        computed, planned = took - waited, expected.seconds - expected.waits_s
        if expected.waits_s - waited > planned - computed:
            waits = f"{waited:.3g} s of waits, {expected.waits_s:.3g} s predicted"
            return f"links carry more than the plan's constants say ({waits})"
        rest = f"{computed:.3g} s outside waits, {planned:.3g} s predicted"
        return f"compute is faster than the plan's constants say ({rest})"
