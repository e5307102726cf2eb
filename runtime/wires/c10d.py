"""Chunks as messages of torch.distributed, for ranks that share no memory: over gloo, and on GPUs over NCCL.

With a chunk goes the word of its call (transport.py).

gloo (:class:`C10dTransport`): the word stands behind the chunk's bytes; a message is received beside the heap, and only
one of the call that waits for it is copied into the slot. What is sent is a copy, so nothing reads the caller's memory,
or a slot that a chunk is sent on from, after ``put``. Receives are posted when the site opens, ahead of any wait.
Two-sided messages match by (sender, tag) in order. The tag is the bank and the slot, so the message of epoch e + 2 can
only be taken by the receive posted for e + 2, which the receiver posts after it has finished e: that is the credit.

NCCL (:class:`PairedTransport`): messages have no tags and match by order alone, a message under way blocks the ones
behind it, and a wait is the stream's, not the host's. The programs of all ranks are one program seen from each of them
(codegen/schedule/schedule.py): where a rank sends into a slot of another, some rank sends into the same slot of its
own. So the receive of a slot is posted in one group with the send into that slot. Every rank posts the same slots in
the same order, because all run one graph: the n-th group of each pair of ranks is the same on both. A group waits for
what its own rank computes before it, and that for earlier groups only: by induction all of them end. A wait for a slot
comes after the send into it in every program, else all ranks would wait before any sends (the proof of the schedule
excludes that), so there is a receive to wait for. A group holds two messages for a chunk, its bytes and its word: the
bytes go from the caller's memory where that lasts until the call has ended (a share of a weight), and to the slot, so
that neither rank needs room for a copy.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sfcompile.errors import InternalError
from sfcompile.runtime.program.instructions import Arrival
from sfcompile.runtime.program.sites import align
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, bank_of
from sfcompile.runtime.wires.transport import Source, connection_lost, out_of_step, peer_failed, too_late, word_of

_ABORT_TAG = 2**30
_WORD_BYTES = 8
_GLOO_PLACE = re.compile(r"^\[[^\]]*\] *")  # "[/path/of/gloo.cc:553] "


class _Received(NamedTuple):
    """A message under way to this rank: what is to be waited for, once, its bytes, and the slot that it is for."""

    works: list[Any]
    content: torch.Tensor
    slot: torch.Tensor


class _Sent(NamedTuple):
    """A message under way to another rank: its content is kept until it has left."""

    works: list[Any]
    content: Sequence[torch.Tensor]
    dst: int
    slot: int


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
        self._receives: dict[tuple[int, int], _Received] = {}
        self._sends: dict[int, list[_Sent]] = {}

    def _tag(self, epoch: int, slot: int) -> int:
        return slot * NUM_BANKS + bank_of(epoch)

    def _word(self, epoch: int, slot: int) -> int:
        """The word of the call, with the slot in its tag: a message that took the place of another is noticed."""
        return word_of(epoch, self._tags[bank_of(epoch)] ^ slot)

    def _packed(self, chunk: torch.Tensor, epoch: int, slot: int) -> torch.Tensor:
        """A chunk's bytes, and behind them the word."""
        message = _empty_message(chunk)
        message[: chunk.nbytes].view(chunk.dtype).view(chunk.shape).copy_(chunk)
        _word_in(message).fill_(self._word(epoch, slot))
        return message

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        """Post every receive of the site."""
        self._tags[bank_of(epoch)] = tag
        for arrival, view in arrivals:
            if view.numel():
                message = _empty_message(view)
                work = dist.irecv(message, self._global[arrival.src], self._group, self._tag(epoch, arrival.slot))
                self._receives[epoch, arrival.slot] = _Received([work], message, view)

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        """Hand the chunk to gloo's own threads."""
        if chunk.numel():
            message = self._packed(chunk, epoch, slot)
            work = dist.isend(message, self._global[dst], self._group, self._tag(epoch, slot))
            self._sends.setdefault(epoch, []).append(_Sent([work], [message], dst, slot))

    def wait(self, src: int, slot: int, epoch: int) -> None:
        """Wait for the posted receive."""
        receive = self._receives.pop((epoch, slot), None)
        if receive is not None:
            self._complete(receive.works, src, slot, epoch)
            self._compare(_word_in(receive.content), src, slot, epoch)
            _raw(receive.slot).copy_(receive.content[: receive.slot.nbytes])

    def _compare(self, seen: torch.Tensor, src: int, slot: int, epoch: int) -> None:
        """Look at the word that came with a chunk."""
        if int(seen) != self._word(epoch, slot):
            what = f"rank {src} sent a chunk of another call than rank {self._rank} is in"
            raise out_of_step(what, self._rank, src, slot, epoch)

    def finish(self, epoch: int) -> None:
        """Let the sends of this and earlier epochs go; the receiver has posted its side, so this ends."""
        for old in [e for e in self._sends if e <= epoch]:
            for sent in self._sends.pop(old):
                self._complete(sent.works, sent.dst, sent.slot, old)

    def settle(self) -> None:
        """Every message is a copy: its word stands behind the chunk."""

    def _complete(self, works: list[Any], peer: int, slot: int, epoch: int) -> None:
        """Wait for what has not been waited for: gloo would wait for another message the second time."""
        try:
            while works:
                self._join(works.pop())
        except RuntimeError as error:
            notice = self._notice()
            if notice is not None:
                raise peer_failed(self._rank, notice, peer, slot, epoch) from error
            reason = _GLOO_PLACE.sub("", str(error)).split(". ")[0]
            if "imed out" in reason:
                what = f"rank {self._rank} waited {self.timeout_s:g} s for its message with rank {peer}"
                raise too_late(what, self._rank, peer, slot, epoch) from error
            raise connection_lost(self._rank, peer, reason, slot, epoch) from error

    def _join(self, work: Any) -> None:
        """Wait for the end of a message."""
        work.wait(datetime.timedelta(seconds=self.timeout_s))

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


class PairedTransport(C10dTransport):
    """Messages over a group without tags, ordered by a stream: NCCL. See the head of the file.

    On a GPU nothing here makes the host wait: c10d begins a group after what the current stream holds, and the wait for
    it holds up the current stream. That gives three orders without credit:

    * a slot is read on the current stream, behind the wait for what came in it. Epoch e has ended on the host, so all
      its reads are on the stream, before e + 2 opens; a group that receives into the bank anew is posted later, and
      begins behind them.
    * what is sent from memory that lasts was written on the stream before the group was posted.
    * ``finish`` holds up the stream until what the epoch sent has left, and every epoch ends before its call: who
      writes to that memory after the call, on the stream, writes behind that.

    Args:
        status: int64, where the messages lie; its first word notes a chunk of another call that came.
    """

    def __init__(
        self,
        rank: int,
        group: dist.ProcessGroup,
        timeout_s: float,
        notice: Callable[[], str | None],
        status: torch.Tensor,
    ) -> None:
        super().__init__(rank, group, timeout_s, notice)
        self._status = status[:1]
        self._expected: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        """Note what will come: it is received when this rank sends into the same slot of another."""
        self._tags[bank_of(epoch)] = tag
        for arrival, view in arrivals:
            if view.numel():
                self._expected[epoch, arrival.slot] = arrival.src, view

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        """Send the chunk and receive what comes in the same slot, in one group."""
        content = self._content(chunk, epoch, slot, source) if chunk.numel() else ()
        works = self._exchange(dst, content, slot, epoch)
        if content:
            self._sends.setdefault(epoch, []).append(_Sent(works, content, dst, slot))

    def _content(self, chunk: torch.Tensor, epoch: int, slot: int, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        """A chunk's bytes and its word, as they are sent: of memory that lasts no copy."""
        if source is Source.CALL and chunk.is_contiguous():
            word = torch.full((1,), self._word(epoch, slot), dtype=torch.int64, device=chunk.device)
            return _raw(chunk), word
        message = self._packed(chunk, epoch, slot)
        return message[: chunk.nbytes], _word_in(message)

    def pass_by(self, slot: int, epoch: int) -> None:
        """What this rank sends into a slot went another way: receive what comes in it, if that has not been posted."""
        self._exchange(-1, (), slot, epoch)

    def _exchange(self, dst: int, content: Sequence[torch.Tensor], slot: int, epoch: int) -> list[Any]:
        """Post a group: what is sent into a slot, and what comes into the same slot, if that has not been posted."""
        group = [dist.P2POp(dist.isend, part, self._global[dst], self._group) for part in content]
        src, view = self._expected.pop((epoch, slot), (-1, None))
        if view is None:
            return list(dist.batch_isend_irecv(group)) if group else []
        word = torch.empty(1, dtype=torch.int64, device=view.device)
        group += [dist.P2POp(dist.irecv, part, self._global[src], self._group) for part in (_raw(view), word)]
        works = list(dist.batch_isend_irecv(group))
        self._receives[epoch, slot] = _Received(works, word, view)
        return works

    def wait(self, src: int, slot: int, epoch: int) -> None:
        """The stream waits for the receive; later work on it finds the chunk in its slot."""
        if (epoch, slot) in self._expected:
            raise InternalError(
                f"rank {self._rank} waits for slot {slot} of epoch {epoch} before it has sent into that slot",
                "receives are posted together with the send into the same slot, which every schedule has before",
                "report this schedule, or use transport='nvshmem'",
            )
        receive = self._receives.pop((epoch, slot), None)
        if receive is not None:
            self._complete(receive.works, src, slot, epoch)
            self._compare(receive.content, src, slot, epoch)

    def _compare(self, seen: torch.Tensor, src: int, slot: int, epoch: int) -> None:
        """Note a word of another call where the end of the call looks for it; the host does not wait for it."""
        self._status.copy_(torch.where(seen == self._word(epoch, slot), self._status, seen))

    def _join(self, work: Any) -> None:
        """Hold up the current stream. With a limit NCCL would hold up the host: its group keeps the limit."""
        work.wait()

    def abort(self, text: str) -> None:
        """End the kernels that are under way on this GPU; the group is of no use any more."""
        abort = getattr(self._group, "abort", None)
        if abort is not None:
            with contextlib.suppress(RuntimeError):
                abort()

    def close(self) -> None:
        """Forget what is under way."""
        super().close()
        self._expected.clear()


def _empty_message(chunk: torch.Tensor) -> torch.Tensor:
    """Room for a chunk's bytes and the word behind them, where the chunk lies."""
    return torch.empty(align(chunk.nbytes, _WORD_BYTES) + _WORD_BYTES, dtype=torch.uint8, device=chunk.device)


def _word_in(message: torch.Tensor) -> torch.Tensor:
    return message[-_WORD_BYTES:].view(torch.int64)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor: gloo does not know every dtype."""
    return tensor.view(-1).view(torch.uint8)
