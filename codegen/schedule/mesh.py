"""The mesh: ranks on a grid Ulysses x ring, and how the grid lies on the machines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sfcompile.errors import MeshError
from sfcompile.runtime.program.topology import Topology

ACROSS = ("ulysses", "ring")
"""The ways to lay a mesh over machines, by the axis that crosses them first."""


@dataclass(frozen=True)
class Mesh:
    """Ulysses x ring. ``order[u * ring + r]`` is the rank at ``(u, r)``; see :meth:`of` for the ways to lay it out.

    Ulysses groups may be bundled: ``u = n * lanes + g`` is lane g of bundle n (the groups that share a machine, say).
    An *offset* ``(n * lanes + g) * ring + h`` stands for the step from ``(n', g', r)`` to ``(n' + n, g' + g, r + h)``,
    each modulo its axis; schedules are written in offsets once, for every rank at the same time (schedule.py). The
    first part of an offset, ``n * lanes + g``, is called the step between groups.
    """

    ulysses: int
    ring: int
    order: tuple[int, ...]
    lanes: int = 1

    @classmethod
    def of(cls, topology: Topology, ulysses: int, ring: int, across: str = "ulysses", lanes: int = 1) -> Mesh:
        """Lay the mesh over ranks sorted by machine.

        Args:
            across: the outer axis. "ulysses" puts the ring inside machines (StreamFusion); "ring" puts Ulysses inside
                machines and the ring across them (USP as its users run it).
            lanes: how many neighbouring Ulysses groups form a bundle; divides ``ulysses``.

        Raises:
            MeshError: ``ulysses * ring`` is not the number of ranks, or lanes do not divide.
        """
        if ulysses * ring != topology.num_ranks or ulysses % lanes:
            raise MeshError(
                f"mesh ulysses {ulysses} x ring {ring} = {ulysses * ring} ranks in bundles of {lanes}, but there are "
                f"{topology.num_ranks}",
                "every rank has exactly one place in the mesh",
                "choose degrees whose product is the number of ranks, and lanes that divide ulysses",
            )
        ranks = sorted(range(topology.num_ranks), key=lambda rank: (topology.machine_of[rank], rank))
        if across == "ring":
            ranks = [ranks[r * ulysses + u] for u in range(ulysses) for r in range(ring)]
        return cls(ulysses, ring, tuple(ranks), lanes)

    @property
    def num_ranks(self) -> int:
        """``ulysses * ring``: those of one group where a schedule runs in several at a time."""
        return len(self.order)

    @property
    def bundles(self) -> int:
        """``ulysses / lanes``: bundles of neighbouring Ulysses groups."""
        return self.ulysses // self.lanes

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        return {rank: divmod(i, self.ring) for i, rank in enumerate(self.order)}

    def place(self, rank: int) -> tuple[int, int]:
        """``(u, r)`` of a rank."""
        return self._places[rank]

    def rank_at(self, u: int, r: int) -> int:
        """The rank at ``(u, r)``, both taken modulo their axis."""
        return self.order[u % self.ulysses * self.ring + r % self.ring]

    def offset(self, a: int, h: int) -> int:
        """A step ``a`` between groups and ``h`` along the ring, as one number."""
        return a * self.ring + h % self.ring

    def step(self, offset: int) -> tuple[int, int]:
        """The inverse of :meth:`offset`."""
        return divmod(offset, self.ring)

    def minus(self, a: int) -> int:
        """The step between groups that leads back."""
        n, g = divmod(a, self.lanes)
        return -n % self.bundles * self.lanes + -g % self.lanes

    def plus(self, a: int, b: int) -> int:
        """Two steps between groups, one after the other."""
        (n, g), (m, k) = divmod(a, self.lanes), divmod(b, self.lanes)
        return (n + m) % self.bundles * self.lanes + (g + k) % self.lanes

    def back(self, offset: int) -> int:
        """The offset that leads back: ``add(offset, back(offset))`` is 0."""
        a, h = divmod(offset, self.ring)
        return self.offset(self.minus(a), -h)

    def add(self, first: int, second: int) -> int:
        """The offset of one step after the other."""
        (a, h), (b, k) = divmod(first, self.ring), divmod(second, self.ring)
        return self.offset(self.plus(a, b), h + k)

    def rank_after(self, rank: int, offset: int) -> int:
        """Where an offset from ``rank`` leads."""
        (u, r), (a, h) = self._places[rank], divmod(offset, self.ring)
        return self.rank_at(self.plus(u, a), r + h)

    def ranks_after(self, offset: int) -> NDArray[np.int64]:
        """Where an offset leads, int64 [num_ranks]: entry r is :meth:`rank_after` of r."""
        if offset not in self._known:
            a, h = divmod(offset, self.ring)
            n, g = divmod(a, self.lanes)
            ranks = np.empty(self.num_ranks, dtype=np.int64)
            seen = self._unrolled[n : n + self.bundles, g : g + self.lanes, h : h + self.ring]
            ranks[self._laid_out] = seen.ravel()
            self._known[offset] = ranks
        return self._known[offset]

    @cached_property
    def _laid_out(self) -> NDArray[np.int64]:
        return np.array(self.order, dtype=np.int64)

    @cached_property
    def _unrolled(self) -> NDArray[np.int64]:
        """The grid of bundles, lanes and ring twice along each axis: a step is a window of it."""
        return np.tile(self._laid_out.reshape(self.bundles, self.lanes, self.ring), (2, 2, 2))

    @cached_property
    def _known(self) -> dict[int, NDArray[np.int64]]:
        return {}
