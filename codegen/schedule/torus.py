"""Torus Attention (StreamFusion, section 4): Ulysses staged and hidden under attention, a ring inside.

Bundle 0 holds the rank's own Ulysses group (and those that share its machine, if the mesh has lanes); bundles are
visited as 1, 2, ... from every rank, so every pair of bundles is used evenly:

    1. stationary: Q x KV of the own bundle, its ring chunks as they come round (own first)
    2. pull Q:     Q of bundle 1, 2, ... as each lands, against the own bundle's KV in one call
    3. pull KV:    all Q x KV of bundle 1, 2, ..., ring hop by ring hop, part by part
    4. push O:     in the last KV bundle the remote outputs are finished first and sent home one by one while the next
                   is computed; the stationary output is finished last

Every (Q, KV) pair is attended exactly once, in one fixed order: results are the same bits in every run.
"""

from __future__ import annotations

from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.chunk_flow import ChunkFlow
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.runtime.program.instructions import Chunk, Instruction
from sfcompile.runtime.program.sites import AttentionSite


def build_torus(site: AttentionSite, mesh: Mesh, q_parts: int = 1, kv_parts: int = 1) -> AttentionSchedule:
    """Schedule of Torus Attention. Phases ``put_q``, ``put_k``, ``put_v``, ``attend``, ``collect``.

    Heads that do not divide are split unevenly, tokens lie as the site says; nothing is padded. More parts let
    compute start on a part of a chunk and outputs leave earlier, for one more launch each.

    Raises:
        MeshError: fewer heads than Ulysses ranks.
        OptionError: less than one part.
    """
    flow = ChunkFlow(site, mesh, q_parts, kv_parts)
    return flow.schedule("torus", staged(flow), staged=True)


def staged(flow: ChunkFlow) -> list[Instruction]:
    """The attend phase: compute on whatever is here while the rest arrives."""
    if flow.site.parts > 1:
        return in_parts(flow)
    lanes = flow.mesh.lanes
    bundles = [range(n, n + lanes) for n in range(0, flow.groups, lanes)]
    # Without split heads queries stay at home: the own ones are all there are.
    own, *remote = [flow.queries(bundle if flow.split_heads else range(1)) for bundle in bundles]
    remote = remote if flow.split_heads else []
    home = [q for part in own for q in part]
    everything = home + [q for parts in remote for part in parts for q in part]
    hops = range(flow.ring)
    out: list[Instruction] = [flow.wait_query(q) for q in home if q.src != 0]

    for hop in hops:
        chunks = flow.keys(bundles[0], [hop])
        for chunk in chunks:
            out += flow.arrive(chunk)
        out.append(flow.attend(home, chunks))
    for parts in remote:
        for part in parts:
            out += [flow.wait_query(q) for q in part]
            out.append(flow.attend(part, flow.keys(bundles[0], hops)))

    for bundle in bundles[1:-1]:
        for chunks in _arrivals(flow, bundle):
            for chunk in chunks:
                out += flow.arrive(chunk)
            out.append(flow.attend(everything, chunks))
    for bundle in bundles[1:][-1:]:
        first, *rest = [part for parts in remote for part in parts] + (own if lanes > 1 else [home])
        for chunks in _arrivals(flow, bundle):
            for chunk in chunks:
                out += flow.arrive(chunk)
            out.append(flow.attend(first, chunks))
        for done, now in zip([first, *rest], [*rest, []], strict=True):
            out += [flow.push(q) for q in done if q.src != 0]
            if now:
                out.append(flow.attend(now, flow.keys(bundle, hops)))
    if len(bundles) == 1:
        out += [flow.push(q) for q in home if q.src != 0]
    return out


def in_parts(flow: ChunkFlow) -> list[Instruction]:
    """The same for tokens that come part by part, each as keys, values, queries: work in the order of arrival.

        1. stationary: Q x KV of the own bundle
        2. per part:   keys and values of each other bundle, against every Q that is here; then its Q, against every KV
        3. last part:  once its last KV is attended, outputs of the earlier parts' remote Q go home, while the last
                       remote Q are still arriving; each of those is attended to all KV at once and its output goes home

    So the link carries Q of the last part while outputs of the first are made, and never idles for an attention call.
    """
    hops = range(flow.ring)
    lanes = flow.mesh.lanes
    near, *far = [range(n, n + lanes) for n in range(0, flow.groups, lanes)]
    here = [q for part in flow.queries(near if flow.split_heads else range(1)) for q in part]
    waiting = {p: [flow.queries(bundle)[p] for bundle in far] if flow.split_heads else [] for p in flow.q_parts}
    out: list[Instruction] = [flow.wait_query(q) for q in here if q.src != 0]
    keys: list[tuple[int, int, int]] = []
    for hop in hops:
        chunks = flow.keys(near, [hop])
        for chunk in chunks:
            out += flow.arrive(chunk)
        out.append(flow.attend(here, chunks))
        keys += chunks
    remote: list[Chunk] = []
    last = flow.kv_parts[-1]
    for part in flow.kv_parts:
        for bundle in far:
            chunks = [(a, h, part) for h in hops for a in bundle]
            for chunk in chunks:
                out += flow.arrive(chunk)
            keys += chunks
            if part == last and bundle is far[-1] and remote:
                out.append(flow.attend(remote, chunks))
                out += [flow.push(q) for q in remote]
                out.append(flow.attend(here, chunks))
            else:
                out.append(flow.attend(here + remote, chunks))
        for queries in waiting[part]:
            out += [flow.wait_query(q) for q in queries]
            out.append(flow.attend(queries, keys))
            remote += queries
            if part == last:
                out += [flow.push(q) for q in queries]
    return out + [flow.push(q) for q in here if q.src != 0]


def _arrivals(flow: ChunkFlow, bundle: range) -> list[list[tuple[int, int, int]]]:
    """The key chunks of a bundle in the order in which they are attended: by hop and part, its lanes together."""
    chunks = flow.keys(bundle, range(flow.ring))
    return [chunks[at : at + len(bundle)] for at in range(0, len(chunks), len(bundle))]
