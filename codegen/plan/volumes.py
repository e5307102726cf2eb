"""Closed forms of the bytes that an attention schedule moves, per kind of link, with symbols (sympy).

Ranks sit on N machines of M. All queries and outputs together are q = B H L (D + E) w bytes (w bytes an element), all
keys and values kv = B K L (D + E) w with K key heads; of what travels otherwise (runtime/program/formats.py) a row of D
elements is 2 D bytes as bf16 and D + 4 as fp8. On a mesh of U Ulysses groups and a ring of R, U R = N M:

    exchange   every rank keeps 1/U of its Q, O, K, V and sends the rest:   (U - 1) / U x (q + kv)
    ring       R - 1 hops of the K, V that a rank then has, on every rank:  (R - 1) x kv

and if U > K, groups share key heads: kv / U is then kv / K. What of it crosses machines depends on the axis that is
laid over them first (codegen/schedule/mesh.py); if that is shorter than N, the other one crosses too. The forms hold
where heads, tokens and axes divide evenly and ranks fill machines in order; tests compare them with what the schedules
really send.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy as sp

from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.runtime.program.formats import BF16, FP8, SAME
from sfcompile.runtime.program.intervals import count
from sfcompile.runtime.program.topology import Topology

B, H, K, L, D, E, N, M, U, R, w = sp.symbols("B H K L D E N M U R w", positive=True)


@dataclass(frozen=True)
class Volume:
    """Bytes of one attention over all ranks, inside machines and between machines, as expressions.

    ``numbers`` are the values of the symbols for the schedule at hand.
    """

    inside: sp.Expr
    across: sp.Expr
    numbers: dict[sp.Symbol, int]

    @property
    def bytes(self) -> tuple[int, int]:
        """Both in numbers."""
        return int(self.inside.subs(self.numbers)), int(self.across.subs(self.numbers))

    def __str__(self) -> str:
        inside, across = self.bytes
        values = ", ".join(f"{symbol} = {value}" for symbol, value in self.numbers.items())
        return (
            f"inside machines   {self.inside} = {inside / 2**20:.2f} MiB\n"
            f"between machines  {self.across} = {across / 2**20:.2f} MiB\n"
            f"with {values}"
        )


def volume(schedule: AttentionSchedule, topology: Topology) -> Volume:
    """The closed form of an attention schedule, and its numbers."""
    numbers = _numbers(schedule, topology)
    machines, groups, hops = numbers[N], numbers[U], numbers[R]
    written = schedule.site.written
    q = B * H * L * (_row(written("q"), D) + _row(written("o"), E))
    kv = B * K * L * (_row(written("k"), D) + _row(written("v"), E))
    none = sp.Integer(0)
    if not schedule.split_heads:  # mesh N x M: a chunk crosses to each other machine once, then goes round inside
        straight, ring = (U - 1) * kv, U * (R - 1) * kv
        return _volume(straight, ring, straight if machines > 1 else none, none, numbers)
    part = kv / U if groups <= numbers[K] else kv / K
    exchange = (U - 1) * (q / U + part)
    ring = (R - 1) * U * part
    far_exchange, far_ring = none, none
    if machines > 1 and across_of(schedule.mesh) == "ulysses":
        # N <= U: blocks of U / N groups share a machine. Else a group's ring spans machines: each M-th hop leaves.
        far_exchange = exchange * (U - U / N) / (U - 1) if groups >= machines else exchange
        far_ring = none if groups >= machines else ring / M
    elif machines > 1:
        far_ring = ring * N / R if hops >= machines else ring
        far_exchange = none if hops >= machines else exchange * (U - M) / (U - 1)
    return _volume(exchange, ring, far_exchange, far_ring, numbers)


def _row(written: str, width: sp.Symbol) -> sp.Expr:
    """Bytes of a row that travels."""
    return {SAME: width * w, BF16: 2 * width, FP8: width + 4}[written]


def _volume(
    exchange: sp.Expr, ring: sp.Expr, far_exchange: sp.Expr, far_ring: sp.Expr, numbers: dict[sp.Symbol, int]
) -> Volume:
    """Each part in lowest terms: the all-to-all, and the ring."""
    return Volume(
        sp.factor(exchange - far_exchange) + sp.factor(ring - far_ring),
        sp.factor(far_exchange) + sp.factor(far_ring),
        numbers,
    )


def _numbers(schedule: AttentionSchedule, topology: Topology) -> dict[sp.Symbol, int]:
    site, mesh = schedule.site, schedule.mesh
    return {
        B: site.batch, H: site.heads, K: site.kv_heads, L: sum(count(p) for p in site.q_positions), D: site.head_dim,
        E: site.v_head_dim, N: topology.num_machines, M: topology.num_ranks // topology.num_machines,
        U: mesh.ulysses, R: mesh.ring, w: site.dtype.itemsize,
    }  # fmt: skip


def across_of(mesh: Mesh) -> str:
    """Which axis of a mesh is the outer one, if ranks fill machines in order."""
    return "ulysses" if mesh.ring == 1 or mesh.order[1] == mesh.order[0] + 1 else "ring"
