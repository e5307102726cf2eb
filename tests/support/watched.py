"""What kernels of a test look at while they wait, and write into."""

from __future__ import annotations

import torch

from sfcompile.runtime.wires.symmetric_heap import NO_LIMIT_NS, STATUS, Watched


class Watch:
    """A rank's status, and the word that tells its kernels to stop, in a test's memory.

    Attributes:
        words: int64, see STATUS.
        abort: int64 [1].
        watched: the addresses; they hold as long as this object.
    """

    def __init__(self, limit_s: float | None = None) -> None:
        self.words = torch.zeros(len(STATUS), dtype=torch.int64)
        self.abort = torch.zeros(1, dtype=torch.int64)
        limit_ns = NO_LIMIT_NS if limit_s is None else round(limit_s * 1e9)
        self.watched = Watched(self.words.data_ptr(), self.abort.data_ptr(), limit_ns)

    @property
    def status(self) -> dict[str, int]:
        """The words by name."""
        return dict(zip(STATUS, self.words.tolist(), strict=True))


UNWATCHED = Watch()
"""Of tests in which nothing goes wrong."""
