"""What one communication site asks for: the same facts on every rank, read off the graph."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

Positions = tuple[tuple[int, int], ...]
"""Global token positions one rank owns: runs ``(first, length)`` in local order."""


def count(positions: Positions) -> int:
    """Number of tokens in some positions."""
    return sum(length for _, length in positions)


def cut(positions: Positions, start: int, stop: int) -> Positions:
    """The ``start``-th to ``stop``-th of some positions."""
    found = []
    at = 0
    for first, length in positions:
        low, high = max(start - at, 0), min(stop - at, length)
        if low < high:
            found.append((first + low, high - low))
        at += length
    return tuple(found)


def slice_of(total: int, parts: int, index: int) -> tuple[int, int]:
    """The ``index``-th of ``parts`` contiguous slices of ``total`` things, sizes within one of each other."""
    base, extra = divmod(total, parts)
    start = index * base + min(index, extra)
    return start, start + base + (index < extra)


@dataclass(frozen=True)
class AttentionSite:
    """Softmax attention of q [B, H, Lq, D] with k [B, Hkv, Lk, D] and v [B, Hkv, Lk, E], all sharded over tokens.

    ``q_positions[r]`` and ``kv_positions[r]`` are rank r's tokens (uneven, several runs, possibly none). ``mask`` is
    "full" if a whole mask broadcastable to [B, H, Lq, Lk] is given at attend time. With several ``parts`` a rank's
    tokens come and go in so many tensors, so that one part is computed and sent while another is under way: rank r's
    of ``q_sizes[r]`` and ``kv_sizes[r]`` tokens, or, where those are empty, cut as :func:`slice_of` cuts.

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
    q_positions: tuple[Positions, ...]
    kv_positions: tuple[Positions, ...]
    scale: float
    causal: bool = False
    mask: str | None = None
    parts: int = 1
    q_sizes: tuple[tuple[int, ...], ...] = ()
    kv_sizes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for places, sizes in ((self.q_positions, self.q_sizes), (self.kv_positions, self.kv_sizes)):
            want = [(count(runs), self.parts) for runs in places] if sizes else []
            if [(sum(each), len(each)) for each in sizes] != want or any(size < 0 for each in sizes for size in each):
                raise ValueError(f"site {self.name} has {want} tokens and parts by rank, and parts of {sizes}")

    def rows(self, queries: bool, rank: int, pieces: int, piece: int) -> tuple[int, int]:
        """Which of a rank's local query (or key) tokens one of ``pieces`` pieces is: ``[start, stop)``.

        It is the rank's part, if there are as many pieces as parts.
        """
        places, sizes = (self.q_positions, self.q_sizes) if queries else (self.kv_positions, self.kv_sizes)
        if not sizes or pieces != self.parts:
            return slice_of(count(places[rank]), pieces, piece)
        start = sum(sizes[rank][:piece])
        return start, start + sizes[rank][piece]

    def geometry(self) -> tuple[Any, ...]:
        """Everything but the name: sites of equal geometry share a schedule."""
        return _geometry(self)


def kv_slice(site: AttentionSite, heads: tuple[int, int]) -> tuple[int, int]:
    """The K/V heads that a slice of query heads reads (grouped-query attention shares K/V heads)."""
    group = site.heads // site.kv_heads
    return heads[0] // group, (heads[1] - 1) // group + 1


@dataclass(frozen=True)
class GatherSite:
    """All-gather of a value of global ``shape``: dim ``dim`` is ``outer x n x inner``, ``owners[r]`` of n on rank r."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int
    outer: int
    inner: int
    owners: tuple[Positions, ...]

    def geometry(self) -> tuple[Any, ...]:
        """Everything but the name: sites of equal geometry share a schedule."""
        return _geometry(self)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of ``rank``'s shard."""
        tokens = self.outer * count(self.owners[rank]) * self.inner
        return (*self.shape[: self.dim], tokens, *self.shape[self.dim + 1 :])


@dataclass(frozen=True)
class ReshardSite:
    """A sharded value of global ``shape`` changes hands: every rank gathers the part of it that it wants.

    Rank r holds ``owned[r]`` of dim ``dim`` and wants ``wanted[r]`` of dim ``into``, all of the other dims. With
    ``into == dim`` that is a halo exchange or another cut of the same dim; else the sharded dim is switched.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int
    owned: tuple[Positions, ...]
    into: int
    wanted: tuple[Positions, ...]

    def geometry(self) -> tuple[Any, ...]:
        """Everything but the name: sites of equal geometry share a schedule."""
        return _geometry(self)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of what ``rank`` holds."""
        return _resized(self.shape, {self.dim: count(self.owned[rank])})

    def wanted_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of what ``rank`` wants."""
        return _resized(self.shape, {self.into: count(self.wanted[rank])})

    def part(self, src: int, dst: int) -> tuple[Positions, Positions]:
        """What ``src`` gives ``dst``: places in its shard along ``into``, and in what ``dst`` makes along ``dim``."""
        if self.into != self.dim:
            return self.wanted[dst], self.owned[src]
        common = overlap(self.owned[src], self.wanted[dst])
        return places(common, self.owned[src]), places(common, self.wanted[dst])

    def part_shape(self, src: int, dst: int) -> tuple[int, ...]:
        """Shape of what ``src`` gives ``dst``."""
        given, placed = self.part(src, dst)
        return _resized(self.shape, {self.dim: count(placed), self.into: count(given)})


def overlap(a: Positions, b: Positions) -> Positions:
    """Positions of both; each ascending."""
    found = []
    i = j = 0
    while i < len(a) and j < len(b):
        low, high = max(a[i][0], b[j][0]), min(sum(a[i]), sum(b[j]))
        if low < high:
            found.append((low, high - low))
        i, j = (i + 1, j) if sum(a[i]) < sum(b[j]) else (i, j + 1)
    return tuple(found)


def places(some: Positions, within: Positions) -> Positions:
    """Where ``some`` of the positions ``within`` lie among them; both ascending."""
    found = []
    before = i = 0
    for first, length in some:
        while sum(within[i]) <= first:
            before += within[i][1]
            i += 1
        found.append((before + first - within[i][0], length))
    return tuple(found)


def _resized(shape: tuple[int, ...], sizes: dict[int, int]) -> tuple[int, ...]:
    return tuple(sizes.get(dim, size) for dim, size in enumerate(shape))


def _geometry(site: Any) -> tuple[Any, ...]:
    return (type(site).__name__, *(getattr(site, entry.name) for entry in fields(site) if entry.name != "name"))
