"""Chunks as gloo messages, for ranks that share no memory. Receives are posted when the site opens, ahead of any wait.

Two-sided messages match by (sender, tag) in order. The tag is the bank and the slot, so the message of epoch e + 2 can
only be taken by the receive posted for e + 2, which the receiver posts after it has finished e: that is the credit.
Behind the chunk's bytes stands the word of its call (transport.py): a message is received beside the heap, and only one
of the call that waits for it is copied into the slot. What is sent is a copy, so nothing reads the caller's memory, or
a slot that a chunk is sent on from, after ``put``.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from sfcompile.runtime.program.instructions import Arrival
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, bank_of
from sfcompile.runtime.wires.transport import Source, connection_lost, out_of_step, peer_failed, too_late, word_of

_ABORT_TAG = 2**30
_WORD_BYTES = 8
_GLOO_PLACE = re.compile(r"^\[[^\]]*\] *")  # "[/path/of/gloo.cc:553] "


class C10dTransport:
    """Messages over a gloo group.

    Args:
        rank: this rank of the group.
        group: the gloo group; nothing else uses it.
        timeout_s: longest wait.
        notice: reads the failure notice that some rank may have left, to explain a closed connection.
    """

    def __init__(
        self,
        rank: int,
        group: dist.ProcessGroup,
        timeout_s: float,
        notice: Callable[[], str | None],
    ) -> None:
        self._rank = rank
        self._group = group
        self._global = dist.get_process_group_ranks(group)  # what c10d wants to be told
        self.timeout_s = timeout_s
        self._notice = notice
        self._tags = [0] * NUM_BANKS
        self._receives: dict[tuple[int, int], tuple[Any, torch.Tensor, torch.Tensor]] = {}  # work, message, slot
        self._sends: dict[int, list[tuple[Any, torch.Tensor, int, int]]] = {}

    def _tag(self, epoch: int, slot: int) -> int:
        return slot * NUM_BANKS + bank_of(epoch)

    def _word(self, epoch: int) -> torch.Tensor:
        return torch.tensor([word_of(epoch, self._tags[bank_of(epoch)])], dtype=torch.int64).view(torch.uint8)

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        """Post every receive of the site."""
        self._tags[bank_of(epoch)] = tag
        for arrival, view in arrivals:
            if view.numel():
                message = torch.empty(view.nbytes + _WORD_BYTES, dtype=torch.uint8)
                work = dist.irecv(message, self._global[arrival.src], self._group, self._tag(epoch, arrival.slot))
                self._receives[epoch, arrival.slot] = work, message, view

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        """Hand the chunk to gloo's own threads."""
        if chunk.numel():
            message = torch.cat([_raw(chunk.contiguous()), self._word(epoch)])
            work = dist.isend(message, self._global[dst], self._group, self._tag(epoch, slot))
            self._sends.setdefault(epoch, []).append((work, message, dst, slot))

    def wait(self, src: int, slot: int, epoch: int) -> None:
        """Wait for the posted receive."""
        receive = self._receives.pop((epoch, slot), None)
        if receive is not None:
            work, message, view = receive
            self._complete(work, src, slot, epoch)
            if not torch.equal(message[-_WORD_BYTES:], self._word(epoch)):
                what = f"rank {src} sent a chunk of another call than rank {self._rank} is in"
                raise out_of_step(what, self._rank, src, slot, epoch)
            _raw(view).copy_(message[:-_WORD_BYTES])

    def finish(self, epoch: int) -> None:
        """Let the sends of this and earlier epochs go; the receiver has posted its side, so this ends."""
        for old in [e for e in self._sends if e <= epoch]:
            for work, _, dst, slot in self._sends.pop(old):
                self._complete(work, dst, slot, old)

    def _complete(self, work: Any, peer: int, slot: int, epoch: int) -> None:
        try:
            work.wait(datetime.timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            notice = self._notice()
            if notice is not None:
                raise peer_failed(self._rank, notice, peer, slot, epoch) from error
            reason = _GLOO_PLACE.sub("", str(error)).split(". ")[0]
            if "imed out" in reason:
                what = f"rank {self._rank} waited {self.timeout_s:g} s for its message with rank {peer}"
                raise too_late(what, self._rank, peer, slot, epoch) from error
            raise connection_lost(self._rank, peer, reason, slot, epoch) from error

    def notice(self) -> str | None:
        """gloo tells of a closed connection only to who uses it."""
        return None

    def abort(self, text: str) -> None:
        """Close every connection of the group, so that peers on other machines stop waiting and read the notice.

        gloo has no call for that, but a receive that times out does it, on purpose and for good.
        """
        with contextlib.suppress(RuntimeError):
            nothing = torch.empty(1, dtype=torch.uint8)
            peer = self._global[(self._rank + 1) % len(self._global)]
            work = dist.irecv(nothing, peer, self._group, _ABORT_TAG)
            assert work is not None  # this rank is in the group
            work.wait(datetime.timedelta(milliseconds=1))

    def close(self) -> None:
        """Forget what is under way."""
        self._receives.clear()
        self._sends.clear()

    def disconnect(self, how: str = "") -> None:
        """The connections are the group's and end with it."""


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor: gloo does not know every dtype."""
    return tensor.view(-1).view(torch.uint8)
