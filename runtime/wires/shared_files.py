"""Memory that the ranks of a machine share: files in /dev/shm that never had a name.

A file that is opened with O_TMPFILE is in no folder: the kernel frees it with the last process that has it open or
mapped, so ranks that are killed at any moment leave nothing. Peers reach it through its owner's descriptor,
/proc/PID/fd/N, which the kernel follows for processes of the same user, whatever their mount namespaces, containers'
own /dev/shm among them; they must see each other's process ids, though. Where they do not, PID is another process or
none: a file is opened only after its device and inode have been found to be those of the owner's.

Room is reserved when a file is made: a sparse one would be made happily, and a later store would end in SIGBUS.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

SHM = "/dev/shm"


class Place(NamedTuple):
    """Where peers find a file while its owner holds it: a descriptor of a process, and which file it must be."""

    pid: int
    fd: int
    device: int
    inode: int


@contextmanager
def shared_file(nbytes: int) -> Iterator[Place]:
    """A new file of this process, and where peers find it until the body ends; ``fd`` is its descriptor here.

    Raises:
        OSError, OverflowError: there is no room, or no shared memory; :func:`no_room` says it in words.
    """
    fd = os.open(SHM, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        status = os.fstat(fd)
        yield Place(os.getpid(), fd, status.st_dev, status.st_ino)
    finally:
        os.close(fd)


@contextmanager
def opened(place: Place, flags: int) -> Iterator[int]:
    """A descriptor of a file that its owner holds, until the body ends.

    Args:
        flags: os.O_RDWR or os.O_RDONLY.

    Raises:
        OSError: this process cannot reach it.
    """
    path = f"/proc/{place.pid}/fd/{place.fd}"
    _require(os.stat(path), place)  # before it is opened: it may be a file of a process that has nothing to do
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        _require(os.fstat(fd), place)
        yield fd
    finally:
        os.close(fd)


def no_room(what: str, error: OSError | OverflowError) -> str:
    """Why :func:`shared_file` could not make a file for ``what``, in words."""
    if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
        return f"{what} cannot be made in {SHM} ({error})"
    status = os.statvfs(SHM)
    free = in_words(status.f_bavail * status.f_frsize)
    return f"{what} does not fit in {SHM}, where {free} are free ({error})"


def in_words(nbytes: int) -> str:
    """Bytes for people: ``28.7 MiB``."""
    for power, unit in ((5, "PiB"), (4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if nbytes >= 1 << 10 * power:
            return f"{nbytes / (1 << 10 * power):.1f} {unit}"
    return f"{nbytes} B"


def failures(problems: Sequence[str]) -> str:
    """What went wrong on which ranks, by rank, for an error of all; "" if nothing did."""
    failed = [f"rank {other}: {text}" for other, text in enumerate(problems) if text]
    more = f"; and {len(failed) - 4} more ranks" if len(failed) > 4 else ""
    return "; ".join(failed[:4]) + more


def _require(status: os.stat_result, place: Place) -> None:
    if (status.st_dev, status.st_ino) != (place.device, place.inode):
        raise FileNotFoundError(errno.ENOENT, f"process {place.pid} is another one here: process ids are not shared")
