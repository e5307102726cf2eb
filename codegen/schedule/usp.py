"""Ulysses and ring without staging, as today's libraries run them: all-to-all, ring attention, all-to-all.

One dataflow, four names, by the mesh it is laid on (mesh.py):

    ulysses    ring = 1
    ring       ulysses = 1
    usp        Ulysses inside machines, ring across them
    tas        Ulysses across machines, ring inside them (StreamFusion section 3, without Torus Attention)
"""

from __future__ import annotations

from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.chunk_flow import ChunkFlow
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.runtime.program.instructions import Instruction
from sfcompile.runtime.program.sites import AttentionSite


def build_usp(
    site: AttentionSite, mesh: Mesh, q_parts: int = 1, kv_parts: int = 1, kind: str = "usp"
) -> AttentionSchedule:
    """Schedule of unstaged Ulysses x ring. Phases ``put_q``, ``put_k``, ``put_v``, ``attend``, ``collect``.

    All chunks of the first all-to-all are waited for before anything is computed; each ring hop is sent on before it is
    attended, so the ring does overlap; outputs leave when all is done. With several parts of Q, each part's output
    leaves as soon as its last hop is done.

    Raises:
        MeshError: fewer heads than Ulysses ranks.
        OptionError: less than one part.
    """
    flow = ChunkFlow(site, mesh, q_parts, kv_parts)
    return flow.schedule(kind, unstaged(flow))


def unstaged(flow: ChunkFlow) -> list[Instruction]:
    """The attend phase: wait for everything, compute, send everything."""
    queries = flow.all_queries()
    out: list[Instruction] = [flow.wait_query(q) for q in queries if q.src != 0]
    for hop in range(flow.ring):
        chunks = flow.keys(range(flow.groups), [hop])
        for chunk in chunks:
            out += flow.arrive(chunk)
        if hop < flow.ring - 1 or len(flow.q_parts) == 1:
            out.append(flow.attend(queries, chunks))
            continue
        for part in flow.q_parts:
            now = [q for q in queries if q.part == part]
            out.append(flow.attend(now, chunks))
            out += [flow.push(q) for q in now if q.src != 0]
    if len(flow.q_parts) == 1:
        out += [flow.push(q) for q in queries if q.src != 0]
    return out
