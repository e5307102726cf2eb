"""What one rank's kernels read to follow its schedule: the rank's program as tables of int64.

A kernel's text is the same for all ranks and for all schedules of one kind of work; the tables say which chunk lies
where, who waits for what and where outputs go. They come from the rank's instructions alone: a wait that the schedule
lacks is a wait that the kernel does not do. Chunks without bytes (a rank without tokens) are neither sent nor awaited.

A bank holds more than the schedule's slots, at the same offsets on every rank:

    [ slots of the schedule | own q | own k | own v | staging of what leaves by NVSHMEM ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.runtime.program.formats import form
from sfcompile.runtime.program.instructions import Attend, Chunk, Forward, Push, Put, Wait
from sfcompile.runtime.program.intervals import Runs, count
from sfcompile.runtime.program.sites import align, nbytes

Table = NDArray[np.int64]

UNIT = ("query", "first_key", "last_key", "fresh", "done", "span_at")
QUERY = (
    "slot", "at", "rows", "pitch", "position", "first_tile", "dst", "out_at", "out_slot", "net", "staging", "nbytes",
    "came",
)  # fmt: skip
KEY = ("k_slot", "v_slot", "k_at", "v_at", "rows", "pitch", "position", "came")
SPAN = ("seen", "partial")
FORWARD = ("slot", "at", "dst", "to_slot", "to_at", "nbytes", "net")
PUT = ("dst", "slot", "at", "first_head", "heads", "first_row", "rows", "net", "staging", "nbytes")
COLLECT = ("slot", "at", "first_head", "heads", "first_row", "rows")
"""Columns of the tables. A slot of -1: nothing to wait for; a ``dst`` of -1: this rank. ``*_at`` and ``staging`` are
byte offsets in a bank, ``pitch`` rows from one head to the next, ``position`` places in the list of positions; what
``came`` (1, else 0) lies in a slot as it travelled. ``span_at`` is a unit's first row among the spans."""

BANK_ALIGN = 128
"""Everything in a bank and in a buffer of chunks lies at a multiple of so many bytes."""


@dataclass(frozen=True)
class KernelTables:
    """One rank's tables.

    Attributes:
        units: a query chunk x a run of key chunks, in the order of the schedule; ``fresh`` starts a query's softmax,
            ``done`` sends its output.
        queries, keys, forwards: chunks and ring hops.
        puts: what the put phases copy, by tensor; the last row of each is the part that stays here.
        collects: outputs that come home.
        q_positions, k_positions: global positions of the tokens of ``queries`` and ``keys``.
        spans: int32, of a causal site, if asked for: for each unit, tile of its queries and chunk of its
            keys, how many keys are ``seen`` in blocks that some query sees a key of (whole blocks, the first ones), and
            from how many of these left on (``partial``) some query does not see a whole block.
        tiles: tiles of block_m queries of all query chunks and heads.
        carry: whether some query is attended in several units.
        own_at: where the rank's own q, k and v lie.
        bank_bytes: bytes of the bank, the same on every rank.
    """

    units: Table
    queries: Table
    keys: Table
    forwards: Table
    puts: dict[str, Table]
    collects: Table
    q_positions: NDArray[np.int32]
    k_positions: NDArray[np.int32]
    spans: NDArray[np.int32]
    tiles: int
    carry: bool
    own_at: dict[str, int]
    bank_bytes: int


Keys = tuple[Chunk, int | None, int | None]
"""``(chunk, K slot, V slot)``; None is this rank's own."""


@dataclass
class _Pass:
    """Consecutive calls of Attend with the same queries, run as one."""

    queries: tuple[tuple[Chunk, int | None], ...]
    keys: list[Keys] = field(default_factory=list)


def make_tables(
    schedule: AttentionSchedule,
    rank: int,
    block_m: int,
    machine_of: Sequence[int] | None = None,
    merge: bool = True,
    span_keys: int = 0,
) -> KernelTables:
    """Tables of a rank of the mesh.

    Args:
        span_keys: keys of a block, for a kernel that reads spans; 0: none does.
        machine_of: machine of each rank of the mesh; None: all on one.
        merge: attend ring hops of one machine in one pass, so that the softmax state stays on chip between them. What
            comes from other machines starts a pass of its own: by then all that is here should be done.
    """
    machines = machine_of or (0,) * schedule.mesh.num_ranks
    return _Maker(schedule, rank, block_m, machines, span_keys if schedule.site.causal else 0).make(merge)


class _Maker:
    def __init__(
        self, schedule: AttentionSchedule, rank: int, block_m: int, machine_of: Sequence[int], span_keys: int
    ) -> None:
        self.schedule, self.rank, self.block_m, self.machine_of = schedule, rank, block_m, machine_of
        self.span_keys = span_keys
        self.site = schedule.site
        self.program = schedule.program(rank)
        self.waited: set[int] = set()
        self.end = align(schedule.heap_bytes, BANK_ALIGN)
        self.own_at = {name: self._reserve(size) for name, size in self._own_bytes().items()}
        self.arrivals = {arrival.slot: arrival for arrival in self.program.arrivals}

    def make(self, merge: bool) -> KernelTables:
        passes: list[_Pass] = []
        forwards: list[list[int]] = []
        pushes: dict[Chunk, tuple[int, int]] = {}  # chunk -> (slot, passes before the push)
        apart = True
        for step in self.program.phases["attend"]:
            match step:
                case Wait(slot, src):
                    self.waited.add(slot)
                    apart |= self._net(src)
                case Forward():
                    if self._arrival_bytes(step.slot):
                        forwards.append(self._forward(step))
                case Push(chunk, slot):
                    pushes[chunk] = (slot, len(passes))
                    apart = True
                case Attend(q, kv, q_slots, k_slots, v_slots):
                    queries = tuple(zip(q, q_slots, strict=True))
                    if apart or not merge or passes[-1].queries != queries:
                        passes.append(_Pass(queries))
                    # A slot that was never waited for is read without a wait: the checker refuses such a schedule.
                    passes[-1].keys += zip(kv, k_slots, v_slots, strict=True)
                    apart = False
        return self._tables(passes, forwards, pushes)

    def _tables(
        self, passes: list[_Pass], forwards: list[list[int]], pushes: dict[Chunk, tuple[int, int]]
    ) -> KernelTables:
        chunks = list(dict.fromkeys(query for entry in passes for query in entry.queries))
        rows_of = {name: i for i, (name, _) in enumerate(chunks)}
        queries: list[list[int]] = []
        tile = position = 0
        for chunk, slot in chunks:
            queries.append(self._query(chunk, slot, position, tile, pushes.get(chunk)))
            position += queries[-1][QUERY.index("rows")]
            tile += self._tiles(queries[-1][QUERY.index("rows")])
        units, keys, key_chunks = self._units(passes, rows_of, pushes)
        spans = self._spans(units, [chunk for chunk, _ in chunks], key_chunks)
        per_query = np.bincount([unit[0] for unit in units], minlength=1)
        return KernelTables(
            units=table_of(units, UNIT),
            queries=table_of(queries, QUERY),
            keys=table_of(keys, KEY),
            forwards=table_of(forwards, FORWARD),
            puts={name: table_of(self._puts(name), PUT) for name in ("q", "k", "v")},
            collects=table_of(self._collects(), COLLECT),
            q_positions=_positions(self.schedule.positions("q", chunk) for chunk, _ in chunks),
            k_positions=_positions(self.schedule.positions("k", chunk) for chunk in key_chunks),
            spans=spans,
            tiles=tile,
            carry=bool((per_query > 1).any()),
            own_at=self.own_at,
            bank_bytes=self.end,
        )

    def _units(
        self, passes: list[_Pass], rows_of: dict[Chunk, int], pushes: dict[Chunk, tuple[int, int]]
    ) -> tuple[list[list[int]], list[list[int]], list[Chunk]]:
        """Rows of the unit table and of the key table, and the chunk of each row of the latter."""
        keys: list[list[int]] = []
        key_chunks: list[Chunk] = []
        spans: dict[tuple[Keys, ...], tuple[int, int]] = {}
        visits: list[tuple[Chunk, int, tuple[int, int]]] = []
        seen: set[Chunk] = set()
        position = 0
        for number, entry in enumerate(passes):
            for chunk, _ in entry.queries:
                wanted = tuple(key for key in entry.keys if self._attends(chunk, key[0]))
                if not wanted and chunk in seen:
                    continue
                if wanted not in spans:
                    spans[wanted] = (len(keys), len(keys) + len(wanted))
                    for key in wanted:
                        keys.append(self._key(*key, position))
                        key_chunks.append(key[0])
                        position += keys[-1][KEY.index("rows")]
                seen.add(chunk)
                visits.append((chunk, number, spans[wanted]))
        first = {chunk: i for i, (chunk, _, _) in reversed(list(enumerate(visits)))}
        last = {
            chunk: i for i, (chunk, number, _) in enumerate(visits) if number < pushes.get(chunk, (0, len(passes)))[1]
        }
        units = []
        for i, (chunk, _, span) in enumerate(visits):
            leaves = chunk in pushes or chunk.src == self.rank
            units.append([rows_of[chunk], *span, int(first[chunk] == i), int(leaves and last.get(chunk) == i), 0])
        return units, keys, key_chunks

    def _spans(self, units: list[list[int]], query_chunks: list[Chunk], key_chunks: list[Chunk]) -> NDArray[np.int32]:
        """Spans of all units, whose ``span_at`` is set."""
        parts: list[NDArray[np.int32]] = []
        end = 0
        for unit in units if self.span_keys else ():
            (first, last), rows = unit[1:3], self.schedule.positions("q", query_chunks[unit[0]])
            if first == last or not rows:
                continue
            queries = _positions([rows])
            each = [
                spans_of(queries, _positions([self.schedule.positions("k", chunk)]), self.block_m, self.span_keys)
                for chunk in key_chunks[first:last]
            ]
            unit[UNIT.index("span_at")] = end
            parts.append(np.stack(each, 1).reshape(-1, len(SPAN)))
            end += len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros((1, len(SPAN)), np.int32)

    # ------------------------------------------------------------------ rows

    def _query(
        self, chunk: Chunk, slot: int | None, position: int, tile: int, push: tuple[int, int] | None
    ) -> list[int]:
        start, stop = self.schedule.rows("q", chunk)
        at, pitch = self._place("q", chunk, slot)
        row = {"slot": self._wait(slot), "at": at, "rows": stop - start, "pitch": pitch, "position": position}
        row |= {"first_tile": tile, "dst": -1, "out_at": start, "out_slot": -1, "net": 0, "staging": 0, "nbytes": 0}
        row |= {"came": int(slot is not None)}
        staging = 0 if push is None else self._stage(push[0])  # on every rank, so also for what has no rows here
        if push is not None and stop > start:
            heads = int(self.schedule.head_counts("q")[self.rank])
            row |= {
                "dst": chunk.src,
                "out_at": self.schedule.slots[push[0]].offset,
                "out_slot": push[0],
                "net": int(self._net(chunk.src)),
                "staging": staging,
                "nbytes": self._travel_bytes("o", (self.site.batch, heads, stop - start, self.site.v_head_dim)),
            }
        return [row[name] for name in QUERY]

    def _key(self, chunk: Chunk, k_slot: int | None, v_slot: int | None, position: int) -> list[int]:
        start, stop = self.schedule.rows("k", chunk)
        k_at, pitch = self._place("k", chunk, k_slot)
        v_at, _ = self._place("v", chunk, v_slot)
        came = int(k_slot is not None)
        return [self._wait(k_slot), self._wait(v_slot), k_at, v_at, stop - start, pitch, position, came]

    def _forward(self, step: Forward) -> list[int]:
        slots = self.schedule.slots
        size = self._arrival_bytes(step.slot)
        place = [slots[step.slot].offset, step.dst, step.to_slot, slots[step.to_slot].offset]
        return [self._wait(step.slot), *place, size, int(self._net(step.dst))]

    def _puts(self, tensor: str) -> list[list[int]]:
        heads_of = self.schedule.heads if tensor == "q" else self.schedule.kv_heads
        places = self.site.q_positions if tensor == "q" else self.site.kv_positions
        width = self.site.v_head_dim if tensor == "v" else self.site.head_dim

        def entry(dst: int, slot: int, at: int, part: tuple[int, int], span: tuple[int, int]) -> list[int]:
            heads, rows = part[1] - part[0], span[1] - span[0]
            shape = self.site.batch, heads, rows, width
            size = self._travel_bytes(tensor, shape) if dst >= 0 else nbytes(shape, self.site.dtype)
            net = dst >= 0 and self._net(dst)
            staging = self._stage(slot) if dst >= 0 else 0
            return [dst, slot, at, part[0], heads, span[0], rows, int(net), staging, size]

        rows = []
        for step in self.program.phases[f"put_{tensor}"]:
            assert isinstance(step, Put)
            span = self.schedule.rows(tensor, Chunk(self.rank, step.part))
            row = entry(step.dst, step.slot, self.schedule.slots[step.slot].offset, heads_of(step.dst), span)
            rows += [row] if row[-1] else []
        rows.append(entry(-1, -1, self.own_at[tensor], heads_of(self.rank), (0, count(places[self.rank]))))
        return rows

    def _collects(self) -> list[list[int]]:
        rows = []
        for step in self.program.phases["collect"]:
            assert isinstance(step, Wait)
            first, last = self.schedule.heads(step.src)
            start, stop = self.schedule.rows("o", self.arrivals[step.slot].chunk)
            if stop > start:  # nobody sends an output without rows
                place = self.schedule.slots[step.slot].offset
                rows.append([step.slot, place, first, last - first, start, stop - start])
        return rows

    # ------------------------------------------------------------------ parts of rows

    def _place(self, tensor: str, chunk: Chunk, slot: int | None) -> tuple[int, int]:
        """Bytes from the bank's start, and rows from one head to the next."""
        start, stop = self.schedule.rows(tensor, chunk)
        if slot is not None:
            return self.schedule.slots[slot].offset, stop - start
        places = self.site.q_positions if tensor == "q" else self.site.kv_positions
        width = self.site.v_head_dim if tensor == "v" else self.site.head_dim
        return self.own_at[tensor] + start * width * self.site.dtype.itemsize, count(places[self.rank])

    def _wait(self, slot: int | None) -> int:
        return slot if slot is not None and slot in self.waited and self._arrival_bytes(slot) else -1

    def _arrival_bytes(self, slot: int) -> int:
        return nbytes(*self.schedule.form(self.rank, self.arrivals[slot]))

    def _travel_bytes(self, tensor: str, shape: tuple[int, ...]) -> int:
        return nbytes(*form(self.site.written(tensor), shape, self.site.dtype))

    def _attends(self, queries: Chunk, keys: Chunk) -> bool:
        """Whether some key may be seen: it exists, and no causal mask hides all of them."""
        columns = self.schedule.positions("k", keys)
        if not columns or not self.site.causal:
            return bool(columns)
        rows = self.schedule.positions("q", queries)
        return bool(rows) and min(run[0] for run in columns) < max(first + length for first, length in rows)

    def _tiles(self, rows: int) -> int:
        return -(-rows // self.block_m) * self.site.batch * int(self.schedule.head_counts("q")[self.rank])

    def _net(self, dst: int) -> bool:
        return self.machine_of[dst] != self.machine_of[self.rank]

    def _stage(self, slot: int) -> int:
        """Room for what leaves by NVSHMEM; reserved for every put if there are several machines, so that all agree."""
        return self._reserve(self.schedule.slots[slot].nbytes) if len(set(self.machine_of)) > 1 else 0

    def _reserve(self, size: int) -> int:
        at = self.end
        self.end += align(size, BANK_ALIGN)
        return at

    def _own_bytes(self) -> dict[str, int]:
        """The most that any rank may need."""
        sizes = {}
        for name in ("q", "k", "v"):
            heads = int(self.schedule.head_counts(name).max())
            rows = max(count(owned) for owned in (self.site.q_positions if name == "q" else self.site.kv_positions))
            width = self.site.v_head_dim if name == "v" else self.site.head_dim
            sizes[name] = nbytes((self.site.batch, heads, rows, width), self.site.dtype)
        return sizes


def spans_of(queries: NDArray[np.int32], keys: NDArray[np.int32], block_m: int, block_n: int) -> NDArray[np.int32]:
    """Of each tile of ``block_m`` queries at some positions: the pair SPAN for a chunk of keys at others.

    Positions may be in any order: what counts is the last key that some query of a tile sees, and the first that some
    query of it does not.
    """
    starts = np.arange(0, len(queries), block_m)
    latest, earliest = np.maximum.reduceat(queries, starts), np.minimum.reduceat(queries, starts)
    from_here_on = np.minimum.accumulate(keys[::-1])[::-1]  # the earliest key from a column on
    up_to_here = np.maximum.accumulate(keys)
    last = np.searchsorted(from_here_on, latest, "right")
    clear = np.searchsorted(up_to_here, earliest, "right")
    seen = np.minimum(-(-last // block_n) * block_n, len(keys))
    partial = np.where(clear < seen, seen - clear // block_n * block_n, 0)
    return np.stack([seen, partial], 1).astype(np.int32)


def _positions(chunks: object) -> NDArray[np.int32]:
    runs: list[Runs] = list(chunks)  # type: ignore[call-overload]
    parts = [np.arange(first, first + length, dtype=np.int32) for run in runs for first, length in run]
    return np.concatenate(parts) if parts else np.zeros(1, np.int32)


def table_of(rows: list[list[int]], columns: tuple[str, ...]) -> Table:
    """Rows as an array, also if there are none."""
    return np.array(rows, dtype=np.int64).reshape(-1, len(columns))
