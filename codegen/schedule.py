"""The mesh, and the schedule object: one communication site, every rank's slots and instructions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from sfcompile.codegen.sites import AttentionSite, GatherSite
from sfcompile.errors import MeshError
from sfcompile.runtime.instructions import Forward, Push, Put, RankProgram
from sfcompile.runtime.topology import Topology

_ALIGN = 64


@dataclass(frozen=True)
class Mesh:
    """Ulysses x ring over ranks sorted by machine: Ulysses is the outer axis, so it crosses machines first.

    ``order[u * ring + r]`` is the rank at ``(u, r)``.
    """

    ulysses: int
    ring: int
    order: tuple[int, ...]

    @classmethod
    def of(cls, topology: Topology, ulysses: int, ring: int) -> Mesh:
        """Lay the mesh over a topology.

        Raises:
            MeshError: ``ulysses * ring`` is not the number of ranks.
        """
        if ulysses * ring != topology.num_ranks:
            raise MeshError(
                f"mesh ulysses {ulysses} x ring {ring} = {ulysses * ring} ranks, but there are {topology.num_ranks}",
                "every rank has exactly one place in the mesh",
                "choose degrees whose product is the number of ranks",
            )
        order = sorted(range(topology.num_ranks), key=lambda rank: (topology.machine_of[rank], rank))
        return cls(ulysses, ring, tuple(order))

    @property
    def num_ranks(self) -> int:
        """Ranks in the mesh."""
        return len(self.order)

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        return {rank: divmod(i, self.ring) for i, rank in enumerate(self.order)}

    def place(self, rank: int) -> tuple[int, int]:
        """``(u, r)`` of a rank."""
        return self._places[rank]

    def rank_at(self, u: int, r: int) -> int:
        """The rank at ``(u, r)``, both taken modulo their axis."""
        return self.order[u % self.ulysses * self.ring + r % self.ring]


@dataclass(frozen=True)
class SlotSpec:
    """A place in every rank's heap bank, at the same offset: bytes are the largest that any rank needs."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Schedule:
    """One site on one mesh. ``program(rank)`` gives a rank's instructions; built on first use and kept."""

    kind: str
    site: AttentionSite | GatherSite
    mesh: Mesh
    slots: tuple[SlotSpec, ...]
    build: Callable[[int], RankProgram] = field(compare=False, hash=False, repr=False)
    _programs: dict[int, RankProgram] = field(default_factory=dict, compare=False, hash=False, repr=False)

    @property
    def heap_bytes(self) -> int:
        """Bytes of one bank."""
        return max((slot.offset + slot.nbytes for slot in self.slots), default=0)

    def program(self, rank: int) -> RankProgram:
        """This rank's instructions."""
        if rank not in self._programs:
            self._programs[rank] = self.build(rank)
        return self._programs[rank]

    def bytes_sent(self, rank: int) -> dict[int, int]:
        """Bytes that ``rank`` sends to each other rank in one epoch."""
        sent: dict[int, int] = {}
        width = self.site.dtype.itemsize
        for instructions in self.program(rank).phases.values():
            for instruction in instructions:
                if isinstance(instruction, (Put, Forward, Push)):
                    dst = instruction.q_src if isinstance(instruction, Push) else instruction.dst
                    arrival = next(a for a in self.program(dst).arrivals if a.slot == instruction.slot)
                    sent[dst] = sent.get(dst, 0) + math.prod(arrival.shape) * width
        return sent

    def bytes_by_link(self, topology: Topology) -> tuple[int, int]:
        """Bytes of one epoch over all ranks: inside machines, and between machines."""
        inside = across = 0
        for rank in range(topology.num_ranks):
            for dst, nbytes in self.bytes_sent(rank).items():
                if topology.same_machine(rank, dst):
                    inside += nbytes
                else:
                    across += nbytes
        return inside, across

    def __str__(self) -> str:
        head = f"{self.kind} {self.site.name}: ulysses {self.mesh.ulysses} x ring {self.mesh.ring}, "
        head += f"{len(self.slots)} slots, {self.heap_bytes / 2**20:.2f} MiB per bank"
        return "\n".join([head, *(str(self.program(rank)) for rank in range(min(self.mesh.num_ranks, 8)))])


def lay_out(entries: list[tuple[str, int]]) -> tuple[SlotSpec, ...]:
    """Place slots ``(name, nbytes)`` one after the other, aligned to cache lines."""
    slots = []
    offset = 0
    for name, nbytes in entries:
        slots.append(SlotSpec(name, offset, nbytes))
        offset += -(-nbytes // _ALIGN) * _ALIGN
    return tuple(slots)


def slice_of(total: int, parts: int, index: int) -> tuple[int, int]:
    """The ``index``-th of ``parts`` contiguous slices of ``total`` things, sizes within one of each other."""
    base, extra = divmod(total, parts)
    start = index * base + min(index, extra)
    return start, start + base + (index < extra)


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize
