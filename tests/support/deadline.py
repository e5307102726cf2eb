"""A poll for kernels in Triton's interpreter: a test of a wait that never ends must end."""

from __future__ import annotations

import time


class Deadline:
    """A poll that raises once nothing has arrived for ``timeout_s``."""

    def __init__(self, timeout_s: float, what: str = "a signal") -> None:
        self._timeout_s, self._what = timeout_s, what
        self._since: float | None = None

    def __call__(self) -> None:
        """One look in vain.

        Raises:
            TimeoutError: it was the last one.
        """
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since > self._timeout_s:
            raise TimeoutError(f"{self._what} did not arrive within {self._timeout_s:g} s")
        time.sleep(0)

    def arrived(self) -> None:
        """Start counting anew."""
        self._since = None
