"""All-gather of uneven shards: every rank puts its shard into its own slot on every other rank."""

from __future__ import annotations

from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule, lay_out, nbytes
from sfcompile.runtime.program.instructions import Arrival, Chunk, Put, RankProgram, Wait
from sfcompile.runtime.program.sites import GatherSite


def build_gather(site: GatherSite, mesh: Mesh) -> Schedule:
    """Schedule of a gather. Phases ``gather_start`` and ``gather_finish``; slot d - 1 is for the rank d steps on.

    Every rank starts with the rank right before it, so that at every moment each receives from one other.
    """
    others = range(1, mesh.num_ranks)
    size = max(nbytes(site.local_shape(rank), site.dtype) for rank in range(mesh.num_ranks))
    origin = RankProgram(
        0,
        {
            "gather_start": tuple(Put("x", 0, mesh.back(d), d - 1) for d in others),
            "gather_finish": tuple(Wait(d - 1, d) for d in others),
        },
        tuple(Arrival(d - 1, d, "x", Chunk(d)) for d in others),
    )
    return Schedule("gather", site, mesh, lay_out([(f"x({d})", size) for d in others]), origin)
