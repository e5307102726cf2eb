"""The schedule object: one communication site on one mesh, written once for all ranks.

Every rank runs the same program, seen from its own place in the mesh: a schedule holds the program of the *origin*, in
which ranks are offsets (mesh.py) and slots are numbered by where their chunk comes from, seen from the receiver. The
program of rank ``p`` (:meth:`Schedule.program`) is the origin's with every offset ``d`` replaced by the rank at p + d.
That symmetry is what lets the checker prove 1024 ranks as fast as four (codegen/proof/checker.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.runtime.program.instructions import (
    Arrival,
    Attend,
    Chunk,
    Forward,
    Heads,
    Instruction,
    Push,
    Put,
    RankProgram,
    Wait,
)
from sfcompile.runtime.program.sites import AttentionSite, GatherSite, Positions, ReshardSite, cut, kv_slice, slice_of
from sfcompile.runtime.program.topology import Topology

_ALIGN = 64


@dataclass(frozen=True)
class SlotSpec:
    """A place in every rank's heap bank, at the same offset: bytes are the most that any rank may need."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Schedule:
    """One site on one mesh.

    Attributes:
        kind: the builder's name.
        origin: the program of the origin; every rank field in it is an offset.
        split_heads: whether Ulysses group u computes head slice u only (else every rank computes all heads).
        q_pieces, kv_pieces: into how many chunks a rank's queries, and its keys and values, are cut.
        staged: whether it computes on what is here while the rest arrives, chunk by chunk.
        groups: the same schedule runs in several disjoint groups of ranks at a time: the mesh's rank i is rank
            ``groups[g][i]`` of the job. Empty: the mesh's ranks are the job's.
        given: programs written by hand for every rank, instead of the origin's (tests, mutants).
    """

    kind: str
    site: AttentionSite | GatherSite | ReshardSite
    mesh: Mesh
    slots: tuple[SlotSpec, ...]
    origin: RankProgram
    split_heads: bool = True
    q_pieces: int = 1
    kv_pieces: int = 1
    staged: bool = False
    groups: tuple[tuple[int, ...], ...] = ()
    given: Callable[[int], RankProgram] | None = field(default=None, compare=False, hash=False, repr=False)
    _programs: dict[int, RankProgram] = field(default_factory=dict, compare=False, hash=False, repr=False)
    # Not taken over by dataclasses.replace: another site or other pieces have other spans.
    _spans: dict[tuple[str, object], Heads] = field(
        default_factory=dict, init=False, compare=False, hash=False, repr=False
    )
    _shapes: dict[tuple[int, Arrival], tuple[int, ...]] = field(
        default_factory=dict, init=False, compare=False, hash=False, repr=False
    )
    _counts: dict[tuple[str, int], NDArray[np.int64]] = field(
        default_factory=dict, compare=False, hash=False, repr=False
    )

    @property
    def heap_bytes(self) -> int:
        """Bytes of one bank."""
        return max((slot.offset + slot.nbytes for slot in self.slots), default=0)

    def program(self, rank: int) -> RankProgram:
        """A rank's instructions."""
        if rank not in self._programs:
            self._programs[rank] = self.given(rank) if self.given is not None else self._seen_from(rank)
        return self._programs[rank]

    def _seen_from(self, rank: int) -> RankProgram:
        at = [self.mesh.rank_after(rank, offset) for offset in range(self.mesh.num_ranks)]

        def moved(step: Instruction) -> Instruction:
            match step:
                case Put(tensor, piece, dst, slot):
                    return Put(tensor, piece, at[dst], slot)
                case Forward(slot, dst, to_slot):
                    return Forward(slot, at[dst], to_slot)
                case Wait(slot, src):
                    return Wait(slot, at[src])
                case Push(q, slot):
                    return Push(Chunk(at[q.src], q.piece), slot)
                case Attend(q, kv, q_slots, k_slots, v_slots):
                    queries = tuple(Chunk(at[c.src], c.piece) for c in q)
                    keys = tuple(Chunk(at[c.src], c.piece) for c in kv)
                    return Attend(queries, keys, q_slots, k_slots, v_slots)

        phases = {name: tuple(moved(step) for step in steps) for name, steps in self.origin.phases.items()}
        arrivals = tuple(
            Arrival(a.slot, at[a.src], a.tensor, Chunk(at[a.chunk.src], a.chunk.piece)) for a in self.origin.arrivals
        )
        return RankProgram(rank, phases, arrivals)

    def members(self, rank: int) -> tuple[int, tuple[int, ...]]:
        """Which rank of the mesh a rank of the job is, and the job's ranks of its group, in the mesh's order."""
        if not self.groups:
            return rank, tuple(range(self.mesh.num_ranks))
        group = next(group for group in self.groups if rank in group)
        return group.index(rank), group

    # ------------------------------------------------------------------ what chunks are

    def heads(self, rank: int) -> Heads:
        """The query heads that a rank computes."""
        key = ("heads", rank)
        if key not in self._spans:
            assert isinstance(self.site, AttentionSite)
            whole = (0, self.site.heads)
            mine = slice_of(self.site.heads, self.mesh.ulysses, self.mesh.place(rank)[0])
            self._spans[key] = mine if self.split_heads else whole
        return self._spans[key]

    def kv_heads(self, rank: int) -> Heads:
        """The key and value heads that a rank computes with."""
        assert isinstance(self.site, AttentionSite)
        return kv_slice(self.site, self.heads(rank))

    def rows(self, tensor: str, chunk: Chunk) -> Heads:
        """Which of its rank's local tokens a chunk is: ``[start, stop)``."""
        queries = tensor in ("q", "o")
        key = ("q" if queries else "k", chunk)
        if key not in self._spans:
            assert isinstance(self.site, AttentionSite)
            pieces = self.q_pieces if queries else self.kv_pieces
            self._spans[key] = self.site.rows(queries, chunk.src, pieces, chunk.piece)
        return self._spans[key]

    def positions(self, tensor: str, chunk: Chunk) -> Positions:
        """The global token positions of a chunk."""
        assert isinstance(self.site, AttentionSite)
        places = self.site.q_positions if tensor in ("q", "o") else self.site.kv_positions
        return cut(places[chunk.src], *self.rows(tensor, chunk))

    def shape(self, rank: int, arrival: Arrival) -> tuple[int, ...]:
        """Shape of what arrives at ``rank``."""
        key = (rank, arrival)
        if key not in self._shapes:
            self._shapes[key] = self._shape(rank, arrival)
        return self._shapes[key]

    def _shape(self, rank: int, arrival: Arrival) -> tuple[int, ...]:
        if isinstance(self.site, GatherSite):
            return self.site.local_shape(arrival.chunk.src)
        if isinstance(self.site, ReshardSite):
            return self.site.part_shape(arrival.src, rank)
        start, stop = self.rows(arrival.tensor, arrival.chunk)
        # An output comes home with the heads that its sender computed; all else is for this rank's heads.
        first, last = {
            "q": lambda: self.heads(rank),
            "o": lambda: self.heads(arrival.src),
        }.get(arrival.tensor, lambda: self.kv_heads(rank))()
        width = self.site.head_dim if arrival.tensor in ("q", "k") else self.site.v_head_dim
        return self.site.batch, last - first, stop - start, width

    # ------------------------------------------------------------------ all ranks at once

    def head_counts(self, tensor: str) -> NDArray[np.int64]:
        """Heads of ``tensor`` that each rank computes with."""
        key = ("kv heads" if tensor in ("k", "v") else "heads", 0)
        if key not in self._counts:
            heads = self.kv_heads if tensor in ("k", "v") else self.heads
            found = [heads(rank) for rank in range(self.mesh.num_ranks)]
            self._counts[key] = np.array([last - first for first, last in found], dtype=np.int64)
        return self._counts[key]

    def row_counts(self, tensor: str, piece: int) -> NDArray[np.int64]:
        """Tokens of a piece of each rank's queries ("q", "o") or keys ("k", "v")."""
        key = ("q" if tensor in ("q", "o") else "k", piece)
        if key not in self._counts:
            spans = [self.rows(tensor, Chunk(rank, piece)) for rank in range(self.mesh.num_ranks)]
            self._counts[key] = np.array([stop - start for start, stop in spans], dtype=np.int64)
        return self._counts[key]

    def arrival_bytes(self, arrival: Arrival) -> NDArray[np.int64]:
        """Bytes of an arrival of the origin's, at every receiving rank."""
        ranks = self.mesh.num_ranks
        origin = self.mesh.ranks_after(arrival.chunk.src)
        if isinstance(self.site, GatherSite):
            key = ("x", 0)
            if key not in self._counts:
                sizes = [math.prod(self.site.local_shape(rank)) for rank in range(ranks)]
                self._counts[key] = np.array(sizes, dtype=np.int64)
            return self._counts[key][origin] * self.site.dtype.itemsize
        if isinstance(self.site, ReshardSite):
            parts = [self.site.part_shape(int(src), rank) for rank, src in enumerate(origin)]
            return np.array([math.prod(shape) for shape in parts], dtype=np.int64) * self.site.dtype.itemsize
        heads = self.head_counts(arrival.tensor)
        if arrival.tensor == "o":
            heads = heads[self.mesh.ranks_after(arrival.src)]
        width = self.site.head_dim if arrival.tensor in ("q", "k") else self.site.v_head_dim
        rows = self.row_counts(arrival.tensor, arrival.chunk.piece)[origin]
        return self.site.batch * heads * rows * width * self.site.dtype.itemsize

    def bytes_by_link(self, topology: Topology) -> tuple[int, int]:
        """Bytes of one epoch over all ranks: inside machines, and between machines."""
        machines = np.array(topology.machine_of)
        inside = across = 0
        for arrival in self.origin.arrivals:
            sizes = self.arrival_bytes(arrival)
            local = machines[self.mesh.ranks_after(arrival.src)] == machines
            inside += int(sizes[local].sum())
            across += int(sizes[~local].sum())
        return inside, across

    @property
    def title(self) -> str:
        """The schedule in a few words."""
        pieces = "" if self.q_pieces == self.kv_pieces == 1 else f", {self.q_pieces} Q x {self.kv_pieces} KV pieces"
        return f"{self.kind} ulysses {self.mesh.ulysses} x ring {self.mesh.ring}{pieces}"

    def __str__(self) -> str:
        """The program of every rank, in offsets: ``(+a,+h)`` is a steps on in Ulysses and h steps on in the ring."""
        lines = [f"{self.title} of {self.site.name}: {len(self.slots)} slots, {self.heap_bytes / 2**20:.2f} MiB a bank"]
        names = {slot: spec.name for slot, spec in enumerate(self.slots)}

        def place(offset: int) -> str:
            a, h = self.mesh.step(offset)
            return "here" if offset == 0 else f"({a:+d},{h:+d})"

        def chunks(of: tuple[Chunk, ...]) -> str:
            return " ".join(place(c.src) + (f".{c.piece}" if c.piece else "") for c in of)

        for phase, steps in self.origin.phases.items():
            for step in steps:
                match step:
                    case Put(tensor, piece, dst, slot):
                        text = f"put {tensor}{f'.{piece}' if piece else ''} -> {place(dst)} {names[slot]}"
                    case Forward(slot, dst, to_slot):
                        text = f"forward {names[slot]} -> {place(dst)} {names[to_slot]}"
                    case Wait(slot, src):
                        text = f"wait {names[slot]} from {place(src)}"
                    case Push(q, slot):
                        text = f"push O of {chunks((q,))} -> {place(q.src)} {names[slot]}"
                    case Attend(q, kv, _, _, _):
                        text = f"attend Q {chunks(q)} x KV {chunks(kv)}"
                lines.append(f"  {phase:<13} {text}")
        return "\n".join(lines)


def lay_out(entries: list[tuple[str, int]]) -> tuple[SlotSpec, ...]:
    """Place slots ``(name, nbytes)`` one after the other, aligned to cache lines."""
    slots = []
    offset = 0
    for name, nbytes in entries:
        slots.append(SlotSpec(name, offset, nbytes))
        offset += -(-nbytes // _ALIGN) * _ALIGN
    return tuple(slots)


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize
