"""Steps that all ranks take or none: what fails on one rank fails on every rank, in the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sfcompile.errors import StreamFusionError, UnsupportedError

T = TypeVar("T")
Share = Callable[[Any, str], list[Any]]
"""``share(value, doing)``: every rank's value, by rank; ``doing`` is for errors."""


def together(share: Share, doing: str, step: Callable[[], T]) -> T:
    """Collective: what ``step`` returns on this rank, once it has ended well on every rank.

    Args:
        step: waits for no rank without a limit of its own, or those that still wait would never be told.

    Raises:
        StreamFusionError: this rank's own, which every rank knows of then.
        UnsupportedError: ``step`` failed on another rank only; or here it only waited in vain for one where it failed.
    """
    problem: StreamFusionError | None = None
    results: list[T] = []
    try:
        results.append(step())
    except StreamFusionError as error:
        problem = error
    everyone = share(None if problem is None else (problem.what, problem.why, problem.fix, waited(problem)), doing)
    failed = [rank for rank, told in enumerate(everyone) if told is not None]
    first = min(failed, key=lambda rank: everyone[rank][3:] == (True,), default=None)
    if problem is not None and (not waited(problem) or first is None or everyone[first][3:] == (True,)):
        problem.on_every_rank = True
        raise problem
    if first is not None:
        what, why, fix, *_ = everyone[first]
        failure = UnsupportedError(f"rank {first}: {what}", why, fix)
        failure.on_every_rank = True
        raise failure
    return results[0]


def waited(error: StreamFusionError) -> bool:
    """Whether an error says only that time was up (bounded.py): what went wrong is another rank's to tell."""
    return isinstance(error.__cause__, TimeoutError)
