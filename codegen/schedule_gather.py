"""All-gather of uneven shards: every rank puts its shard into its own slot on every other rank."""

from __future__ import annotations

from sfcompile.codegen.schedule import Mesh, Schedule, lay_out, nbytes
from sfcompile.codegen.sites import GatherSite
from sfcompile.runtime.instructions import Arrival, Put, RankProgram, Wait


def build_gather(site: GatherSite, mesh: Mesh) -> Schedule:
    """Schedule of a gather. Phases ``gather_start`` and ``gather_finish``; slot s is for rank s's shard.

    Rank p starts with its successor, so that at every moment each rank receives from one other.
    """
    ranks = mesh.num_ranks
    slots = lay_out([(f"x{s}", nbytes(site.local_shape(s), site.dtype)) for s in range(ranks)])

    def build(rank: int) -> RankProgram:
        others = [(rank + step) % ranks for step in range(1, ranks)]
        senders = [(rank - step) % ranks for step in range(1, ranks)]
        return RankProgram(
            rank,
            {
                "gather_start": tuple(Put("x", None, dst, rank) for dst in others),
                "gather_finish": tuple(Wait(src, src) for src in senders),
            },
            tuple(Arrival(src, src, site.local_shape(src)) for src in senders),
        )

    return Schedule("gather", site, mesh, slots, build)
