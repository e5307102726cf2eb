"""Segments of several processes: one memory, never a name, room kept, and only the right file is opened."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tcp_ranks
import torch

from sfcompile.errors import HeapError
from sfcompile.runtime.wires import shared_files, shared_segments
from sfcompile.runtime.wires.shared_files import Place
from sfcompile.runtime.wires.shared_segments import map_shared, share, shared_segment
from sfcompile.runtime.wires.symmetric_heap import HeapSize, Segment

SIZE = HeapSize(num_slots=5, bank_bytes=4096)

# Makes a segment, writes into it, says where it lies, and waits to be told to go on.
OWNER = """
import sys
from sfcompile.runtime.wires.shared_segments import shared_segment
from sfcompile.runtime.wires.symmetric_heap import HeapSize
with shared_segment(HeapSize(5, 4096)) as (segment, place):
    segment.signals[1, 2] = 3
    print(*place, flush=True)
    sys.stdin.readline()
print("given up", flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def owner() -> Any:
    """Another process that holds a segment, and its place."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdout is not None
        yield process, Place(*map(int, process.stdout.readline().split()))
    finally:
        process.kill()
        process.communicate()


def test_processes_share_one_memory_after_its_owner_has_let_go() -> None:
    with owner() as (process, place):
        theirs = map_shared(place, SIZE)
        assert int(theirs.signals[1, 2]) == 3
        process.stdin.write("\n")
        assert process.stdout.readline() == "given up\n"
        with pytest.raises(HeapError):
            map_shared(place, SIZE)
        theirs.chunk(1, 0, (4,), torch.int32).copy_(torch.arange(4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert theirs.chunk(1, 0, (4,), torch.int32).tolist() == [0, 1, 2, 3]


def test_a_segment_has_no_name_even_while_it_is_made() -> None:
    """Whoever is killed, and when: there is nothing that anyone would have to remove."""
    with owner() as (_, place):
        assert os.stat(f"/proc/{place.pid}/fd/{place.fd}").st_nlink == 0


def test_room_is_reserved_before_anything_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file would be made happily, and a later store would die of SIGBUS."""
    asked: list[int] = []

    def full(fd: int, offset: int, length: int) -> None:
        asked.extend([fd, length])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(HeapError, match=r"heap of 12\.6 KiB per rank does not fit in /dev/shm, where .* are free"):
        shared_segment(SIZE).__enter__()
    assert asked[1] == SIZE.segment_bytes
    with pytest.raises(OSError):
        os.fstat(asked[0])  # closed


def test_no_room_is_said_at_once_in_units_that_can_be_read() -> None:
    with pytest.raises(HeapError, match=r"heap of 2\.0 PiB per rank does not fit in /dev/shm"):
        shared_segment(HeapSize(1, 2**50)).__enter__()
    with pytest.raises(HeapError, match="per rank"):
        shared_segment(HeapSize(1, 2**70)).__enter__()  # more than an offset of a file can say


def test_without_shared_memory_the_reason_is_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_files, "SHM", str(tmp_path / "nothing"))
    with pytest.raises(HeapError, match="cannot be made in .*nothing"):
        shared_segment(SIZE).__enter__()


def test_another_process_under_that_number_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where process ids are not shared, a descriptor may be anything: a terminal, somebody's file."""
    opened: list[str] = []
    with shared_segment(SIZE) as (_, place), open(os.devnull, "rb") as other:
        monkeypatch.setattr(os, "open", lambda path, *flags: opened.append(path))
        for wrong in (place._replace(fd=other.fileno()), place._replace(inode=place.inode + 1)):
            with pytest.raises(HeapError, match="is another one here: process ids are not shared"):
                map_shared(wrong, SIZE)
        with pytest.raises(HeapError, match="No such file"):
            map_shared(place._replace(pid=2**22 + 1), SIZE)
    assert opened == []


def shared(ranks: int, size: Callable[[int], HeapSize] = lambda rank: SIZE) -> list[Any]:
    """What :func:`share` gives or raises on ranks that are threads."""
    meeting, ended = tcp_ranks.Meeting(ranks), dict[int, Any]()

    def body(rank: int) -> None:
        peers = [peer for peer in range(ranks) if peer != rank]
        try:
            ended[rank] = share(rank, peers, size(rank), meeting.of(rank))
        except HeapError as error:
            ended[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [ended[rank] for rank in range(ranks)]


def test_every_rank_maps_every_other() -> None:
    everyone: list[dict[int, Segment]] = shared(3)
    everyone[0][2].signals[0, 1] = 7
    assert [int(mine[2].signals[0, 1]) for mine in everyone] == [7, 7, 7]
    assert int(everyone[1][1].signals[0, 1]) == 0


def test_what_one_rank_cannot_make_is_an_error_on_all() -> None:
    for error in shared(3, lambda rank: HeapSize(5, 2**50) if rank == 1 else SIZE):
        assert isinstance(error, HeapError) and error.on_every_rank
        assert "rank 1: a symmetric heap of 2.0 PiB per rank does not fit" in str(error)
        assert "rank 0" not in error.what


def test_what_one_rank_cannot_map_is_an_error_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    right = shared_segments.map_shared

    def map_or_not(place: Place, size: HeapSize) -> Segment:
        if threading.current_thread() is blind[0]:
            return right(place._replace(pid=2**22 + 1), size)
        return right(place, size)

    blind = [threading.Thread()]
    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        blind[0] = thread  # the last one that starts
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(shared_segments, "map_shared", map_or_not)
    for error in shared(2):
        assert isinstance(error, HeapError) and error.on_every_rank
        assert error.what.startswith("rank 1: the memory of process 4194305 on this machine cannot be mapped")
        assert "docker: --pid" in error.fix
