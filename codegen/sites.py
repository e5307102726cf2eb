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
    "full" if a whole mask broadcastable to [B, H, Lq, Lk] is given at attend time.
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


def _geometry(site: Any) -> tuple[Any, ...]:
    return (type(site).__name__, *(getattr(site, entry.name) for entry in fields(site) if entry.name != "name"))
