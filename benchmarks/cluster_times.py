"""Where a step's time goes, read off recorded steps (runtime/rank/recorder.py) of one rank of benchmarks/cluster.py.

Parts of a step are told apart by what the rank's own thread does, so they add up to the step. CPU time of the other
threads of the rank, which move bytes between machines, is beside them: it shares the machine's core with all that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sfcompile.runtime.rank import partials, recorder
from sfcompile.runtime.rank.recorder import Event, Recorder

PARTS = {
    "model": "the model's own ops between our stages, their dispatch included",
    "attention": "attention calls, and the joining of chunks before them",
    "merges": "merging of partial results through their log-sum-exp",
    "python": "our stages beyond that: Python, copies of what stays with the rank, of outputs, encoding",
    "sends": "the thread's own part of messages: copies into a peer's memory or a socket's queue",
    "fill": "waits before the step's first attention call",
    "waits": "waits between the first attention call and the last",
    "drain": "waits after the last attention call: its outputs, the gather of the model's output",
}
"""Parts of a step of the slowest rank; they add up to it."""
BESIDE = {
    "slowed": "how much longer all but sends and waits take than in the step without communication: CPU that other "
    "threads and ranks took meanwhile (part of the columns before)",
    "wire cpu": "CPU time of the rank's other threads: wires (beside the columns before)",
}
WORK = ("model", "attention", "merges", "python")


def parts_of(events: Sequence[Event], start_s: float, stop_s: float, merges_s: float = 0.0) -> dict[str, float]:
    """Seconds of each of :data:`PARTS` in one rank's step.

    Args:
        events: what was recorded between ``start_s`` and ``stop_s``, which are on the same clock.
        merges_s: how much of the attention calls was merging.
    """
    lanes = {
        lane: sum(event.stop_s - event.start_s for event in events if event.lane == lane)
        for lane in ("stage", "compute", "send", "network", "wait")
    }
    calls = [event for event in events if event.lane == "compute"]
    first = min((event.start_s for event in calls), default=start_s)
    last = max((event.stop_s for event in calls), default=start_s)
    waits = [event for event in events if event.lane == "wait"]
    fill = sum(event.stop_s - event.start_s for event in waits if event.start_s < first)
    drain = sum(event.stop_s - event.start_s for event in waits if event.start_s >= last)
    sends = lanes["send"] + lanes["network"]
    return {
        "model": stop_s - start_s - lanes["stage"],
        "attention": lanes["compute"] - merges_s,
        "merges": merges_s,
        "python": lanes["stage"] - lanes["compute"] - sends - lanes["wait"],
        "sends": sends,
        "fill": fill,
        "waits": lanes["wait"] - fill - drain,
        "drain": drain,
    }


def traced(step: Callable[[], Any], rank: int) -> dict[str, float]:
    """Run one step of this rank and tell its parts, ``step`` in seconds and ``wire cpu`` beside them."""
    before, mine = recorder.active, Recorder()
    recorder.active = mine
    with _merges() as merging:
        cpu_s, thread_s, start_s = time.process_time(), time.thread_time(), time.perf_counter()
        try:
            step()
        finally:
            recorder.active = before
        stop_s = time.perf_counter()
        others_s = (time.process_time() - cpu_s) - (time.thread_time() - thread_s)
    own = [event for event in mine.events if event.rank == rank]
    parts = parts_of(own, start_s, stop_s, sum(merging))
    return {**parts, "step": stop_s - start_s, "wire cpu": max(0.0, others_s)}


def mean(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means of several steps' parts."""
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


def slowed(parts: dict[str, float], silent: dict[str, float]) -> float:
    """Seconds by which a step's own work takes longer than in one without communication."""
    return sum(parts[name] - silent[name] for name in WORK)


@contextmanager
def _merges() -> Iterator[list[float]]:
    """A clock around the merges of partial results; yields the seconds of each."""
    merge, seconds = partials.merge, []

    def clocked(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return merge(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    partials.merge = clocked
    try:
        yield seconds
    finally:
        partials.merge = merge
