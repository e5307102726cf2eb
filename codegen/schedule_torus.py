"""Torus Attention (StreamFusion, section 4): Ulysses staged and hidden under attention, a ring inside.

Rank ``(u, r)`` computes head slice u for the tokens of its Ulysses group, the ranks ``(*, r)``. Chunks travel by puts:

    Q of rank (a, r), slice u    -> rank (u, r)                               Ulysses
    K, V of rank (a, b), slice u -> rank (u, b), then along the ring (u, b+1), (u, b+2), ...
    O of slice u                 -> home to rank (a, r)                       Ulysses

Order on rank (u, r), groups visited as u, u+1, ... (mod U) so that every pair of groups is used evenly:

    1. stationary: Q_u x KV_u, its ring chunks as they come round (own first)
    2. pull Q:     Q_a x KV_u for a = u+1 ...
    3. pull KV:    all Q x KV_a for a = u+1 ..., ring chunk by ring chunk
    4. push O:     in the last KV group the remote outputs are finished first and sent home one by one while the next is
                   computed; the stationary output is finished last and never moves

A ring chunk is forwarded before it is attended, so the next rank's wait runs under this rank's compute. Every (Q, KV)
pair is attended exactly once, in one fixed order: results are the same bits in every run. Each chunk has a slot of its
own, so no slot is written twice in an epoch.
"""

from __future__ import annotations

from sfcompile.codegen.schedule import Mesh, Schedule, lay_out, nbytes, slice_of
from sfcompile.codegen.sites import AttentionSite, count
from sfcompile.errors import MeshError
from sfcompile.runtime.instructions import Arrival, Attend, Forward, Heads, Instruction, Push, Put, RankProgram, Wait


def kv_slice(site: AttentionSite, heads: Heads) -> Heads:
    """The K/V heads that a slice of query heads reads (grouped-query attention shares K/V heads)."""
    group = site.heads // site.kv_heads
    return heads[0] // group, (heads[1] - 1) // group + 1


class _Torus:
    def __init__(self, site: AttentionSite, mesh: Mesh) -> None:
        self.site = site
        self.mesh = mesh
        self.ranks = mesh.num_ranks

    def heads(self, u: int) -> Heads:
        return slice_of(self.site.heads, self.mesh.ulysses, u % self.mesh.ulysses)

    def kv_heads(self, u: int) -> Heads:
        return kv_slice(self.site, self.heads(u))

    # Slots: Q by Ulysses group, K and V by source rank, O by the group that computed it.
    def q_slot(self, group: int) -> int:
        return group % self.mesh.ulysses

    def k_slot(self, src: int) -> int:
        return self.mesh.ulysses + src

    def v_slot(self, src: int) -> int:
        return self.mesh.ulysses + self.ranks + src

    def o_slot(self, group: int) -> int:
        return self.mesh.ulysses + 2 * self.ranks + group % self.mesh.ulysses

    def q_shape(self, u: int, src: int) -> tuple[int, ...]:
        start, stop = self.heads(u)
        return self.site.batch, stop - start, count(self.site.q_positions[src]), self.site.head_dim

    def k_shape(self, u: int, src: int) -> tuple[int, ...]:
        start, stop = self.kv_heads(u)
        return self.site.batch, stop - start, count(self.site.kv_positions[src]), self.site.head_dim

    def v_shape(self, u: int, src: int) -> tuple[int, ...]:
        return *self.k_shape(u, src)[:3], self.site.v_head_dim

    def o_shape(self, u: int, src: int) -> tuple[int, ...]:
        return *self.q_shape(u, src)[:3], self.site.v_head_dim

    def slot_bytes(self) -> list[tuple[str, int]]:
        mesh, dtype = self.mesh, self.site.dtype
        groups, everyone = range(mesh.ulysses), range(self.ranks)
        entries = []
        for a in groups:
            sizes = [nbytes(self.q_shape(u, mesh.rank_at(a, r)), dtype) for u in groups for r in range(mesh.ring)]
            entries.append((f"q.group{a}", max(sizes)))
        for name, shape in (("k", self.k_shape), ("v", self.v_shape)):
            entries += [(f"{name}.rank{s}", max(nbytes(shape(u, s), dtype) for u in groups)) for s in everyone]
        for a in groups:
            entries.append((f"o.group{a}", max(nbytes(self.o_shape(a, s), dtype) for s in everyone)))
        return entries

    # ------------------------------------------------------------------ one rank

    def program(self, rank: int) -> RankProgram:
        u, r = self.mesh.place(rank)
        others = [u + step for step in range(1, self.mesh.ulysses)]
        phases = {
            "put_q": tuple(Put("q", self.heads(a), self.mesh.rank_at(a, r), self.q_slot(u)) for a in others),
            "put_k": self._put_kv(rank, "k", self.k_slot(rank)),
            "put_v": self._put_kv(rank, "v", self.v_slot(rank)),
            "attend": tuple(self._attend(rank)),
            "collect": tuple(Wait(self.o_slot(a), self.mesh.rank_at(a, r)) for a in others),
        }
        heads = {self.mesh.rank_at(a, r): self.heads(a) for a in range(self.mesh.ulysses)}
        return RankProgram(rank, phases, tuple(self._arrivals(rank)), heads)

    def _put_kv(self, rank: int, tensor: str, slot: int) -> tuple[Put, ...]:
        u, r = self.mesh.place(rank)
        puts = [
            Put(tensor, self.kv_heads(u + s), self.mesh.rank_at(u + s, r), slot) for s in range(1, self.mesh.ulysses)
        ]
        if self.mesh.ring > 1:  # the first hop of this rank's own chunk
            puts.insert(0, Put(tensor, self.kv_heads(u), self.mesh.rank_at(u, r + 1), slot))
        return tuple(puts)

    def _sources(self, group: int, r: int) -> list[int]:
        """KV chunks of a group in the order in which the ring brings them to column ``r``."""
        return [self.mesh.rank_at(group, r - hop) for hop in range(self.mesh.ring)]

    def _attend(self, rank: int) -> list[Instruction]:
        u, r = self.mesh.place(rank)
        ring, groups = self.mesh.ring, self.mesh.ulysses
        out: list[Instruction] = []

        def arrive(src: int, hop: int) -> None:
            if src == rank:
                return
            # From another group a chunk comes straight to this column (hop 0), else from the ring predecessor.
            sender = src if hop == 0 else self.mesh.rank_at(u, r - 1)
            for slot in (self.k_slot(src), self.v_slot(src)):
                out.append(Wait(slot, sender))
                if hop < ring - 1:
                    out.append(Forward(self.mesh.rank_at(u, r + 1), slot))

        def attend(group: int, src: int) -> None:
            own_kv = src == rank
            out.append(
                Attend(
                    self.mesh.rank_at(group, r),
                    src,
                    None if group % groups == u else self.q_slot(group),
                    None if own_kv else self.k_slot(src),
                    None if own_kv else self.v_slot(src),
                )
            )

        for hop, src in enumerate(self._sources(u, r)):
            arrive(src, hop)
            attend(u, src)
        for a in range(u + 1, u + groups):
            out.append(Wait(self.q_slot(a), self.mesh.rank_at(a, r)))
            for src in self._sources(u, r):
                attend(a, src)
        for step in range(1, groups):
            sources = self._sources(u + step, r)
            if step < groups - 1:
                for hop, src in enumerate(sources):
                    arrive(src, hop)
                    for a in range(u, u + groups):
                        attend(a, src)
                continue
            for i, a in enumerate((*range(u + 1, u + groups), u)):
                for hop, src in enumerate(sources):
                    if i == 0:
                        arrive(src, hop)
                    attend(a, src)
                if a != u:
                    out.append(Push(self.mesh.rank_at(a, r), self.o_slot(u)))
        return out

    def _arrivals(self, rank: int) -> list[Arrival]:
        u, r = self.mesh.place(rank)
        found = []
        for a in range(u + 1, u + self.mesh.ulysses):
            peer = self.mesh.rank_at(a, r)
            found.append(Arrival(self.q_slot(a), peer, self.q_shape(u, peer)))
            found.append(Arrival(self.o_slot(a), peer, self.o_shape(a, rank)))
        for group in range(self.mesh.ulysses):
            for hop, src in enumerate(self._sources(group, r)):
                if src != rank:
                    sender = src if hop == 0 else self.mesh.rank_at(u, r - 1)
                    found.append(Arrival(self.k_slot(src), sender, self.k_shape(u, src)))
                    found.append(Arrival(self.v_slot(src), sender, self.v_shape(u, src)))
        return found


def build_torus(site: AttentionSite, mesh: Mesh) -> Schedule:
    """Schedule of Torus Attention. Phases ``put_q``, ``put_k``, ``put_v``, ``attend``, ``collect``.

    Heads that do not divide are split unevenly, tokens lie as the site says; nothing is padded.

    Raises:
        MeshError: fewer heads than Ulysses ranks.
    """
    if mesh.ulysses > site.heads:
        raise MeshError(
            f"attention {site.name} has {site.heads} heads for {mesh.ulysses} Ulysses ranks",
            "every Ulysses rank computes at least one head",
            f"use ulysses <= {site.heads} and a longer ring",
        )
    torus = _Torus(site, mesh)
    return Schedule("torus", site, mesh, lay_out(torus.slot_bytes()), torus.program)
