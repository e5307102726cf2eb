"""Reshard: every rank puts into each other rank's slot the part of its shard that this one wants."""

from __future__ import annotations

from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule, lay_out, nbytes
from sfcompile.runtime.program.instructions import Arrival, Chunk, Put, RankProgram, Wait
from sfcompile.runtime.program.sites import ReshardSite


def build_reshard(site: ReshardSite, mesh: Mesh) -> Schedule:
    """Schedule of a reshard, in the phases of a gather: ``gather_start`` and ``gather_finish``.

    An offset at which no rank wants anything is left out: a halo exchange talks to neighbours only.
    """
    ranks = mesh.num_ranks
    sizes = {
        d: max(nbytes(site.part_shape(mesh.rank_after(rank, d), rank), site.dtype) for rank in range(ranks))
        for d in range(1, ranks)
    }
    others = [d for d in sizes if sizes[d]]
    origin = RankProgram(
        0,
        {
            "gather_start": tuple(Put("x", 0, mesh.back(d), slot) for slot, d in enumerate(others)),
            "gather_finish": tuple(Wait(slot, d) for slot, d in enumerate(others)),
        },
        tuple(Arrival(slot, d, "x", Chunk(d)) for slot, d in enumerate(others)),
    )
    return Schedule("reshard", site, mesh, lay_out([(f"x({d})", sizes[d]) for d in others]), origin)
