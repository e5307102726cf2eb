"""What one communication site asks for: the same facts on every rank, read off the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import torch

from sfcompile.options import AS_IT_IS, Wire
from sfcompile.runtime.program.formats import SAME
from sfcompile.runtime.program.intervals import Runs, count, overlap, places, slice_of

Shape = tuple[int, ...]

LINE_BYTES = 64
"""A cache line: slots begin on one, and words that different ranks write lie on lines of their own."""


@dataclass(frozen=True)
class AttentionSite:
    """Softmax attention of q [B, H, Lq, D] with k [B, Hkv, Lk, D] and v [B, Hkv, Lk, E], all sharded over tokens.

    ``q_positions[r]`` and ``kv_positions[r]`` are rank r's tokens (uneven, several runs, possibly none). ``mask`` is
    "full" if a whole mask broadcastable to [B, H, Lq, Lk] is given at attend time. With several ``parts`` a rank's
    tokens come and go in so many tensors, so that one part is computed and sent while another is under way: rank r's
    of ``q_sizes[r]`` and ``kv_sizes[r]`` tokens, or, where those are empty, cut as :func:`slice_of` cuts. ``wire`` says
    how chunks are written while they travel.

    Raises:
        ValueError: sizes that do not add up to a rank's tokens.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    q_positions: tuple[Runs, ...]
    kv_positions: tuple[Runs, ...]
    scale: float
    causal: bool = False
    mask: str | None = None
    parts: int = 1
    q_sizes: tuple[tuple[int, ...], ...] = ()
    kv_sizes: tuple[tuple[int, ...], ...] = ()
    wire: Wire = AS_IT_IS

    def __post_init__(self) -> None:
        for positions, sizes in ((self.q_positions, self.q_sizes), (self.kv_positions, self.kv_sizes)):
            want = [(count(runs), self.parts) for runs in positions] if sizes else []
            if [(sum(each), len(each)) for each in sizes] != want or any(size < 0 for each in sizes for size in each):
                raise ValueError(f"site {self.name} has {want} tokens and parts by rank, and parts of {sizes}")

    @cached_property
    def tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Every rank's number of queries, and of keys."""
        return tuple(map(count, self.q_positions)), tuple(map(count, self.kv_positions))

    def written(self, tensor: str) -> str:
        """How the chunks of "q", "k", "v" or "o" are written while they travel (formats.py)."""
        return str(getattr(self.wire, tensor))

    def local_shape(self, tensor: str, rank: int, part: int = -1) -> Shape:
        """Shape of a rank's "q", "k", "v" or "o" [B, heads, tokens, width], of one of its parts or (-1) of all."""
        key = tensor, rank, part
        if key not in self._local_shapes:
            self._local_shapes[key] = self._local_shape(tensor, rank, part)
        return self._local_shapes[key]

    @cached_property
    def _local_shapes(self) -> dict[tuple[str, int, int], Shape]:
        return {}

    def _local_shape(self, tensor: str, rank: int, part: int) -> Shape:
        queries = tensor in ("q", "o")
        tokens = self.tokens[0 if queries else 1][rank]
        if part != -1:
            start, stop = self.rows(queries, rank, self.parts, part)
            tokens = stop - start
        width = self.head_dim if tensor in ("q", "k") else self.v_head_dim
        return self.batch, self.heads if queries else self.kv_heads, tokens, width

    def rows(self, queries: bool, rank: int, parts: int, part: int) -> tuple[int, int]:
        """Which of a rank's local query (or key) tokens are the ``part``-th of ``parts``: ``[start, stop)``.

        A schedule may cut them otherwise than they come; cut into as many parts as they come in, it is those.
        """
        positions, sizes = (self.q_positions, self.q_sizes) if queries else (self.kv_positions, self.kv_sizes)
        if not sizes or parts != self.parts:
            return slice_of(count(positions[rank]), parts, part)
        start = sum(sizes[rank][:part])
        return start, start + sizes[rank][part]

    def geometry(self) -> tuple[Any, ...]:
        """Everything but the name: sites of equal geometry share a schedule."""
        return _geometry(self)


def kv_slice(site: AttentionSite, heads: tuple[int, int]) -> tuple[int, int]:
    """The K/V heads that a slice of query heads reads (grouped-query attention shares K/V heads)."""
    group = site.heads // site.kv_heads
    return heads[0] // group, (heads[1] - 1) // group + 1


@dataclass(frozen=True)
class ExchangeSite:
    """A sharded value of global ``shape`` changes hands: every rank gets what it wants of it.

    Dim ``dim`` is ``outer x rows x inner``; rank r holds ``owned[r]`` of its rows, and wants ``wanted[r]`` of dim
    ``into``, all of the other dims. With ``into == dim`` both are rows of it: an all-gather if every rank wants all
    of them, else a halo exchange or another cut. With another ``into`` the sharded dim is switched.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    dim: int
    outer: int
    inner: int
    owned: tuple[Runs, ...]
    into: int
    wanted: tuple[Runs, ...]
    parts: ClassVar[int] = 1
    """Its tokens come and go whole: they are cut into parts around attentions only."""

    @classmethod
    def gather(
        cls, name: str, shape: Shape, dtype: torch.dtype, dim: int, owned: tuple[Runs, ...], outer: int = 1,
        inner: int = 1,
    ) -> ExchangeSite:  # fmt: skip
        """The exchange in which every rank wants everything."""
        everything = ((0, shape[dim] // (outer * inner)),)
        return cls(name, shape, dtype, dim, outer, inner, owned, dim, (everything,) * len(owned))

    def written(self, tensor: str) -> str:
        """How its chunks are written while they travel: as they are."""
        return SAME

    @cached_property
    def rows(self) -> int:
        """Rows of ``dim``, on all ranks together."""
        return self.shape[self.dim] // (self.outer * self.inner)

    @cached_property
    def is_gather(self) -> bool:
        """Whether every rank wants everything."""
        return all(self._wants_all(rank) for rank in range(len(self.wanted)))

    def _wants_all(self, rank: int) -> bool:
        return self.into == self.dim and self.wanted[rank] == ((0, self.rows),)

    def geometry(self) -> tuple[Any, ...]:
        """Everything but the name: sites of equal geometry share a schedule."""
        return _geometry(self)

    @cached_property
    def local_bytes(self) -> tuple[int, ...]:
        """Bytes of every rank's shard."""
        return tuple(nbytes(self.local_shape(rank), self.dtype) for rank in range(len(self.owned)))

    @cached_property
    def _held(self) -> tuple[int, ...]:
        return tuple(map(count, self.owned))

    def local_shape(self, rank: int) -> Shape:
        """Shape of what ``rank`` holds."""
        return self._resized(self._held[rank])

    def wanted_shape(self, rank: int) -> Shape:
        """Shape of what ``rank`` wants."""
        number = count(self.wanted[rank])
        return self._resized(number) if self.into == self.dim else self._resized(self.rows, number)

    def chunk(self, src: int, dst: int) -> tuple[Runs, Runs]:
        """What ``src`` gives ``dst``: places in its shard along ``into``, and in what ``dst`` makes along ``dim``."""
        if self.into != self.dim:
            return self.wanted[dst], self.owned[src]
        if self._wants_all(dst):  # the shard as it is
            return ((0, count(self.owned[src])),), self.owned[src]
        common = overlap(self.owned[src], self.wanted[dst])
        return places(common, self.owned[src]), places(common, self.wanted[dst])

    def chunk_shape(self, src: int, dst: int) -> Shape:
        """Shape of what ``src`` gives ``dst``."""
        along_into, along_dim = self.chunk(src, dst)
        return self._resized(count(along_dim), count(along_into))

    def _resized(self, rows: int, into: int | None = None) -> Shape:
        """The shape with so many rows of ``dim`` and, if that is another dim, so much of ``into``."""
        sizes = {} if into is None else {self.into: into}
        sizes[self.dim] = self.outer * rows * self.inner
        return tuple(sizes.get(dim, size) for dim, size in enumerate(self.shape))


AnySite = AttentionSite | ExchangeSite


def nbytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def align(nbytes: int, to: int) -> int:
    """``nbytes``, or the next multiple of ``to``."""
    return -(-nbytes // to) * to


def _geometry(site: Any) -> tuple[Any, ...]:
    return (type(site).__name__, *(getattr(site, entry.name) for entry in fields(site) if entry.name != "name"))
