"""All-gather of keys and values: queries and outputs stay at home, every rank attends all heads.

Pays where K and V are much smaller than Q and O (grouped heads), or where heads are too few to split. The mesh's first
axis crosses machines: each K/V chunk crosses to a machine once and is passed round inside it, not sent to each rank.
"""

from __future__ import annotations

from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.chunk_flow import ChunkFlow
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.torus import staged
from sfcompile.runtime.program.sites import AttentionSite


def build_allgather(site: AttentionSite, mesh: Mesh, q_parts: int = 1, kv_parts: int = 1) -> AttentionSchedule:
    """Schedule of all-gathered K and V, attended chunk by chunk as they arrive.

    Phases ``put_q`` (nothing to send), ``put_k``, ``put_v``, ``attend``, ``collect`` (nothing to wait for). The mesh's
    axes only say how chunks travel: straight along the first, round the second.

    Raises:
        OptionError: less than one part.
    """
    flow = ChunkFlow(site, mesh, q_parts, kv_parts, split_heads=False)
    return flow.schedule("allgather", staged(flow), staged=True)
