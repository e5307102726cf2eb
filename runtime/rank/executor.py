"""Runs one rank's instructions of one site, phase by phase."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Sequence
from itertools import compress
from typing import Any, TypeVar

import torch

from sfcompile.runtime.program.chunks import cut_chunk, place_chunk
from sfcompile.runtime.program.formats import SAME, decode, encode
from sfcompile.runtime.program.instructions import Attend, Chunk, Forward, Heads, Push, Wait
from sfcompile.runtime.program.phases import ATTEND, COLLECT, EXCHANGE_FINISH, TENSORS
from sfcompile.runtime.rank.attention_aten import attend
from sfcompile.runtime.rank.engine import Engine, KernelAccess
from sfcompile.runtime.rank.partials import Partials
from sfcompile.runtime.rank.site_call import AttentionSiteSchedule, OwnHeap, SiteCall, is_attention
from sfcompile.runtime.rank.site_tables import Cut, Send, SiteTables, cut_out
from sfcompile.runtime.wires.symmetric_heap import bank_of
from sfcompile.runtime.wires.transport import Source, Transport

T = TypeVar("T")


class SiteRun:
    """One call of one site: its epoch, the local tensors, what was accumulated so far.

    Args:
        transport: to the ranks of the schedule, numbered as there.
        kernel: runs the attend phase, and what it sees of the heaps; None: instruction by instruction, here.
        tables: of the schedule in this heap, if its calls share them.

    Attributes:
        blocked_s: seconds spent waiting for peers (waits inside a kernel are not told apart); ``waited_s`` by rank of
            the job.
        output: None: what :meth:`collect` fills has no part yet.
        late_reads: none: a put has read, or copied, its tensor when it returns.
    """

    def __init__(
        self,
        call: SiteCall,
        heap: OwnHeap,
        transport: Transport,
        kernel: tuple[Engine, KernelAccess] | None = None,
        tables: SiteTables | None = None,
    ) -> None:
        schedule, epoch = call.schedule, call.epoch
        tables = tables or SiteTables(schedule, call.job_rank, heap)
        self.schedule = schedule
        self.epoch = epoch
        self.blocked_s = 0.0
        self.waited_s: dict[int, float] = {}
        self.output: torch.Tensor | None = None
        self.late_reads: Collection[int] = ()
        self._rank, self._members = tables.rank, tables.members
        self._transport = transport
        self._tables = tables
        self._phases = tables.program.phases
        self._tensors: dict[tuple[str, int], torch.Tensor] = {}
        self._parts_left = schedule.parts
        self._partials = Partials()
        self._arrivals = tables.arrivals
        self._kernel = kernel
        self._lasting = call.lasting
        self._bank, self._heap = bank_of(epoch), heap
        self._views, arrivals = tables.bank(self._bank)
        self._own: torch.Tensor | None = None
        self._joined: dict[tuple[str, tuple[int | None, ...], tuple[Chunk, ...]], torch.Tensor] = {}
        self._decoded: dict[int, torch.Tensor] = {}
        self._most: dict[tuple[Chunk, ...], torch.Tensor] = {}
        transport.open(epoch, arrivals, call.tag)

    @property
    def _attention(self) -> AttentionSiteSchedule:
        assert is_attention(self.schedule), "the graph attends and collects only at attentions"
        return self.schedule

    # ------------------------------------------------------------------ phases

    def put(self, phase: str, tensor: torch.Tensor, part: int = -1) -> None:
        """A phase that sends a local tensor: ``put_q``, ``put_k``, ``put_v``, ``exchange_start``.

        Args:
            part: which part of the local tokens ``tensor`` holds; -1: all of them.

        The part that stays here is copied too: once this call has returned, a compiled graph may reuse the tensor's
        memory for something else, although it is read again later. Not so with a lasting one: a graph's input that
        nobody writes to before the call has ended, so nothing of it is copied here. Of a weight that comes
        together in the bank the own rows are copied there: only this rank reads its bank, and it has ended the epoch
        that had the bank before it opened this one.
        """
        lasting = bool(self._lasting) and tensor.data_ptr() in self._lasting
        name = TENSORS.get(phase, "x")
        written = self.schedule.site.written(name)
        encoded: dict[Cut, torch.Tensor] = {}  # several ranks may be sent the same
        for send in self._tables.sends(phase, part):
            dst, slot, offset, cut = send
            if written == SAME:
                chunk, source = self._outgoing(name, tensor, send), Source.CALL if lasting else Source.REUSED
            else:
                if cut not in encoded:
                    encoded[cut] = encode(self._outgoing(name, tensor, send), written)
                chunk, source = encoded[cut], Source.KEPT
            if self._kernel is None or chunk.numel():  # no kernel waits for what has no rows
                self._transport.put(dst, slot, offset, chunk, self.epoch, source)
        if self.schedule.assembled:
            self._tables.own_rows(self._bank, max(part, 0)).copy_(tensor)
            return
        if name != "x":
            stays = cut_out(tensor, self._tables.stays(name))
        else:
            stays = cut_chunk(self.schedule.site, tensor, self._rank, self._rank)
        if self._kernel is None:
            self._tensors[name, part] = stays if lasting else stays.clone(memory_format=torch.contiguous_format)
        else:
            self._heap.chunk(self._bank, self._kernel[0].own_at[name], stays.shape, stays.dtype).copy_(stays)
            self._tensors[name, part] = stays[:0]

    def put_fused(self, phase: str, sources: Sequence[torch.Tensor], rows: Any) -> None:
        """:meth:`put` of what a row program makes of its sources: made before, no kernel does it here."""
        self.put(phase, rows.compute(*sources))

    def attend(self, mask: torch.Tensor | None) -> None:
        """Run the attend phase: waits, ring hops, (Q, KV) pairs in their fixed order, outputs pushed home."""
        if self._kernel is not None:
            self._run_kernel(*self._kernel, mask)
            return
        for step in self._phases[ATTEND]:
            if isinstance(step, Wait):
                self._wait(step)
            elif isinstance(step, Forward):
                self._forward(step)
            elif isinstance(step, Attend):
                self._attend(step, mask)
            elif isinstance(step, Push):
                out = self._output_leaving(step.q)
                offset = self.schedule.place(step.q.src, step.slot)
                self._transport.put(step.q.src, step.slot, offset, out, self.epoch, Source.KEPT)
        # Nothing but outputs is read from here on, and with parts the site stays open under the next layer.
        self._joined.clear()
        self._decoded.clear()
        self._most.clear()
        self._tensors.clear()

    def _run_kernel(self, engine: Engine, access: KernelAccess, mask: torch.Tensor | None) -> None:
        site = self.schedule.site
        rows = sum(length for _, length in site.q_positions[self._rank])
        self._own = torch.zeros(site.batch, site.heads, rows, site.v_head_dim, dtype=site.dtype)
        access.await_banks(engine.sends, self.epoch)
        engine.run(self._own, access, self.epoch, mask)
        for slot, arrival in self._arrivals.items():
            # The kernel waits for what some query here sees: the rest may be late, and this bank's next epoch too early
            # for it; and of all it looks at the epoch only.
            if arrival.tensor != "o" and self._views[slot].numel():
                self._wait(Wait(slot, arrival.src))
        access.wake(engine.sends, self.epoch)

    def collect(self, out: torch.Tensor, part: int = -1) -> bool:
        """Fill ``out`` [B, H, Lq, E] with this rank's queries' outputs, from every head slice.

        Args:
            part: which part of the local tokens ``out`` is for; -1: all of them.

        Returns:
            Whether everything has now been collected.
        """
        first, last = self._attention.heads(self._rank)
        if self._own is not None:
            out[:, first:last].copy_(self._own[:, first:last])
        for chunk in [chunk for chunk in self._partials if chunk.src == self._rank and part in (-1, chunk.part)]:
            _stretch(out, (first, last), self._rows("o", chunk, part)).copy_(self._output(chunk))
        for step in self._phases[COLLECT]:
            assert isinstance(step, Wait)
            chunk = self._arrivals[step.slot].chunk
            if self._kernel is not None and self._views[step.slot].numel() == 0:
                continue  # kernels send nothing that has no rows
            if part in (-1, chunk.part):
                self._wait(step)
                heads = self._attention.heads(step.src)
                _stretch(out, heads, self._rows("o", chunk, part)).copy_(self._arrived(step.slot))
        self._parts_left -= 1
        return part == -1 or self._parts_left == 0

    def receive(self, out: torch.Tensor) -> None:
        """Fill ``out`` with what this rank wants, from every rank's shard, at its positions."""
        if self.schedule.assembled:
            out.copy_(self._assemble(0))
            return
        place_chunk(self.schedule.site, out, self._tensors["x", -1], self._rank, self._rank)
        for step in self._phases[EXCHANGE_FINISH]:
            assert isinstance(step, Wait)
            self._wait(step)
            place_chunk(self.schedule.site, out, self._views[step.slot], step.src, self._rank)

    def read(self, part: int, reader: Callable[[torch.Tensor], T]) -> tuple[T, bool]:
        """What a reader makes of a weight where it came together in the bank, and whether all have now been read.

        Who writes to this bank next, waits until this rank is done with the epoch: after it has read all parts.
        """
        value = reader(self._assemble(max(part, 0)))
        self._parts_left -= 1
        return value, part == -1 or self._parts_left == 0

    def finish(self, epoch: int) -> None:
        """This rank has read everything of ``epoch`` and of all epochs before."""
        self._transport.finish(epoch)

    # ------------------------------------------------------------------ steps

    def _assemble(self, part: int) -> torch.Tensor:
        """All of a weight, once it has come: a rank of this machine waits for what it is given on from here."""
        for step in self._phases[EXCHANGE_FINISH]:
            assert isinstance(step, (Wait, Forward))
            if self._arrivals[step.slot].chunk.part != part:
                continue
            if isinstance(step, Forward):
                self._forward(step)
            else:
                self._wait(step)
        return self._tables.whole(self._bank, part)

    def _forward(self, step: Forward) -> None:
        offset = self.schedule.place(step.dst, step.to_slot)
        self._transport.put(step.dst, step.to_slot, offset, self._views[step.slot], self.epoch, Source.BANK)

    def _wait(self, step: Wait) -> None:
        start = time.perf_counter()
        self._transport.wait(step.src, step.slot, self.epoch)
        waited = time.perf_counter() - start
        self.blocked_s += waited
        src = self._members[step.src]
        self.waited_s[src] = self.waited_s.get(src, 0.0) + waited

    def _rows(self, name: str, chunk: Chunk, part: int) -> tuple[int, int]:
        """Where a chunk's tokens lie in a tensor that holds one part of them, or all."""
        start, stop = self._attention.rows(name, chunk)
        return (start, stop) if part == -1 else (0, stop - start)

    def _outgoing(self, name: str, tensor: torch.Tensor, send: Send) -> torch.Tensor:
        """What a message takes of a local tensor: heads and tokens, or what the receiver wants of an exchange's."""
        if self.schedule.assembled:
            return tensor.reshape(-1)
        if name == "x":
            return cut_chunk(self.schedule.site, tensor, self._rank, send.dst)
        return cut_out(tensor, send.cut)

    def _attend(self, step: Attend, mask: torch.Tensor | None) -> None:
        self._partials.begin(step.q)
        site, bias, heads = self.schedule.site, None, self._attention.heads(self._rank)
        keys, k_slots, v_slots = step.kv, step.k_slots, step.v_slots
        most: Callable[[], torch.Tensor] | None = None
        if mask is not None or site.causal:
            rows = [run for chunk in step.q for run in self._attention.positions("q", chunk)]
            if site.causal:  # leave out keys that lie after every query
                seen = [_first(self._attention.positions("k", chunk)) <= _last(rows) for chunk in keys]
                keys = tuple(compress(keys, seen))
                k_slots, v_slots = tuple(compress(k_slots, seen)), tuple(compress(v_slots, seen))
            columns = [run for chunk in keys for run in self._attention.positions("k", chunk)]
            if not rows or not columns:
                return
            if mask is not None:
                bias = _cut_mask(mask, heads, rows, columns)
                most = functools.partial(self._most_allowed, step.q, mask, rows)
            if site.causal and _last(columns) > _first(rows):
                bias = (_positions(columns)[None, :] <= _positions(rows)[:, None])[None, None]
        q, k, v = self._join("q", step.q_slots, step.q), self._join("k", k_slots, keys), self._join("v", v_slots, keys)
        partial = attend(q, k, v, None if bias is None else bias.to(q.device), site.scale, most)
        if partial is None:
            return
        lengths = [stop - start for start, stop in (self._attention.rows("q", chunk) for chunk in step.q)]
        self._partials.add(step.q, lengths, partial)

    def _most_allowed(
        self, queries: tuple[Chunk, ...], mask: torch.Tensor, rows: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """The largest entry of the mask for each of some queries, over all keys: found once in a call, in which nobody
        writes to the mask."""
        if queries not in self._most:
            whole = _cut_mask(mask, self._attention.heads(self._rank), rows, [(0, mask.shape[-1])])
            self._most[queries] = whole.amax(dim=-1, keepdim=True)
        return self._most[queries]

    def _join(self, name: str, slots: tuple[int | None, ...], chunks: tuple[Chunk, ...]) -> torch.Tensor:
        """Some chunks of Q, K or V one after the other, with one key head per query head; kept for later calls."""
        key = (name, slots, chunks)
        if key not in self._joined:
            parts = [self._chunk(name, slot, chunk) for slot, chunk in zip(slots, chunks, strict=True)]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
            group = self.schedule.site.heads // self.schedule.site.kv_heads
            if name != "q" and group > 1:
                first = self._attention.kv_heads(self._rank)[0]
                heads = [head // group - first for head in range(*self._attention.heads(self._rank))]
                whole = whole.index_select(1, torch.tensor(heads, device=whole.device))
            self._joined[key] = whole
        return self._joined[key]

    def _chunk(self, name: str, slot: int | None, chunk: Chunk) -> torch.Tensor:
        if slot is not None:
            if slot not in self._decoded:
                self._decoded[slot] = self._arrived(slot)
            return self._decoded[slot]
        if (name, chunk.part) in self._tensors:
            return self._tensors[name, chunk.part]
        start, stop = self._attention.rows(name, chunk)
        return self._tensors[name, -1][:, :, start:stop]

    def _arrived(self, slot: int) -> torch.Tensor:
        """The chunk that has come to a slot, in the site's dtype."""
        arrival, site = self._arrivals[slot], self.schedule.site
        written = site.written(arrival.tensor)
        if written == SAME:
            return self._views[slot]
        return decode(self._views[slot], written, self.schedule.shape(self._rank, arrival), site.dtype)

    def _output(self, chunk: Chunk) -> torch.Tensor:
        """The finished output of some queries, in the site's dtype; zeros where no key was allowed."""
        partial = self._partials[chunk]
        site = self.schedule.site
        if partial is None:
            (first, last), (start, stop) = self._attention.heads(self._rank), self._attention.rows("q", chunk)
            return torch.zeros(site.batch, last - first, stop - start, site.v_head_dim, dtype=site.dtype)
        return partial[0].to(site.dtype)

    def _output_leaving(self, chunk: Chunk) -> torch.Tensor:
        """The same as it goes home: encoded before it is rounded to the site's dtype, so that it is rounded once."""
        written, partial = self.schedule.site.written("o"), self._partials[chunk]
        if written == SAME or partial is None:
            return encode(self._output(chunk), written)
        return encode(partial[0], written)


def _stretch(out: torch.Tensor, heads: Heads, rows: tuple[int, int]) -> torch.Tensor:
    """Some heads and tokens of an output; the output itself if they are all of it."""
    ends = zip((1, 2), (heads, rows), strict=True)
    return cut_out(out, tuple((dim, a, b - a) for dim, (a, b) in ends if b - a != out.shape[dim]))


def _cut_mask(
    mask: torch.Tensor, heads: tuple[int, int], rows: Sequence[tuple[int, int]], columns: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """The part of a whole mask (broadcastable to [B, H, Lq, Lk]) for a head slice and two sets of positions."""
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if mask.shape[1] > 1:
        mask = mask[:, heads[0] : heads[1]]
    for dim, runs in ((2, rows), (3, columns)):
        if mask.shape[dim] > 1:
            parts = [mask.narrow(dim, first, length) for first, length in runs]
            mask = parts[0] if len(parts) == 1 else torch.cat(parts, dim) if parts else mask.narrow(dim, 0, 0)
    return mask


def _positions(runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    if not runs:
        return torch.zeros(0, dtype=torch.int64)
    return torch.cat([torch.arange(first, first + length) for first, length in runs])


def _first(runs: Sequence[tuple[int, int]]) -> int:
    return min((first for first, length in runs if length), default=0)


def _last(runs: Sequence[tuple[int, int]]) -> int:
    return max((first + length - 1 for first, length in runs if length), default=-1)
