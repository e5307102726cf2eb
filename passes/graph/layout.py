"""Where the tokens of a value sit, and who owns them.

A layout says that one dim of a value is ``outer x n x inner`` with ``n`` token positions: ``outer = B`` where a view
merged batch and tokens, ``inner = r`` after ``repeat_interleave``. The ``n`` positions carry labels (labels.py). After
a view that splits tokens over two dims (rows and columns of a grid) the layout says where the rows are: a ``grain`` of
``g`` means that each position of the dim stands for ``g`` tokens that follow one another, and that the rest of them
fill later dims; a rank then owns whole rows. ``Ownership`` maps every label to the rank that keeps it, so a rank's
shard of the value is "the positions whose label I own", in order. Nothing asks that shards be equal, contiguous or
non-empty.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.runtime.program import intervals
from sfcompile.runtime.program.intervals import Runs, join

Shape = tuple[int, ...]
Owners = tuple[tuple[int, int], ...]
"""Run-length code of a vector of ranks: ``(rank, count)``."""
Key = tuple[int, int, int, int]
"""``(dim, outer, inner, grain)`` of a layout."""


@dataclass(frozen=True)
class Layout:
    """Dim ``dim`` of a value is ``outer x n x inner``; ``runs`` label ``grain`` tokens for each of the ``n``."""

    dim: int
    runs: Runs
    outer: int = 1
    inner: int = 1
    grain: int = 1

    @property
    def tokens(self) -> int:
        """How many labels: ``n * grain``."""
        return intervals.count(self.runs)

    @property
    def positions(self) -> int:
        """``n``: tokens, or whole rows of them."""
        return self.tokens // self.grain

    @property
    def size(self) -> int:
        """Elements along the dim: ``outer * n * inner``."""
        return self.outer * self.positions * self.inner

    @property
    def key(self) -> Key:
        """Where the tokens sit, without saying which they are."""
        return self.dim, self.outer, self.inner, self.grain

    @property
    def plain(self) -> bool:
        """Whether the dim holds the tokens and nothing else."""
        return self.outer == self.inner == self.grain == 1

    def at(self, dim: int) -> Layout:
        """The same tokens at another dim."""
        return replace(self, dim=dim)

    def with_runs(self, runs: Runs) -> Layout:
        """Other tokens at the same place."""
        return replace(self, runs=runs)


@dataclass(frozen=True)
class Window:
    """Runs of dim ``dim`` that each rank needs, whoever owns them: its own rows and a halo of its neighbours'."""

    dim: int
    wanted: tuple[Runs, ...]


Need = Layout | Window | None
"""What an op needs of an operand: a shard, a window, or (None) the whole value."""


def map_through_view(layout: Layout, source: Shape, target: Shape) -> Layout | None:
    """Follow tokens through a reshape by arithmetic on row-major factors.

    The source reads as ``left x n x right`` elements in row-major order, where ``right = inner x later dims``. The
    target dim that holds the tokens is the one in which a factor ``right`` ends and ``n`` fits whole; where it does not
    fit, that dim and perhaps those before it hold the columns of a grid, and the next one its rows (``grain``).
    None if the tokens end up spread over dims in another way (or, for a single token, if the dim is not kept).
    """
    count, grain = layout.positions, layout.grain
    right = layout.inner * math.prod(source[layout.dim + 1 :])
    after = 1
    for dim in reversed(range(len(target))):
        size = target[dim]
        if 0 in (size, count, right):
            return None
        if after * size > right or (count == 1 and after == right and size == 1):
            if right % after:
                return None
            inner = right // after
            if size % (count * inner) == 0:
                outer = size // (count * inner)
                if count == 1 and (outer != 1 or inner != 1 or grain != 1):
                    return None
                if grain > 1 and inner % grain == 0:  # rows and columns are one dim again
                    inner, grain = inner // grain, 1
                return Layout(dim, layout.runs, outer, inner, grain)
            if size % inner or count % (size // inner):
                return None
            grain, count = grain * (size // inner), count // (size // inner)
            right = after * size
            if count == 1:
                return None
        after *= size
    return None


class Ownership:
    """Which rank owns which label; built once the label classes are final.

    Every segment (a maximal stretch of root labels that no vector tears apart) is cut into ``num_ranks`` contiguous
    stretches that differ by at most one token; the longer ones are rotated from segment to segment so that uneven
    segments do not all burden rank 0. ``grains``, by first label of a segment: cut it at multiples of that only, and
    in proportion: rank ``r`` begins at row ``floor(r n / ranks)``. The rows of a grid and those of the same grid in
    half as many steps are then cut at the same places, give or take a row. Rows of one axis that follow one another are
    cut together where some are in pieces of fewer rows than ranks. Segments that are glued to a label
    (``LabelSpace.glued``) and shorter than the ranks are many go to its owner, but for those that ``loose`` names by
    their first label. ``held``: labels (the first, how many) that have an owner already, who keeps them.
    """

    def __init__(
        self,
        space: LabelSpace,
        segments: Sequence[tuple[int, int]],
        axes: Sequence[int],
        num_ranks: int,
        grains: Mapping[int, int] | None = None,
        held: Sequence[tuple[int, int, int]] = (),
        loose: Collection[int] = (),
    ) -> None:
        self._space = space
        self.num_ranks = num_ranks
        self._grains = dict(grains or {})
        self.segments = tuple(sorted(segments))
        self._segment_starts = [first for first, _ in self.segments]
        self._starts: list[int] = []
        self._ends: list[tuple[int, int]] = []  # (end label, rank)
        turn = 0
        kept = {root: (count, rank) for first, length, rank in held for root, count in space.roots(((first, length),))}
        glued = self._glued(loose)
        axis_of = {first: axis for (first, _), axis in zip(segments, axes, strict=True)}
        free = [(first, n) for first, n in self.segments if first not in glued and not self._keep(first, n, kept)]
        for first, length in self._torn_rows(free, axis_of):
            grain = self._grains.get(first, 1)
            num_grains = length // grain
            if first in self._grains:
                cuts = [rank * num_grains // num_ranks for rank in range(num_ranks + 1)]
                counts = [stop - start for start, stop in zip(cuts, cuts[1:], strict=False)]
            else:
                base, extra = divmod(num_grains, num_ranks)
                counts = [base + ((rank - turn) % num_ranks < extra) for rank in range(num_ranks)]
                turn = (turn + extra) % num_ranks
            at = first
            for rank, number in enumerate(counts):
                if number:
                    self._own(at, at + number * grain, rank)
                at += number * grain
        lengths = dict(self.segments)
        for first, home in glued.items():
            self._own(first, first + lengths[first], self._owner(home))
        self._axes = axis_of
        self._owners: dict[Runs, Owners] = {}
        self._vectors: dict[Owners, NDArray[np.int32]] = {}
        self._held: dict[Runs, tuple[Runs, ...]] = {}
        self._shares: dict[Runs, NDArray[np.float64]] = {}

    def _torn_rows(self, segments: Sequence[tuple[int, int]], axis_of: Mapping[int, int]) -> Runs:
        """The segments, those of rows that were torn from their neighbours put together again: in proportion, a single
        row goes to the last rank, and so would all rows of a grid of which each is a segment."""
        out: list[tuple[int, int]] = []
        short = False  # whether the last one holds a piece with fewer rows than ranks
        for first, length in segments:
            grain = self._grains.get(first)
            few = grain is not None and length < grain * self.num_ranks
            before, n = out[-1] if out else (first, 0)
            together = grain is not None and before + n == first and self._grains.get(before) == grain
            if n and together and axis_of[before] == axis_of[first] and (short or few):
                out[-1], short = (before, n + length), True
            else:
                out.append((first, length))
                short = few
        return tuple(out)

    def _keep(self, first: int, length: int, kept: Mapping[int, tuple[int, int]]) -> bool:
        """Leave a segment to those who hold it already, if all of it is held."""
        pieces = []
        for start in sorted(kept):
            count, rank = kept[start]
            low, high = max(first, start), min(first + length, start + count)
            if low < high:
                pieces.append((low, high, rank))
        if sum(high - low for low, high, _ in pieces) != length:
            return False
        for low, high, rank in pieces:
            self._own(low, high, rank)
        return True

    def _own(self, start: int, end: int, rank: int) -> None:
        at = bisect_right(self._starts, start)
        self._starts.insert(at, start)
        self._ends.insert(at, (end, rank))

    def _owner(self, label: int) -> int:
        return self._ends[bisect_right(self._starts, label) - 1][1]

    def _segment_of(self, label: int) -> int:
        """The first label of the segment that holds a root label."""
        return self._segment_starts[bisect_right(self._segment_starts, label) - 1]

    def _glued(self, loose: Collection[int]) -> dict[int, int]:
        """Short segments that are glued to a label of one that is not: first label to that label."""
        near: dict[int, int] = {}
        for first, length, label, grain in self._space.glued:
            target = self._space.roots(((label, 1),))[0][0]
            for root, count in self._space.roots(((first, length),)):
                at = bisect_left(self._segment_starts, root)
                while at < len(self.segments) and sum(self.segments[at]) <= root + count:
                    segment, size = self.segments[at]
                    short = size // grain < self.num_ranks
                    if short and segment not in loose and segment != self._segment_of(target):
                        near.setdefault(segment, target)
                    at += 1
        glued: dict[int, int] = {}
        for segment, label in near.items():
            passed = {segment}
            while (home := self._segment_of(label)) in near and home not in passed:  # padding of padding
                passed.add(home)
                label = near[home]
            if home not in near:
                glued[segment] = label
        return glued

    def owners(self, runs: Runs) -> Owners:
        """The rank of each position, run-length coded."""
        known = self._owners.get(runs)
        if known is None:
            out: list[tuple[int, int]] = []
            for first, length in self._space.roots(runs):
                at = first
                while at < first + length:
                    index = bisect_right(self._starts, at) - 1
                    end, rank = self._ends[index]
                    count = min(end, first + length) - at
                    if out and out[-1][0] == rank:
                        out[-1] = (rank, out[-1][1] + count)
                    else:
                        out.append((rank, count))
                    at += count
            known = self._owners[runs] = tuple(out)
        return known

    def split(self, parts: int) -> Ownership:
        """The same with every rank's tokens cut into ``parts``: part j of rank r counts as rank ``r * parts + j``.

        Every rank's stretch of a segment is cut, so that parts hold tokens of all streams; odd tokens are dealt over
        the parts in turn.
        """
        finer = copy.copy(self)
        finer.num_ranks = self.num_ranks * parts
        finer._starts, finer._ends = [], []
        finer._owners, finer._vectors, finer._held, finer._shares = {}, {}, {}, {}
        turns = [0] * self.num_ranks
        for start, (end, rank) in zip(self._starts, self._ends, strict=True):
            home = self._segment_starts[bisect_right(self._segment_starts, start) - 1]
            grain = self._grains.get(home, 1)
            base, extra = divmod((end - start) // grain, parts)
            at = start
            for part in range(parts):
                count = (base + ((part - turns[rank]) % parts < extra)) * grain
                if count:
                    finer._starts.append(at)
                    finer._ends.append((at + count, rank * parts + part))
                at += count
            turns[rank] = (turns[rank] + extra) % parts
        return finer

    def axis_of(self, runs: Runs) -> int:
        """The token axis a vector belongs to: segments that ever appear in one vector share an axis."""
        first = self._space.roots(runs)[0][0]
        index = bisect_right(self._segment_starts, first) - 1
        return self._axes[self._segment_starts[index]]

    def vector(self, runs: Runs) -> NDArray[np.int32]:
        """The rank of each position, as an array of length n."""
        owners = self.owners(runs)
        known = self._vectors.get(owners)
        if known is None:
            ranks = np.array([rank for rank, _ in owners], dtype=np.int32)
            known = self._vectors[owners] = np.repeat(ranks, [count for _, count in owners])
        return known

    def positions(self, runs: Runs, rank: int) -> NDArray[np.int64]:
        """Runs of the vector that ``rank`` owns, ascending."""
        return np.flatnonzero(self.vector(runs) == rank)

    def fits(self, layout: Layout) -> bool:
        """Whether every row of a layout with a grain has one owner."""
        if layout.grain == 1:
            return True
        at = 0
        for _, count in self.owners(layout.runs):
            at += count
            if at % layout.grain:
                return False
        return True

    def rows(self, layout: Layout, rank: int) -> NDArray[np.int64]:
        """Which of the ``n`` positions of a layout ``rank`` owns, ascending."""
        owned = self.positions(layout.runs, rank)
        return owned if layout.grain == 1 else owned[:: layout.grain] // layout.grain

    def row_runs(self, layout: Layout, rank: int) -> Runs:
        """The same as runs ``(first, length)``."""
        runs = self.position_runs(layout.runs, rank)
        return tuple((first // layout.grain, length // layout.grain) for first, length in runs)

    def dim_runs(self, layout: Layout, rank: int) -> Runs:
        """Which positions of the whole dim ``rank`` owns."""
        rows = [(first * layout.inner, length * layout.inner) for first, length in self.row_runs(layout, rank)]
        period = layout.positions * layout.inner
        return join((block * period + first, length) for block in range(layout.outer) for first, length in rows)

    def position_runs(self, runs: Runs, rank: int) -> Runs:
        """The same positions as runs ``(first position, length)``."""
        if runs not in self._held:  # of all ranks at once: many are asked for every rank, one after the other
            held: list[list[tuple[int, int]]] = [[] for _ in range(self.num_ranks)]
            at = 0
            for owner, count in self.owners(runs):
                held[owner].append((at, count))
                at += count
            self._held[runs] = tuple(map(join, held))
        return self._held[runs][rank]

    def count(self, runs: Runs, rank: int) -> int:
        """How many positions ``rank`` owns."""
        return intervals.count(self.position_runs(runs, rank))

    def shares(self, layout: Layout) -> NDArray[np.float64]:
        """The part of the tokens that each rank owns."""
        known = self._shares.get(layout.runs)
        if known is None:
            owned = np.array(self.owners(layout.runs), dtype=np.int64).reshape(-1, 2)
            known = np.bincount(owned[:, 0], owned[:, 1], self.num_ranks) / max(1, layout.tokens)
            self._shares[layout.runs] = known
        return known

    def busiest(self, layout: Layout) -> float:
        """The part of the tokens that the rank with most of them owns."""
        return float(self.shares(layout).max())

    def same(self, a: Layout | None, b: Layout | None) -> bool:
        """Whether two layouts of one value put every element on the same rank."""
        if a is None or b is None:
            return a is b
        return a.key == b.key and (a.runs == b.runs or self.owners(a.runs) == self.owners(b.runs))

    def holds(self, own: Layout | None, need: Need) -> bool:
        """Whether shards under a value's own layout are what a reader needs: the same rows of the dim on every rank."""
        if own is None or need is None or own.dim != need.dim:
            return False
        if isinstance(need, Window):
            return all(self.dim_runs(own, rank) == wanted for rank, wanted in enumerate(need.wanted))
        if self.same(own, need):
            return True
        return own.size == need.size and all(
            self.dim_runs(own, rank) == self.dim_runs(need, rank) for rank in range(self.num_ranks)
        )

    def local_shape(self, shape: Shape, layout: Layout, rank: int) -> Shape:
        """Shape of ``rank``'s shard."""
        out = list(shape)
        out[layout.dim] = layout.outer * (self.count(layout.runs, rank) // layout.grain) * layout.inner
        return tuple(out)


@dataclass(frozen=True)
class OpLayouts:
    """What was chosen about the tensors of one op."""

    ins: list[Layout | None]
    outs: list[Layout | None]
    owners: Ownership
