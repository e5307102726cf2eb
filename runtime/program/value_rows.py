"""Which rows of a value each rank holds, where a value goes from one compiled graph to the next in shards."""

from __future__ import annotations

from dataclasses import dataclass

from sfcompile.runtime.program.intervals import Runs, count


@dataclass(frozen=True)
class ValueRows:
    """A value of a whole ``shape``, cut along ``dim``.

    Attributes:
        owned: by rank, the positions of ``dim`` that it holds, ascending; no position is held twice.
    """

    shape: tuple[int, ...]
    dim: int
    owned: tuple[Runs, ...]

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of what a rank holds."""
        return *self.shape[: self.dim], count(self.owned[rank]), *self.shape[self.dim + 1 :]

    def place(self, rank: int, start: int, stop: int) -> int | None:
        """Where the positions ``[start, stop)`` of the whole value begin in a rank's shard; None: not all are there
        next to one another."""
        if start >= stop:
            return 0
        at = 0
        for first, length in self.owned[rank]:
            if first <= start and stop <= first + length:
                return at + start - first
            at += length
        return None
