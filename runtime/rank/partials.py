"""What a site's queries have found so far, chunk by chunk, and how a call's results are added to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sfcompile.runtime.program.instructions import Chunk
from sfcompile.runtime.rank.attention_aten import Partial, merge


class Partials:
    """The partial output of every query chunk; None: no key of it was allowed yet.

    A merge is six small ops. Chunks that are attended together time and again stay one tensor: one merge for all of
    them, and what is of one chunk is cut out when somebody asks for it.
    """

    def __init__(self) -> None:
        self._of: dict[Chunk, Partial | None] = {}
        self._together: tuple[Chunk, ...] = ()
        self._whole: Partial | None = None
        self._lengths: Sequence[int] = ()

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._of)

    def __getitem__(self, chunk: Chunk) -> Partial | None:
        self._settle()
        return self._of.get(chunk)

    def begin(self, queries: Sequence[Chunk]) -> None:
        """These are attended here, whether or not a key is allowed to them."""
        for chunk in queries:
            self._of.setdefault(chunk, None)

    def add(self, queries: tuple[Chunk, ...], lengths: Sequence[int], partial: Partial) -> None:
        """Add what some queries, one after the other in ``partial``, found in keys that they had not met.

        Args:
            lengths: tokens of each chunk.
        """
        if queries == self._together:
            partial = merge(self._whole, partial, into_first=True) or partial
        else:
            self._settle()
            if any(self._of[chunk] is not None for chunk in queries):
                # Some of them have met other keys than the rest: each by itself, and no longer as a part of a whole.
                self._together, self._whole = (), None
                for chunk, one in zip(queries, _cut(partial, lengths), strict=True):
                    self._of[chunk] = merge(self._of[chunk], one, into_first=True)
                return
        self._together, self._whole, self._lengths = queries, partial, lengths

    def _settle(self) -> None:
        """Cut what was found together, if it has not been since something was added."""
        if self._whole is not None and self._lengths:
            self._of.update(zip(self._together, _cut(self._whole, self._lengths), strict=True))
            self._lengths = ()


def _cut(partial: Partial, lengths: Sequence[int]) -> list[Partial]:
    """The partial of each chunk, as views."""
    if len(lengths) == 1:
        return [partial]
    outputs, lses = (tensor.split_with_sizes(list(lengths), 2) for tensor in partial)
    return list(zip(outputs, lses, strict=True))
