"""The schedule object: one communication site on one mesh, written once for all ranks.

Every rank runs the same program, seen from its own place in the mesh: a schedule holds the program of the *origin*, in
which ranks are offsets (mesh.py) and slots are numbered by where their chunk comes from, seen from the receiver. The
program of rank ``p`` (:meth:`Schedule.program`) is the origin's with every offset ``d`` replaced by the rank at p + d.
That symmetry is what lets the checker prove 1024 ranks as fast as four (codegen/proof/checker.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.runtime.program.formats import form
from sfcompile.runtime.program.instructions import (
    Arrival,
    Attend,
    Chunk,
    Forward,
    Instruction,
    Push,
    Put,
    RankProgram,
    Wait,
)
from sfcompile.runtime.program.sites import LINE_BYTES, AnySite, align
from sfcompile.runtime.program.topology import Topology


@dataclass(frozen=True)
class SlotSpec:
    """A place in every rank's heap bank, at the same offset (but see :meth:`Schedule.place`): bytes are the most that
    any rank may need."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Schedule(ABC):
    """One site on one mesh; what chunks are, its subclasses say (attention.py, exchange.py).

    Attributes:
        kind: the builder's name.
        origin: the program of the origin; every rank field in it is an offset.
        groups: the same schedule runs in several disjoint groups of ranks at a time: the mesh's rank i is rank
            ``groups[g][i]`` of the job. Empty: the mesh's ranks are the job's.
    """

    kind: str
    site: AnySite
    mesh: Mesh
    slots: tuple[SlotSpec, ...]
    origin: RankProgram
    groups: tuple[tuple[int, ...], ...] = ()
    _programs: dict[int, RankProgram] = field(default_factory=dict, init=False, compare=False, hash=False, repr=False)

    @property
    def heap_bytes(self) -> int:
        """Bytes of one bank, up to the end of its last slot; a heap has two."""
        return max((slot.offset + slot.nbytes for slot in self.slots), default=0)

    @property
    def assembled(self) -> bool:
        """Whether weights come together in the bank, where this rank's own rows lie too."""
        return False

    @property
    def parts(self) -> int:
        """In how many parts what it moves comes and goes."""
        return self.site.parts

    def place(self, rank: int, slot: int) -> int:
        """Where a slot lies at a rank: bytes from the start of the bank."""
        return self.slots[slot].offset

    def program(self, rank: int) -> RankProgram:
        """A rank's instructions."""
        if rank not in self._programs:
            self._programs[rank] = self._seen_from(rank)
        return self._programs[rank]

    def _seen_from(self, rank: int) -> RankProgram:
        at = [self.mesh.rank_after(rank, offset) for offset in range(self.mesh.num_ranks)]

        def moved(step: Instruction) -> Instruction:
            match step:
                case Put(tensor, part, dst, slot):
                    return Put(tensor, part, at[dst], slot)
                case Forward(slot, dst, to_slot):
                    return Forward(slot, at[dst], to_slot)
                case Wait(slot, src):
                    return Wait(slot, at[src])
                case Push(q, slot):
                    return Push(Chunk(at[q.src], q.part), slot)
                case Attend(q, kv, q_slots, k_slots, v_slots):
                    queries = tuple(Chunk(at[c.src], c.part) for c in q)
                    keys = tuple(Chunk(at[c.src], c.part) for c in kv)
                    return Attend(queries, keys, q_slots, k_slots, v_slots)

        phases = {name: tuple(moved(step) for step in steps) for name, steps in self.origin.phases.items()}
        arrivals = tuple(
            Arrival(a.slot, at[a.src], a.tensor, Chunk(at[a.chunk.src], a.chunk.part)) for a in self.origin.arrivals
        )
        return RankProgram(rank, phases, arrivals)

    def members(self, rank: int) -> tuple[int, tuple[int, ...]]:
        """Which rank of the mesh a rank of the job is, and the job's ranks of its group, in the mesh's order."""
        if not self.groups:
            return rank, self._everyone
        group = next(group for group in self.groups if rank in group)
        return group.index(rank), group

    @cached_property
    def _everyone(self) -> tuple[int, ...]:
        return tuple(range(self.mesh.num_ranks))

    @abstractmethod
    def shape(self, rank: int, arrival: Arrival) -> tuple[int, ...]:
        """Shape of what arrives at ``rank``."""

    def form(self, rank: int, arrival: Arrival) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of what lies in the slot: a chunk as it travels."""
        return form(self.site.written(arrival.tensor), self.shape(rank, arrival), self.site.dtype)

    @abstractmethod
    def arrival_bytes(self, arrival: Arrival) -> NDArray[np.int64]:
        """Bytes of an arrival of the origin's, at every receiving rank."""

    def bytes_by_link(self, topology: Topology) -> tuple[int, int]:
        """Bytes of one epoch over all ranks of the topology: inside machines, and between machines.

        Args:
            topology: the job's; or, of a schedule that runs in several groups, that of one group.
        """
        machines = np.array(topology.machine_of)
        whole = topology.num_ranks == self.mesh.num_ranks
        groups = [machines] if whole else [machines[list(group)] for group in self.groups]
        inside = across = 0
        local: dict[int, NDArray[np.int64]] = {}  # by offset of the sender: in how many groups it is near, by receiver
        for arrival in self.origin.arrivals:
            if arrival.src not in local:
                after = self.mesh.ranks_after(arrival.src)
                local[arrival.src] = np.sum([homes[after] == homes for homes in groups], axis=0)
            sizes = self.arrival_bytes(arrival)
            near = int(sizes @ local[arrival.src])
            inside += near
            across += int(sizes.sum()) * len(groups) - near
        return inside, across

    @property
    def title(self) -> str:
        """The schedule in a few words."""
        return f"{self.kind} ulysses {self.mesh.ulysses} x ring {self.mesh.ring}"

    def __str__(self) -> str:
        """The program of every rank, in offsets: ``(+a,+h)`` is a steps on in Ulysses and h steps on in the ring."""
        lines = [f"{self.title} of {self.site.name}: {len(self.slots)} slots, {self.heap_bytes / 2**20:.2f} MiB a bank"]
        names = {slot: spec.name for slot, spec in enumerate(self.slots)}

        def place(offset: int) -> str:
            a, h = self.mesh.step(offset)
            return "here" if offset == 0 else f"({a:+d},{h:+d})"

        def chunks(of: tuple[Chunk, ...]) -> str:
            return " ".join(place(c.src) + (f".{c.part}" if c.part else "") for c in of)

        for phase, steps in self.origin.phases.items():
            for step in steps:
                match step:
                    case Put(tensor, part, dst, slot):
                        text = f"put {tensor}{f'.{part}' if part else ''} -> {place(dst)} {names[slot]}"
                    case Forward(slot, dst, to_slot):
                        text = f"forward {names[slot]} -> {place(dst)} {names[to_slot]}"
                    case Wait(slot, src):
                        text = f"wait {names[slot]} from {place(src)}"
                    case Push(q, slot):
                        text = f"push O of {chunks((q,))} -> {place(q.src)} {names[slot]}"
                    case Attend(q, kv, _, _, _):
                        text = f"attend Q {chunks(q)} x KV {chunks(kv)}"
                lines.append(f"  {phase:<15} {text}")
        return "\n".join(lines)


def lay_out(entries: list[tuple[str, int]]) -> tuple[SlotSpec, ...]:
    """Place slots ``(name, nbytes)`` one after the other, aligned to cache lines."""
    slots = []
    offset = 0
    for name, nbytes in entries:
        slots.append(SlotSpec(name, offset, nbytes))
        offset += align(nbytes, LINE_BYTES)
    return tuple(slots)
