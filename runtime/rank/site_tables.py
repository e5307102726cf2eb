"""What every call of a site looks up, worked out once: what its puts cut out and send where, and its views of the heap.

A step of a model calls each of its sites with the same shapes again. All of this follows from the schedule, from which
rank asks, and from where its heap lies; only epochs, tags and tensors differ from call to call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from sfcompile.runtime.program.instructions import Arrival, Chunk, Put
from sfcompile.runtime.program.phases import TENSORS
from sfcompile.runtime.rank.site_call import OwnHeap, SiteSchedule, is_assembled, is_attention
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS

Cut = tuple[tuple[int, int, int], ...]
"""Stretches of a tensor, one of the other: ``(dim, start, length)``. Mostly none: a view takes microseconds."""


class Send(NamedTuple):
    """A put of a part of a local tensor: where it goes and, of an attention's tensor, what is cut out for it."""

    dst: int
    slot: int
    offset: int
    cut: Cut


class Bank(NamedTuple):
    """Where the chunks of an epoch arrive: by slot, and as transports are told of them."""

    views: dict[int, torch.Tensor]
    arrivals: Sequence[tuple[Arrival, torch.Tensor]]


class SiteTables:
    """Of one schedule, on one rank, in one heap.

    Args:
        heap: this rank's own segment. The tables keep views of it: whoever makes another heap drops them.

    Attributes:
        rank: of the schedule; ``members``: the job's ranks of its group.
        arrivals: what comes to this rank, by slot.
    """

    def __init__(self, schedule: SiteSchedule, job_rank: int, heap: OwnHeap) -> None:
        self.schedule = schedule
        self.rank, self.members = schedule.members(job_rank)
        self.program = schedule.program(self.rank)
        self.arrivals = {arrival.slot: arrival for arrival in self.program.arrivals}
        self._heap = heap
        self._banks: list[Bank | None] = [None] * NUM_BANKS
        self._sends: dict[tuple[str, int], tuple[Send, ...]] = {}
        self._stays: dict[str, Cut] = {}

    def bank(self, number: int) -> Bank:
        """Where chunks arrive in a bank."""
        bank = self._banks[number]
        if bank is None:
            schedule, rank, heap = self.schedule, self.rank, self._heap
            views = {
                slot: heap.chunk(number, schedule.place(rank, slot), *schedule.form(rank, arrival))
                for slot, arrival in self.arrivals.items()
            }
            bank = Bank(views, [(arrival, views[slot]) for slot, arrival in self.arrivals.items()])
            self._banks[number] = bank
        return bank

    def own_rows(self, bank: int, part: int) -> torch.Tensor:
        """Where this rank's own rows belong, of a weight that comes together in a bank."""
        schedule = self.schedule
        assert is_assembled(schedule)
        place, shape = schedule.own_place(self.rank, part), schedule.share(self.rank, part)
        return self._heap.chunk(bank, place, shape, schedule.site.dtype)

    def whole(self, bank: int, part: int) -> torch.Tensor:
        """The weight, where it comes together in a bank."""
        assert is_assembled(self.schedule)
        return self._heap.chunk(bank, *self.schedule.whole(part), self.schedule.site.dtype)

    def sends(self, phase: str, part: int) -> tuple[Send, ...]:
        """The messages of a put phase that is given one part of the tokens or (-1) all of them."""
        sends = self._sends.get((phase, part))
        if sends is None:
            sends = tuple(self._messages(phase, part))
            self._sends[phase, part] = sends
        return sends

    def stays(self, name: str) -> Cut:
        """What of a local q, k or v this rank computes with itself: some heads, of all tokens that it is given."""
        cut = self._stays.get(name)
        if cut is None:
            cut = self._stays[name] = self._of_heads(name, self.rank)
        return cut

    def _messages(self, phase: str, part: int) -> Iterator[Send]:
        for step in self.program.phases[phase]:
            assert isinstance(step, Put) and step.tensor == TENSORS.get(phase, "x")
            if part in (-1, step.part):
                yield Send(step.dst, step.slot, self.schedule.place(step.dst, step.slot), self._cut(step, part))

    def _cut(self, step: Put, part: int) -> Cut:
        """The heads that the receiver computes, of the tokens that the message holds."""
        schedule = self.schedule
        if not is_attention(schedule):
            return ()
        start, stop = schedule.rows(step.tensor, Chunk(self.rank, step.part))
        length = stop - start
        whole = length == schedule.site.local_shape(step.tensor, self.rank, part)[2]
        rows: Cut = () if whole else ((2, start if part == -1 else 0, length),)
        return self._of_heads(step.tensor, step.dst) + rows

    def _of_heads(self, name: str, rank: int) -> Cut:
        """The heads of q, k or v that a rank computes with."""
        assert is_attention(self.schedule)
        first, last = (self.schedule.heads if name == "q" else self.schedule.kv_heads)(rank)
        whole = last - first == self.schedule.site.local_shape(name, self.rank)[1]
        return () if whole else ((1, first, last - first),)


def cut_out(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    """The stretches of a tensor; the tensor itself if they are all of it."""
    for dim, start, length in cut:
        tensor = tensor.narrow(dim, start, length)
    return tensor
