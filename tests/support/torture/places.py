"""Places apart: mount and network namespaces of Linux for single processes, and what a job leaves where."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NEW_MOUNTS, _NEW_NETWORK = 0x00020000, 0x40000000
_RECURSIVE, _PRIVATE = 0x4000, 1 << 18
SHM = Path("/dev/shm")
GRACE_S = 1.0
"""What is still there so long after the last rank's end is a leftover."""


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(code: int, what: str) -> None:
    if code:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def own_mounts() -> None:
    """From now on, mounts of this process and of its children are theirs alone. For root."""
    libc = _libc()
    _checked(libc.unshare(_NEW_MOUNTS), "unshare")
    _checked(libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None), "mount --make-rprivate /")


def mount_memory(folder: Path, nbytes: int | None = None) -> None:
    """A file system in memory over a folder, of so many bytes (None: no limit)."""
    data = b"mode=1777" if nbytes is None else f"mode=1777,size={nbytes}".encode()
    _checked(_libc().mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, data), f"mount {folder}")


@contextmanager
def room(shm_bytes: int | None) -> Iterator[int | None]:
    """A mount namespace with a /dev/shm of its own, for the processes of one job.

    Args:
        shm_bytes: of /dev/shm; None: no limit.

    Yields:
        The process that keeps the namespace; None where we are not root: there is none.
    """
    if os.geteuid() != 0:
        yield None
        return
    size = "" if shm_bytes is None else f",size={shm_bytes}"
    script = f"mount -t tmpfs -o mode=1777{size} tmpfs {SHM} && echo made && exec sleep infinity"
    command = ["unshare", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as keeper:
        assert keeper.stdout is not None
        try:
            if keeper.stdout.readline() != "made\n":
                raise OSError("no /dev/shm could be mounted in a namespace of its own")
            yield keeper.pid
        finally:
            keeper.kill()


def enter_room(keeper: int) -> None:
    """Move this process into the mount namespace of another one."""
    fd = os.open(f"/proc/{keeper}/ns/mnt", os.O_RDONLY)
    try:
        here = os.getcwd()
        _checked(_libc().setns(fd, _NEW_MOUNTS), "setns")
        os.chdir(here)
    finally:
        os.close(fd)


def enter_network(name: str) -> None:
    """Move this process into a network namespace of ``ip netns``."""
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        _checked(_libc().setns(fd, _NEW_NETWORK), f"setns {name}")
    finally:
        os.close(fd)


def shared_memory_names(keeper: int | None) -> set[str]:
    """Files in the /dev/shm of a room; without one, those that have our name.

    Python's own semaphores are left out: its resource tracker removes them when the server that forks ranks ends.
    """
    shm = SHM if keeper is None else Path(f"/proc/{keeper}/root{SHM}")
    names = {path.name for path in shm.iterdir() if not path.name.startswith("sem.")}
    return {name for name in names if keeper is not None or name.startswith("sfcompile")}


def leftovers(
    keeper: int | None, before: set[str], temporary: Path, folder: Path, allowed: tuple[str, ...]
) -> list[str]:
    """What a job that has ended left: in /dev/shm, in its TMPDIR and in its folder."""
    end = time.monotonic() + GRACE_S
    while True:
        left = [f"/dev/shm/{name}" for name in sorted(shared_memory_names(keeper) - before)]
        left += [f"TMPDIR/{path.relative_to(temporary)}" for path in sorted(temporary.rglob("*")) if path.is_file()]
        names = {path: str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if not path.is_dir()}
        left += [name for path, name in names.items() if not any(path.match(pattern) for pattern in allowed)]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.05)
