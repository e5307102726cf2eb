"""Direct stores between threads: data before signal, credits before reuse, bounded waits."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch

from sfcompile.errors import PeerDiedError, PeerFailedError, RankMismatchError, RuntimeTimeoutError, UnsupportedError
from sfcompile.runtime.wires.direct import DirectTransport, require_x86
from sfcompile.runtime.wires.symmetric_heap import HeapSize, Segment, local_segment

SIZE = HeapSize(num_slots=2, bank_bytes=1 << 20)


def pair(
    timeout_s: float = 0.5, pids: list[int] | None = None
) -> tuple[DirectTransport, DirectTransport, list[Segment]]:
    segments = [local_segment(SIZE), local_segment(SIZE)]
    first, second = (DirectTransport(rank, segments, timeout_s, pids) for rank in range(2))
    return first, second, segments


def test_put_then_wait() -> None:
    first, second, segments = pair()
    first.put(1, slot=1, offset=256, chunk=torch.arange(6).view(2, 3).t(), epoch=1)
    second.wait(0, slot=1, epoch=1)
    assert segments[1].chunk(1, 256, (3, 2), torch.int64).tolist() == [[0, 3], [1, 4], [2, 5]]


class SlowCopy:
    """A destination whose bytes arrive in two halves with a pause between."""

    def __init__(self, view: torch.Tensor) -> None:
        self.view = view

    def copy_(self, chunk: torch.Tensor) -> None:
        half = len(chunk) // 2
        self.view[:half].copy_(chunk[:half])
        time.sleep(0.01)
        self.view[half:].copy_(chunk[half:])


def test_a_reader_never_sees_half_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, segments = pair(timeout_s=20.0)
    words, epochs = 1024, 12
    whole = Segment.chunk
    writer_thread: list[int] = []

    def chunk(self: Segment, *place: Any) -> Any:
        view = whole(self, *place)
        return SlowCopy(view) if threading.get_ident() in writer_thread else view

    monkeypatch.setattr(Segment, "chunk", chunk)

    def write() -> None:
        writer_thread.append(threading.get_ident())
        for epoch in range(1, epochs + 1):
            first.put(1, 0, 0, torch.full((words,), epoch, dtype=torch.int64), epoch)

    writer = threading.Thread(target=write)
    writer.start()
    for epoch in range(1, epochs + 1):
        second.wait(0, 0, epoch)
        seen = segments[1].chunk(epoch % 2, 0, (words,), torch.int64)
        assert seen.min() == seen.max() == epoch
        second.finish(epoch)
    writer.join()


def test_a_put_waits_for_its_bank() -> None:
    first, second, segments = pair(timeout_s=5.0)
    chunk = torch.ones(4)
    first.put(1, 0, 0, chunk, 1)
    first.put(1, 0, 0, chunk, 2)
    third = threading.Thread(target=first.put, args=(1, 0, 0, chunk * 3, 3))
    third.start()
    time.sleep(0.05)
    assert third.is_alive() and segments[1].chunk(1, 0, (4,), torch.float32).tolist() == [1.0] * 4
    second.finish(1)
    third.join()
    assert segments[1].chunk(1, 0, (4,), torch.float32).tolist() == [3.0] * 4


def test_a_timeout_says_whom_and_what() -> None:
    _, second, _ = pair(timeout_s=0.3)
    start = time.monotonic()
    with pytest.raises(RuntimeTimeoutError) as caught:
        second.wait(0, slot=1, epoch=3)
    assert 0.3 <= time.monotonic() - start < 2.0
    text = str(caught.value)
    for part in ("[rank 1]", "waited 0.3 s for a chunk from rank 0", "slot 1", "wanted epoch 3", "seen epoch 0"):
        assert part in text


def test_a_chunk_of_another_call_is_an_error_and_ends_everybodys_call() -> None:
    first, second, _ = pair(timeout_s=30.0)
    first.open(1, [], tag=6)
    second.open(1, [], tag=6)
    first.put(1, 0, 0, torch.ones(2), 1)
    second.wait(0, 0, 1)
    first.open(2, [], tag=8)
    second.open(2, [], tag=10)
    first.put(1, 1, 0, torch.ones(2), 2)
    with pytest.raises(RankMismatchError, match="rank 0 sent a chunk of another call than rank 1 is in") as caught:
        second.wait(0, 1, 2)
    second.abort(f"rank 1: {caught.value.what}")
    with pytest.raises(RankMismatchError, match="not in the same call"):
        first.wait(1, 0, 2)


def test_a_notice_ends_the_wait() -> None:
    first, second, _ = pair(timeout_s=30.0)
    threading.Timer(0.1, first.abort, ("rank 0: ValueError: boom",)).start()
    start = time.monotonic()
    with pytest.raises(PeerFailedError, match="failed first: rank 0: ValueError: boom"):
        second.wait(0, 0, 1)
    assert time.monotonic() - start < 2.0


def test_a_dead_process_is_noticed_even_before_it_is_reaped() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    _, second, _ = pair(timeout_s=30.0, pids=[child.pid, os.getpid()])
    with pytest.raises(PeerDiedError, match=f"rank 0 .process {child.pid}. has gone"):
        second.wait(0, 0, 1)
    child.wait()
    with pytest.raises(PeerDiedError):
        second.wait(0, 0, 1)


def test_a_rank_that_left_is_told_by_its_own_word() -> None:
    _, second, segments = pair(timeout_s=30.0)
    second.open(1, [])
    segments[0].leave("its script ended with ValueError: no such prompt")
    with pytest.raises(PeerDiedError, match="rank 0 has left the job .* with ValueError: no such prompt") as caught:
        second.wait(0, 0, 1)
    assert "memory" not in str(caught.value) and "killed" not in str(caught.value)


def test_only_who_left_no_word_was_killed() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    _, second, segments = pair(timeout_s=30.0, pids=[child.pid, os.getpid()])
    with pytest.raises(PeerDiedError, match="without a word .* It was killed"):
        second.wait(0, 0, 1)
    segments[0].leave("its script ended")
    with pytest.raises(PeerDiedError, match="has left the job while rank 1 waited for it: its script ended"):
        second.wait(0, 0, 1)


def test_who_has_put_all_and_left_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk comes, and its sender ends, between the reader's look at the signal and its look at the sender."""
    first, second, segments = pair(timeout_s=30.0)
    first.open(1, [])
    second.open(1, [])
    look = DirectTransport._look_around

    def late(self: DirectTransport, *who: Any) -> Any:
        if segments[0].left is None:
            first.put(1, 0, 0, torch.ones(2), 1)
            segments[0].leave("its script ended")
        return look(self, *who)

    monkeypatch.setattr(DirectTransport, "_look_around", late)
    second.wait(0, 0, 1)


def test_a_kernel_waits_on_for_others_when_a_rank_has_ended_in_good_time() -> None:
    _, second, segments = pair(timeout_s=30.0)
    second.open(3, [])
    segments[0].done = 3
    segments[0].leave("its script ended")
    second._look_around_all()
    second.open(4, [])
    with pytest.raises(PeerDiedError, match="its script ended"):
        second._look_around_all()


def test_other_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_x86()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(UnsupportedError, match="this one is aarch64.*transport='c10d'"):
        require_x86()
