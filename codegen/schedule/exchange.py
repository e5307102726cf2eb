"""Exchange: every rank puts into each other rank's slot what this one wants of its shard. A gather is one too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule, lay_out
from sfcompile.runtime.program.instructions import Arrival, Chunk, Put, RankProgram, Wait
from sfcompile.runtime.program.phases import EXCHANGE_FINISH, EXCHANGE_START
from sfcompile.runtime.program.sites import ExchangeSite, nbytes


@dataclass(frozen=True)
class ExchangeSchedule(Schedule):
    """Every rank sends each other one what that wants of its shard. A chunk is all of that, so it has no parts."""

    site: ExchangeSite

    def shape(self, rank: int, arrival: Arrival) -> tuple[int, ...]:
        """Shape of what arrives at ``rank``."""
        return self.site.chunk_shape(arrival.src, rank)

    def arrival_bytes(self, arrival: Arrival) -> NDArray[np.int64]:
        """Bytes of an arrival of the origin's, at every receiving rank."""
        return chunk_bytes(self.site, self.mesh, arrival.src)


def build_exchange(site: ExchangeSite, mesh: Mesh) -> ExchangeSchedule:
    """Schedule of an exchange. Phases ``exchange_start`` and ``exchange_finish``; a slot for each rank that sends.

    Every rank starts with the rank right before it, so that at every moment each receives from one other. An offset
    at which no rank wants anything is left out: a halo exchange talks to neighbours only.
    """
    sizes = {d: int(chunk_bytes(site, mesh, d).max()) for d in range(1, mesh.num_ranks)}
    others = [d for d in sizes if sizes[d]]
    origin = RankProgram(
        0,
        {
            EXCHANGE_START: tuple(Put("x", 0, mesh.back(d), slot) for slot, d in enumerate(others)),
            EXCHANGE_FINISH: tuple(Wait(slot, d) for slot, d in enumerate(others)),
        },
        tuple(Arrival(slot, d, "x", Chunk(d)) for slot, d in enumerate(others)),
    )
    return ExchangeSchedule("exchange", site, mesh, lay_out([(f"x({d})", sizes[d]) for d in others]), origin)


def chunk_bytes(site: ExchangeSite, mesh: Mesh, offset: int) -> NDArray[np.int64]:
    """Bytes that each rank gets from the rank ``offset`` steps on."""
    senders = mesh.ranks_after(offset)
    if site.is_gather:  # the same for every receiver
        return np.array(site.local_bytes, dtype=np.int64)[senders]
    sizes = [nbytes(site.chunk_shape(int(src), rank), site.dtype) for rank, src in enumerate(senders)]
    return np.array(sizes, dtype=np.int64)
