"""The schedule of an attention: who computes which heads, which tokens a chunk holds, and how large it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.runtime.program.formats import travel_bytes
from sfcompile.runtime.program.instructions import Arrival, Chunk, Heads
from sfcompile.runtime.program.intervals import Runs, slice_of, stretch
from sfcompile.runtime.program.sites import AttentionSite, kv_slice


@dataclass(frozen=True)
class AttentionSchedule(Schedule):
    """One attention on one mesh.

    Attributes:
        split_heads: whether Ulysses group u computes head slice u only (else every rank computes all heads).
        q_parts, kv_parts: into how many chunks a rank's queries, and its keys and values, are cut.
        staged: whether it computes on what is here while the rest arrives, chunk by chunk.
    """

    site: AttentionSite
    split_heads: bool = True
    q_parts: int = 1
    kv_parts: int = 1
    staged: bool = False
    # Asked for over and over while a schedule is proved, priced and run: kept.
    _spans: dict[tuple[str, object], Heads] = field(
        default_factory=dict, init=False, compare=False, hash=False, repr=False
    )
    _shapes: dict[tuple[int, Arrival], tuple[int, ...]] = field(
        default_factory=dict, init=False, compare=False, hash=False, repr=False
    )
    _counts: dict[tuple[str, int], NDArray[np.int64]] = field(
        default_factory=dict, init=False, compare=False, hash=False, repr=False
    )

    def heads(self, rank: int) -> Heads:
        """The query heads that a rank computes."""
        key = ("heads", rank)
        if key not in self._spans:
            mine = slice_of(self.site.heads, self.mesh.ulysses, self.mesh.place(rank)[0])
            self._spans[key] = mine if self.split_heads else (0, self.site.heads)
        return self._spans[key]

    def kv_heads(self, rank: int) -> Heads:
        """The key and value heads that a rank computes with."""
        return kv_slice(self.site, self.heads(rank))

    def rows(self, tensor: str, chunk: Chunk) -> tuple[int, int]:
        """Which of its rank's local tokens a chunk is: ``[start, stop)``."""
        queries = tensor in ("q", "o")
        key = ("q" if queries else "k", chunk)
        if key not in self._spans:
            parts = self.q_parts if queries else self.kv_parts
            self._spans[key] = self.site.rows(queries, chunk.src, parts, chunk.part)
        return self._spans[key]

    def positions(self, tensor: str, chunk: Chunk) -> Runs:
        """The global token positions of a chunk."""
        positions = self.site.q_positions if tensor in ("q", "o") else self.site.kv_positions
        return stretch(positions[chunk.src], *self.rows(tensor, chunk))

    def shape(self, rank: int, arrival: Arrival) -> tuple[int, ...]:
        """``[batch, heads, tokens, width]`` of what arrives at ``rank``."""
        key = (rank, arrival)
        if key not in self._shapes:
            start, stop = self.rows(arrival.tensor, arrival.chunk)
            # An output comes home with the heads that its sender computed; all else is for this rank's heads.
            if arrival.tensor in ("k", "v"):
                first, last = self.kv_heads(rank)
            else:
                first, last = self.heads(arrival.src if arrival.tensor == "o" else rank)
            self._shapes[key] = (self.site.batch, last - first, stop - start, self.width(arrival.tensor))
        return self._shapes[key]

    def width(self, tensor: str) -> int:
        """The size of a tensor's last dim."""
        return self.site.head_dim if tensor in ("q", "k") else self.site.v_head_dim

    # ------------------------------------------------------------------ all ranks at once

    def head_counts(self, tensor: str) -> NDArray[np.int64]:
        """Heads of ``tensor`` that each rank computes with."""
        key = ("kv heads" if tensor in ("k", "v") else "heads", 0)
        if key not in self._counts:
            heads = self.kv_heads if tensor in ("k", "v") else self.heads
            spans = [heads(rank) for rank in range(self.mesh.num_ranks)]
            self._counts[key] = np.array([last - first for first, last in spans], dtype=np.int64)
        return self._counts[key]

    def row_counts(self, tensor: str, part: int) -> NDArray[np.int64]:
        """Tokens of a part of each rank's queries ("q", "o") or keys ("k", "v")."""
        key = ("q" if tensor in ("q", "o") else "k", part)
        if key not in self._counts:
            spans = [self.rows(tensor, Chunk(rank, part)) for rank in range(self.mesh.num_ranks)]
            self._counts[key] = np.array([stop - start for start, stop in spans], dtype=np.int64)
        return self._counts[key]

    def arrival_bytes(self, arrival: Arrival, written: str = "") -> NDArray[np.int64]:
        """Bytes of an arrival of the origin's, at every receiving rank.

        Args:
            written: how it travels, if not as the site says.
        """
        tensor, src = arrival.tensor, arrival.src if arrival.tensor == "o" else 0
        key = (f"rows of a token of {tensor}", src)
        if key not in self._counts:
            self._counts[key] = self.head_counts(tensor)[self.mesh.ranks_after(src)] * self.site.batch
        rows = self.row_counts(tensor, arrival.chunk.part)[self.mesh.ranks_after(arrival.chunk.src)]
        written = written or self.site.written(tensor)
        return travel_bytes(written, self._counts[key] * rows, self.width(tensor), self.site.dtype)

    @property
    def title(self) -> str:
        """The schedule in a few words."""
        parts = "" if self.q_parts == self.kv_parts == 1 else f", {self.q_parts} Q x {self.kv_parts} KV parts"
        return f"{super().title}{parts}"
