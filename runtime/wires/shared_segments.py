"""Segments that the ranks of a machine share: files in /dev/shm that never had a name.

A file that is opened with O_TMPFILE is in no folder: the kernel frees it with the last process that has it open or
mapped, so ranks that are killed at any moment leave nothing. Peers reach it through its owner's descriptor,
/proc/PID/fd/N, which the kernel follows for processes of the same user, whatever their mount namespaces, containers'
own /dev/shm among them; they must see each other's process ids, though. Where they do not, PID is another process or
none: a file is opened only after its device and inode have been found to be those of the owner's.

Room is reserved when a segment is made: a sparse file would be made happily, and a later store would end in SIGBUS.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from sfcompile.errors import HeapError
from sfcompile.runtime.wires.symmetric_heap import HeapSize, Segment

SHM = "/dev/shm"
_WHY = "every rank keeps two banks of chunk buffers in memory that it shares with the ranks of its machine"
_NO_ROOM = "enlarge /dev/shm (docker: --shm-size), use fewer tokens per call, or transport='c10d'"
_NOT_SHARED = (
    "run the ranks of a machine as one user, in one container or in containers that share their process ids (docker: "
    "--pid), or use transport='c10d'"
)


class Place(NamedTuple):
    """Where peers find a segment while its owner holds it: a descriptor of a process, and which file it must be."""

    pid: int
    fd: int
    device: int
    inode: int


@contextmanager
def shared_segment(size: HeapSize) -> Iterator[tuple[Segment, Place]]:
    """A new segment of this process, and where peers find it until the body ends. The memory stays as long as anybody
    maps it.

    Raises:
        HeapError: there is no room, or no shared memory.
    """
    fd, problem = -1, ""
    try:
        fd = os.open(SHM, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(fd, 0, size.segment_bytes)
        memory = mmap.mmap(fd, size.segment_bytes)
        status = os.fstat(fd)
    except (OSError, OverflowError) as error:
        problem = _no_room(size.segment_bytes, error)
    finally:
        if problem and fd >= 0:
            os.close(fd)
    if problem:
        raise HeapError(problem, _WHY, _NO_ROOM)
    try:
        yield Segment(memory, size), Place(os.getpid(), fd, status.st_dev, status.st_ino)
    finally:
        os.close(fd)


def map_shared(place: Place, size: HeapSize) -> Segment:
    """Map a peer's segment, which its owner holds.

    Raises:
        HeapError: this process cannot reach it.
    """
    path = f"/proc/{place.pid}/fd/{place.fd}"
    try:
        _require(os.stat(path), place)  # before it is opened: it may be a file of a process that has nothing to do
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _require(os.fstat(fd), place)
            return Segment(mmap.mmap(fd, size.segment_bytes), size)
        finally:
            os.close(fd)
    except OSError as error:
        raise HeapError(
            f"the memory of process {place.pid} on this machine cannot be mapped ({error})", _WHY, _NOT_SHARED
        ) from error


def share(
    rank: int, neighbours: Sequence[int], size: HeapSize, exchange: Callable[[Any, str], list[Any]]
) -> dict[int, Segment]:
    """Collective: a new segment on every rank; by rank this one's and those of its neighbours.

    Args:
        neighbours: the other ranks of this machine.
        exchange: collective over all ranks of the job: every rank's value, by rank.

    Raises:
        HeapError: some rank cannot make its segment, or cannot map another; on every rank.
    """
    segments: dict[int, Segment] = {}
    place, problem = Place(0, 0, 0, 0), ""
    with ExitStack() as held:
        try:
            segments[rank], place = held.enter_context(shared_segment(size))
        except HeapError as error:
            problem = error.what
        everyone = exchange((problem, tuple(place)), "make the heap")
        _refuse(rank, [text for text, _ in everyone], _NO_ROOM)
        try:
            for peer in neighbours:
                segments[peer] = map_shared(Place(*everyone[peer][1]), size)
        except HeapError as error:
            problem = error.what
        _refuse(rank, exchange(problem, "map the heap"), _NOT_SHARED)  # everyone has mapped everything
    return segments


def in_words(nbytes: int) -> str:
    """Bytes for people: ``28.7 MiB``."""
    for power, unit in ((5, "PiB"), (4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if nbytes >= 1 << 10 * power:
            return f"{nbytes / (1 << 10 * power):.1f} {unit}"
    return f"{nbytes} B"


def _require(status: os.stat_result, place: Place) -> None:
    if (status.st_dev, status.st_ino) != (place.device, place.inode):
        raise FileNotFoundError(errno.ENOENT, f"process {place.pid} is another one here: process ids are not shared")


def _no_room(nbytes: int, error: OSError | OverflowError) -> str:
    heap = f"a symmetric heap of {in_words(nbytes)} per rank"
    if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
        return f"{heap} cannot be made in {SHM} ({error})"
    status = os.statvfs(SHM)
    free = in_words(status.f_bavail * status.f_frsize)
    return f"{heap} does not fit in {SHM}, where {free} are free ({error})"


def _refuse(rank: int, problems: Sequence[str], fix: str) -> None:
    failed = [f"rank {other}: {text}" for other, text in enumerate(problems) if text]
    if failed:
        more = f"; and {len(failed) - 4} more ranks" if len(failed) > 4 else ""
        error = HeapError("; ".join(failed[:4]) + more, _WHY, fix, rank=rank)
        error.on_every_rank = True
        raise error
