"""Which chunks travel where: the slots, puts and arrivals that all attention schedules share.

On the mesh ``A x B`` (Ulysses x ring), seen from the rank that receives:

    q(a)     queries of rank (a, 0), sent by it                                          only if heads are split
    k(a, h)  keys of rank (a, -h): at hop 0 sent by rank (a, 0) itself, then passed round the ring, each rank sending
    v(a, h)  what it got at hop h - 1 to its successor (0, +1)
    o(a)     this rank's outputs for the heads of group a, sent home by rank (a, 0)      only if heads are split

A rank's tokens may be cut into parts: ``q(a).1`` is the second part of the queries of rank (a, 0). Every chunk has a
slot of its own, so no slot is written twice in an epoch. Builders differ only in the order of waits, attention calls
and pushes (torus.py, usp.py, allgather.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import lay_out
from sfcompile.errors import MeshError, OptionError
from sfcompile.runtime.program.formats import travel_bytes
from sfcompile.runtime.program.instructions import (
    Arrival,
    Attend,
    Chunk,
    Forward,
    Instruction,
    Push,
    Put,
    RankProgram,
    Wait,
)
from sfcompile.runtime.program.intervals import slice_of
from sfcompile.runtime.program.phases import ATTEND, COLLECT, PUTS
from sfcompile.runtime.program.sites import AttentionSite, kv_slice

Key = tuple[str, int, int, int]
"""``(tensor, a, h, part)``."""


class ChunkFlow:
    """The chunks of one site on one mesh, and the origin's instructions that move them.

    Raises:
        MeshError: fewer heads than Ulysses ranks.
        OptionError: less than one part.
    """

    def __init__(
        self, site: AttentionSite, mesh: Mesh, q_parts: int = 1, kv_parts: int = 1, split_heads: bool = True
    ) -> None:
        if split_heads and mesh.ulysses > site.heads:
            raise MeshError(
                f"attention {site.name} has {site.heads} heads for {mesh.ulysses} Ulysses ranks",
                "every Ulysses rank computes at least one head",
                f"use ulysses <= {site.heads} and a longer ring",
            )
        if min(q_parts, kv_parts) < 1:
            raise OptionError(
                f"attention {site.name} cut into {q_parts} Q and {kv_parts} KV parts",
                "a rank's tokens are at least one part",
                "use whole numbers of at least 1",
            )
        self.site = site
        self.mesh = mesh
        self.split_heads = split_heads
        self.q_parts, self.kv_parts = range(q_parts), range(kv_parts)
        self.groups, self.ring = mesh.ulysses, mesh.ring
        self.others = range(1, self.groups)
        moving = self.others if split_heads else range(0)
        keys: list[Key] = [("q", a, 0, p) for a in moving for p in self.q_parts]
        for tensor in ("k", "v"):
            keys += [
                (tensor, a, h, p)
                for a in range(self.groups)
                for h in range(self.ring)
                for p in self.kv_parts
                if (a, h) != (0, 0)
            ]
        keys += [("o", a, 0, p) for a in moving for p in self.q_parts]
        self._slots = {key: slot for slot, key in enumerate(keys)}

    def slot(self, tensor: str, a: int, h: int = 0, part: int = 0) -> int:
        """The slot of a chunk at its receiver, who sees it ``(a, h)`` away."""
        return self._slots[tensor, a, h, part]

    # ------------------------------------------------------------------ chunks

    def queries(self, groups: Iterable[int]) -> list[list[Chunk]]:
        """The query chunks of some groups in this column, by part."""
        return [[Chunk(self.mesh.offset(a, 0), p) for a in groups] for p in self.q_parts]

    def all_queries(self) -> list[Chunk]:
        """Every query chunk that this rank attends: its own first."""
        groups = range(self.groups) if self.split_heads else range(1)
        return [Chunk(self.mesh.offset(a, 0), p) for a in groups for p in self.q_parts]

    def keys(self, groups: Iterable[int], hops: Iterable[int]) -> list[tuple[int, int, int]]:
        """Key chunks ``(a, h, part)`` of some groups that the ring brings at some hops."""
        groups = list(groups)
        return [(a, h, p) for h in hops for p in self.kv_parts for a in groups]

    # ------------------------------------------------------------------ instructions

    def arrive(self, chunk: tuple[int, int, int]) -> list[Instruction]:
        """Wait for K and V of a key chunk and send them on at once, so that the next rank waits under our compute."""
        a, h, p = chunk
        steps: list[Instruction] = []
        for tensor in ("k", "v"):
            if (a, h) != (0, 0):
                sender = self.mesh.offset(a, 0) if h == 0 else self.mesh.offset(0, -1)
                steps.append(Wait(self.slot(tensor, a, h, p), sender))
                if h < self.ring - 1:
                    steps.append(
                        Forward(self.slot(tensor, a, h, p), self.mesh.offset(0, 1), self.slot(tensor, a, h + 1, p))
                    )
        return steps

    def wait_query(self, q: Chunk) -> Wait:
        """Wait for the queries of another group."""
        return Wait(self.slot("q", self.mesh.step(q.src)[0], 0, q.part), q.src)

    def attend(self, q: Sequence[Chunk], kv: Sequence[tuple[int, int, int]]) -> Attend:
        """One call: every query chunk of ``q`` against every key chunk of ``kv``."""

        def key_slots(tensor: str) -> tuple[int | None, ...]:
            return tuple(None if (a, h) == (0, 0) else self.slot(tensor, a, h, p) for a, h, p in kv)

        return Attend(
            tuple(q),
            tuple(Chunk(self.mesh.offset(a, -h), p) for a, h, p in kv),
            tuple(None if c.src == 0 else self.slot("q", self.mesh.step(c.src)[0], 0, c.part) for c in q),
            key_slots("k"),
            key_slots("v"),
        )

    def push(self, q: Chunk) -> Push:
        """Send a finished output home: its owner sees us as many steps back."""
        return Push(q, self.slot("o", self.mesh.minus(self.mesh.step(q.src)[0]), 0, q.part))

    # ------------------------------------------------------------------ the whole

    def schedule(self, kind: str, attend: Sequence[Instruction], staged: bool = False) -> AttentionSchedule:
        """The schedule with a given attend phase."""
        moving = self.others if self.split_heads else range(0)
        home, minus = self.mesh.offset, self.mesh.minus
        phases: dict[str, tuple[Instruction, ...]] = {
            # The group that needs our chunk first is the one right before us, and so on backwards.
            PUTS["q"]: tuple(
                Put("q", p, home(minus(a), 0), self.slot("q", a, 0, p)) for a in moving for p in self.q_parts
            ),
            PUTS["k"]: self._put_kv("k"),
            PUTS["v"]: self._put_kv("v"),
            ATTEND: tuple(attend),
            COLLECT: tuple(Wait(self.slot("o", a, 0, p), home(a, 0)) for a in moving for p in self.q_parts),
        }
        arrivals = []
        for (tensor, a, h, p), slot in self._slots.items():
            if tensor == "o":
                arrivals.append(Arrival(slot, home(a, 0), "o", Chunk(0, p)))
            else:
                sender = home(a, 0) if h == 0 else home(0, -1)
                arrivals.append(Arrival(slot, sender, tensor, Chunk(home(a, -h), p)))
        return AttentionSchedule(
            kind, self.site, self.mesh, lay_out(self._slot_bytes()), RankProgram(0, phases, tuple(arrivals)),
            split_heads=self.split_heads, q_parts=len(self.q_parts), kv_parts=len(self.kv_parts), staged=staged,
        )  # fmt: skip

    def _put_kv(self, tensor: str) -> tuple[Put, ...]:
        puts = []
        if self.ring > 1:  # the first hop of this rank's own chunk
            puts += [Put(tensor, p, self.mesh.offset(0, 1), self.slot(tensor, 0, 1, p)) for p in self.kv_parts]
        for a in self.others:
            back = self.mesh.minus(a)
            puts += [Put(tensor, p, self.mesh.offset(back, 0), self.slot(tensor, a, 0, p)) for p in self.kv_parts]
        return tuple(puts)

    def _slot_bytes(self) -> list[tuple[str, int]]:
        """The most that any rank may need: its largest head slice times the largest part."""
        site = self.site
        slices = [slice_of(site.heads, self.groups, u) for u in range(self.groups)]
        if not self.split_heads:
            slices = [(0, site.heads)]
        heads = max(last - first for first, last in slices)
        kv_heads = max(last - first for first, last in (kv_slice(site, heads) for heads in slices))
        queries, keys = self._largest(True, len(self.q_parts)), self._largest(False, len(self.kv_parts))
        sizes = {
            "q": (heads, queries, site.head_dim),
            "k": (kv_heads, keys, site.head_dim),
            "v": (kv_heads, keys, site.v_head_dim),
            "o": (heads, queries, site.v_head_dim),
        }
        entries = []
        for tensor, a, h, p in self._slots:
            name = f"{tensor}({a})" if tensor in ("q", "o") else f"{tensor}({a},{h})"
            some_heads, rows, width = sizes[tensor]
            size = travel_bytes(site.written(tensor), site.batch * some_heads * rows, width, site.dtype)
            entries.append((f"{name}{f'.{p}' if p else ''}", size))
        return entries

    def _largest(self, queries: bool, parts: int) -> int:
        """Tokens of the largest part of any rank."""
        spans = (self.site.rows(queries, rank, parts, p) for rank in range(self.mesh.num_ranks) for p in range(parts))
        return max(stop - start for start, stop in spans)
