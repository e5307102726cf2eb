"""A limit around calls of others that keep none, or several in a row."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(limit_s: float, work: Callable[[], T]) -> T:
    """What ``work`` returns, or raises, if it comes to an end in time.

    Where it does not, its thread goes on alone until it does, and nobody waits for it any more.

    Raises:
        TimeoutError: it has not ended after ``limit_s`` seconds.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="sfcompile-bounded", daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {limit_s:.3g} s")
    return results[0]
