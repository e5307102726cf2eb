"""One-sided stores into a peer's mapped heap: ranks of one machine (shared memory), or threads of one process.

Why a reader never sees half a chunk. The sender runs
    copy bytes into the peer's bank;  store signal[bank][slot] = epoch and the call's tag
and the reader
    load signal until its epoch is reached;  compare the tag;  read the bytes.
x86-64 keeps stores in program order and loads in program order (TSO), and the copy and the signal store are separate
calls into native code, which no compiler reorders. A copy cut over threads ends in a join, which orders their stores
before the caller's next one; memcpy's non-temporal stores, which TSO does not order, end in a fence of its own. Signals
are aligned 8-byte words, written whole.

Why a bank is never overwritten too early. Epoch e + 2 uses the bank of epoch e. Before its first store of e + 2 into
rank B's bank, a sender loads B's ``done`` word until it is >= e; B stores ``done = e`` after its last read of epoch e.
A rank has at most two epochs open, so B reaches the end of e without needing anything of e + 2: the wait ends.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence

import torch

from sfcompile.errors import PeerDiedError, RuntimeTimeoutError, UnsupportedError
from sfcompile.runtime.program.instructions import Arrival
from sfcompile.runtime.wires import futex
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, Segment, bank_of
from sfcompile.runtime.wires.transport import TAG_BITS, Source, left_early, out_of_step, peer_failed, word_of

_YIELDS = 16
_LOOK_AROUND_S = 0.2


def require_x86() -> None:
    """Refuse processors whose memory model the ordering argument above does not cover."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise UnsupportedError(
            f"direct stores between ranks need an x86-64 processor, this one is {platform.machine()}",
            "their ordering rests on x86's total store order",
            "use transport='c10d'",
        )


class Watch:
    """Called by a kernel that polls a signal of this rank: gives the core away, looks around now and then.

    Raises (from the call):
        PeerFailedError, PeerDiedError: a rank failed or has gone.
        RuntimeTimeoutError: nothing arrived for ``timeout_s``.
    """

    def __init__(self, timeout_s: float, look_around: Callable[[], None], rank: int) -> None:
        self._timeout_s, self._look_around, self._rank = timeout_s, look_around, rank
        self._since = self._looked = 0.0

    def __call__(self) -> None:
        """One poll was in vain."""
        now = time.monotonic()
        if not self._since:
            self._since = self._looked = now
        if now - self._looked > _LOOK_AROUND_S:
            self._looked = now
            self._look_around()
        if now - self._since > self._timeout_s:
            raise RuntimeTimeoutError(
                f"rank {self._rank} waited {self._timeout_s:g} s inside an attention kernel",
                "a peer is slower than timeout_s, or it runs another program",
                "look at the peers' logs; raise options={'timeout_s': ...} if they are only slow",
                rank=self._rank,
            )
        os.sched_yield()

    def arrived(self) -> None:
        """Something came: the clock starts anew."""
        self._since = 0.0


class DirectTransport:
    """Stores into mapped segments.

    Args:
        rank: this rank.
        segments: per rank the mapped segment, or None where memory is not shared.
        timeout_s: longest wait.
        pids: per rank the process to watch while waiting, or None (threads).
    """

    def __init__(
        self,
        rank: int,
        segments: Sequence[Segment | None],
        timeout_s: float,
        pids: Sequence[int] | None = None,
    ) -> None:
        self._rank = rank
        self._segments = segments
        self._timeout_s = timeout_s
        self._pids = pids
        mine = segments[rank]
        assert mine is not None
        self._mine = mine
        self._tags = [0] * NUM_BANKS
        self._opened = 0

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        """Only the tag and the epoch are kept: senders store when they like."""
        self._tags[bank_of(epoch)] = tag
        self._opened = epoch

    def word(self, epoch: int) -> int:
        """What signals of an open epoch hold."""
        return word_of(epoch, self._tags[bank_of(epoch)])

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        """Copy, then signal; see the head of the file."""
        self.await_bank(dst, slot, epoch)
        segment = self._segments[dst]
        assert segment is not None
        bank = bank_of(epoch)
        segment.chunk(bank, offset, chunk.shape, chunk.dtype).copy_(chunk)
        segment.signals[bank, slot] = self.word(epoch)
        self.wake(dst, slot, epoch)

    def await_bank(self, dst: int, slot: int, epoch: int) -> None:
        """Wait until the receiver has read the epoch that used this bank before."""
        segment = self._segments[dst]
        assert segment is not None
        if segment.done >= epoch - NUM_BANKS:
            return
        self._await(lambda: segment.done, segment.done_address, epoch - NUM_BANKS, dst, slot, "its bank to be free")

    def wake(self, dst: int, slot: int, epoch: int) -> None:
        """Wake a receiver that sleeps until the slot's signal moves."""
        segment = self._segments[dst]
        assert segment is not None
        futex.wake(segment.signal_address(bank_of(epoch), slot))

    def watch(self) -> Watch:
        """For waits inside kernels."""
        return Watch(self._timeout_s, self._look_around_all, self._rank)

    def wait(self, src: int, slot: int, epoch: int) -> None:
        """Watch this rank's own signal word."""
        signals, bank = self._mine.signals, bank_of(epoch)
        if signals[bank, slot] == self.word(epoch):
            return  # it is here, and of this call
        if signals[bank, slot] < epoch << TAG_BITS:
            address = self._mine.signal_address(bank, slot)
            self._await(lambda: int(signals[bank, slot]), address, epoch, src, slot, "a chunk", TAG_BITS)
        self.check_tag(src, slot, epoch)

    def check_tag(self, src: int, slot: int, epoch: int) -> None:
        """Whether the chunk that has arrived is of this rank's call.

        Raises:
            RankMismatchError: it is of another.
        """
        seen = int(self._mine.signals[bank_of(epoch), slot])
        if seen != self.word(epoch):
            what = f"rank {src} sent a chunk of another call than rank {self._rank} is in"
            raise out_of_step(what, self._rank, src, slot, epoch)

    def finish(self, epoch: int) -> None:
        """Give the bank back to all senders at once."""
        self._mine.done = epoch
        futex.wake(self._mine.done_address)

    def notice(self) -> str | None:
        """What lies in this rank's segment."""
        return self._mine.aborted

    def abort(self, text: str) -> None:
        """Write the notice into every segment in reach."""
        for segment in self._segments:
            if segment is not None:
                segment.abort(text)

    def close(self) -> None:
        """Mappings go with their last reference."""
        self._segments = ()

    def _await(
        self, read: Callable[[], int], address: int, epoch: int, peer: int, slot: int, what: str, below: int = 0
    ) -> None:
        """Until the word at ``address``, which ``read`` reads, has reached an epoch; ``below``: bits under it."""
        wanted = epoch << below
        for _ in range(_YIELDS):  # there may be more ranks than cores: let the peer run
            if read() >= wanted:
                return
            os.sched_yield()
        start = time.monotonic()
        look = start + _LOOK_AROUND_S
        while (seen := read()) < wanted:
            futex.wait(address, seen, _LOOK_AROUND_S)
            now = time.monotonic()
            if now >= look:
                look = now + _LOOK_AROUND_S
                gone = self._look_around(peer, slot, epoch)
                # What the peer stored before it ended is visible to whoever has seen its end: it may be what we want.
                if gone is not None and read() < wanted:
                    raise gone
                if below:
                    self._look_for_strays(peer, slot, epoch)
                if now - start > self._timeout_s and read() < wanted:
                    raise RuntimeTimeoutError(
                        f"rank {self._rank} waited {self._timeout_s:g} s for {what} from rank {peer}",
                        "the peer is slower than timeout_s, or it runs another program",
                        "look at the peer's log; raise options={'timeout_s': ...} if it is only slow",
                        rank=self._rank, peer=peer, slot=slot, epoch=epoch, seen_epoch=read() >> below,
                    )  # fmt: skip

    def _look_for_strays(self, peer: int, slot: int, epoch: int) -> None:
        """A rank in another call may fill other slots than the one that is waited for."""
        words = self._mine.signals[bank_of(epoch)]
        if ((words >> TAG_BITS == epoch) & (words != self.word(epoch))).any():
            what = f"a chunk of another call than rank {self._rank} is in has come"
            raise out_of_step(what, self._rank, peer, slot, epoch)

    def _look_around_all(self) -> None:
        for peer in range(len(self._segments)):
            gone = self._look_around(peer, None, None)
            if gone is not None:
                raise gone

    def _look_around(self, peer: int, slot: int | None, epoch: int | None) -> PeerDiedError | None:
        """Raises what another rank has told; returns how ``peer`` has ended, if it left this rank behind."""
        notice = self._mine.aborted
        if notice is not None:
            raise peer_failed(self._rank, notice, peer, slot, epoch)
        segment = self._segments[peer]
        if segment is None:
            return None
        lives = self._pids is None or process_lives(self._pids[peer])
        left = segment.left  # after the look at the process: the word comes before its end
        if lives and left is None:
            return None
        if segment.done >= max(self._opened, epoch or 0) > 0:
            return None  # it has read all that this rank is in, so it had put its own before: it ended in good time
        if left is not None:
            return left_early(self._rank, peer, left, slot, epoch)
        pid = "" if self._pids is None else f" (process {self._pids[peer]})"
        return PeerDiedError(
            f"rank {peer}{pid} has gone without a word while rank {self._rank} waited for it",
            "it was killed (often by the system, for lack of memory) or crashed",
            "look at its log and at the kernel's (dmesg)",
            rank=self._rank, peer=peer, slot=slot, epoch=epoch,
        )  # fmt: skip


def process_lives(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended but was not reaped yet does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # a killed child that its parent has not reaped yet still answers to kill(0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return True
