"""Runs one rank's instructions of one site, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from sfcompile.runtime.attention_aten import Partial, attend, merge
from sfcompile.runtime.instructions import Attend, Forward, Heads, Push, Put, RankProgram, Wait
from sfcompile.runtime.transport import Transport


class SlotPlace(Protocol):
    """Where a slot lies in a bank."""

    @property
    def offset(self) -> int:
        """Bytes from the start of the bank."""


class SchedulePlan(Protocol):
    """What the executor reads of a schedule (codegen hands it in)."""

    @property
    def site(self) -> Any:
        """What the site asks for (codegen/sites.py)."""

    @property
    def slots(self) -> Sequence[SlotPlace]:
        """Every slot of a bank."""

    @property
    def heap_bytes(self) -> int:
        """Bytes of one bank."""

    def program(self, rank: int) -> RankProgram:
        """One rank's instructions."""


class BankView(Protocol):
    """This rank's own heap segment."""

    def chunk(self, bank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A view of a chunk."""


class SiteRun:
    """One call of one site: its epoch, the local tensors, what was accumulated so far.

    Attributes:
        blocked_s: seconds spent waiting for peers.
    """

    def __init__(
        self, plan: SchedulePlan, rank: int, epoch: int, bank: int, heap: BankView, transport: Transport
    ) -> None:
        self.plan = plan
        self.epoch = epoch
        self.blocked_s = 0.0
        self._rank = rank
        self._transport = transport
        self._program = plan.program(rank)
        self._tensors: dict[str, torch.Tensor] = {}
        self._partials: dict[int, Partial | None] = {}
        self._views = {
            arrival.slot: heap.chunk(bank, plan.slots[arrival.slot].offset, arrival.shape, plan.site.dtype)
            for arrival in self._program.arrivals
        }
        self._expanded: dict[tuple[str, int], torch.Tensor] = {}
        transport.open(epoch, [(arrival, self._views[arrival.slot]) for arrival in self._program.arrivals])

    # ------------------------------------------------------------------ phases

    def put(self, phase: str, tensor: torch.Tensor) -> None:
        """A phase that sends a local tensor: ``put_q``, ``put_k``, ``put_v``, ``gather_start``.

        The part that stays here is copied too: once this call has returned, a compiled graph may reuse the tensor's
        memory for something else, although it is read again later.
        """
        name = phase.removeprefix("put_") if phase.startswith("put_") else "x"
        for step in self._program.phases[phase]:
            assert isinstance(step, Put) and step.tensor == name
            chunk = tensor if step.heads is None else tensor[:, step.heads[0] : step.heads[1]]
            self._transport.put(step.dst, step.slot, self.plan.slots[step.slot].offset, chunk, self.epoch)
        stays = tensor
        if name != "x":
            first, last = self._own_heads if name == "q" else self._own_kv_heads
            stays = tensor[:, first:last]
        self._tensors[name] = stays.clone(memory_format=torch.contiguous_format)

    def attend(self, mask: torch.Tensor | None) -> None:
        """Run the attend phase: waits, ring hops, (Q, KV) pairs in their fixed order, outputs pushed home."""
        for step in self._program.phases["attend"]:
            if isinstance(step, Wait):
                self._wait(step)
            elif isinstance(step, Forward):
                offset = self.plan.slots[step.slot].offset
                self._transport.put(step.dst, step.slot, offset, self._views[step.slot], self.epoch, stays=True)
            elif isinstance(step, Attend):
                self._pair(step, mask)
            elif isinstance(step, Push):
                out = self._output(step.q_src)
                offset = self.plan.slots[step.slot].offset
                self._transport.put(step.q_src, step.slot, offset, out, self.epoch, stays=True)

    def collect(self, out: torch.Tensor) -> None:
        """Fill ``out`` [B, H, Lq, E] with this rank's queries' outputs, from every head slice."""
        start, stop = self._program.heads[self._rank]
        out[:, start:stop].copy_(self._output(self._rank))
        for step in self._program.phases["collect"]:
            assert isinstance(step, Wait)
            self._wait(step)
            first, last = self._program.heads[step.src]
            out[:, first:last].copy_(self._views[step.slot])

    def gather(self, out: torch.Tensor) -> None:
        """Fill ``out`` (the global shape) with every rank's shard at its positions."""
        site = self.plan.site
        self._place(out, self._tensors["x"], site.owners[self._rank])
        for step in self._program.phases["gather_finish"]:
            assert isinstance(step, Wait)
            self._wait(step)
            self._place(out, self._views[step.slot], site.owners[step.src])

    # ------------------------------------------------------------------ steps

    def _wait(self, step: Wait) -> None:
        start = time.perf_counter()
        self._transport.wait(step.src, step.slot, self.epoch)
        self.blocked_s += time.perf_counter() - start

    def _place(self, out: torch.Tensor, shard: torch.Tensor, runs: Sequence[tuple[int, int]]) -> None:
        site = self.plan.site
        before, after = site.shape[: site.dim], site.shape[site.dim + 1 :]
        tokens = site.shape[site.dim] // (site.outer * site.inner)
        mine = sum(length for _, length in runs)
        target = out.view(*before, site.outer, tokens, site.inner, *after)
        source = shard.reshape(*before, site.outer, mine, site.inner, *after)
        at = 0
        for first, length in runs:
            target.narrow(site.dim + 1, first, length).copy_(source.narrow(site.dim + 1, at, length))
            at += length

    def _pair(self, step: Attend, mask: torch.Tensor | None) -> None:
        site = self.plan.site
        heads = self._own_heads
        q = self._tensors["q"] if step.q_slot is None else self._views[step.q_slot]
        k, v = self._keys("k", step.k_slot), self._keys("v", step.v_slot)
        rows, columns = site.q_positions[step.q_src], site.kv_positions[step.kv_src]
        bias = None
        if mask is not None:
            bias = _cut_mask(mask, heads, rows, columns)
        if site.causal:
            if _first(columns) > _last(rows):
                return
            if _last(columns) > _first(rows):
                allowed = _positions(columns)[None, :] <= _positions(rows)[:, None]
                bias = allowed[None, None]
        done = attend(q, k, v, bias, site.scale)
        before = self._partials.get(step.q_src)
        self._partials[step.q_src] = merge(before, done)

    @property
    def _own_heads(self) -> Heads:
        return self._program.heads[self._rank]

    @property
    def _own_kv_heads(self) -> Heads:
        group = self.plan.site.heads // self.plan.site.kv_heads
        first, last = self._own_heads
        return first // group, (last - 1) // group + 1

    def _keys(self, name: str, slot: int | None) -> torch.Tensor:
        """A K or V chunk with one head per query head (grouped heads are repeated once per call)."""
        chunk = self._tensors[name] if slot is None else self._views[slot]
        group = self.plan.site.heads // self.plan.site.kv_heads
        if group == 1:
            return chunk
        key = (name, -1 if slot is None else slot)
        if key not in self._expanded:
            first = self._own_kv_heads[0]
            index = torch.tensor([head // group - first for head in range(*self._own_heads)], device=chunk.device)
            self._expanded[key] = chunk.index_select(1, index)
        return self._expanded[key]

    def _output(self, q_src: int) -> torch.Tensor:
        """The finished output of some rank's queries, in the site's dtype; zeros where no key was allowed."""
        partial = self._partials.get(q_src)
        site = self.plan.site
        if partial is None:
            start, stop = self._program.heads[self._rank]
            rows = sum(length for _, length in site.q_positions[q_src])
            return torch.zeros(site.batch, stop - start, rows, site.v_head_dim, dtype=site.dtype)
        return partial[0].to(site.dtype)


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
