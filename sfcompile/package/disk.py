"""Files as packages read and write them: regular files only, and nothing half written under a name that counts.

A FIFO or a device given as a package would block, or be read as if it were one: files are opened without blocking and
looked at before a byte is read. What is written goes to a new file beside the target (a symlink there is not followed)
and takes the target's name when it is whole; whatever fails, a full disk included, it is removed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sfcompile.errors import PackageError

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def open_regular(path: Path, follow: bool = True) -> IO[bytes]:
    """A regular file, open for reading.

    Args:
        follow: whether the last part of the path may be a symlink: where the user wrote the path, not where a file did.

    Raises:
        PackageError: it cannot be opened, or is a folder, a FIFO, a socket or a device.
    """
    try:
        fd = os.open(path, _READ | (0 if follow else os.O_NOFOLLOW))
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if getattr(error, "errno", 0) == errno.ELOOP:
            reason = "its symbolic links lead round in a circle" if follow else "it is a symbolic link"
        raise PackageError(f"{path} cannot be read: {reason}", "", "check the path") from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise PackageError(
            f"{path} cannot be read: it is {_kind(mode)}", "only a regular file is opened", "check the path"
        )
    return os.fdopen(fd, "rb")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def beside(package: Path, name: object) -> Path:
    """A file that a package names: in the package's own folder, and no link out of it.

    Raises:
        PackageError: the name has a folder part, or is no name at all.
    """
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
        raise PackageError(
            f"{package} names its weights {name!r}",
            "a package may name a file in its own folder only, so that it cannot make you read another",
            "say where they are: sfcompile.load(path, weights=...)",
        )
    return package.parent / name


def file_hash(file: IO[bytes]) -> str:
    """SHA-256 of an open file, from its beginning."""
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the name ``path`` when the body has ended, or is removed if it fails.

    Raises:
        PackageError: the folder or the disk refuses.
    """
    part = path.parent / f".{path.name}.{secrets.token_hex(6)}.part"
    with refusing(path):
        _check_target(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(part, _WRITE, 0o666), "w+b")
    try:
        with refusing(path, file):
            yield file
            file.close()
            part.replace(path)
    except BaseException:
        with suppress(OSError):
            file.close()
        with suppress(OSError):  # a disk that refuses this too has said so above
            part.unlink(missing_ok=True)
        raise


def _check_target(path: Path) -> None:
    """Whether a new file may take this name: no folder, and nothing that other processes reach through it.

    Raises:
        PackageError: it is a folder, a FIFO, a socket or a device, or no name at all.
    """
    if "\0" in str(path):
        raise PackageError(f"{str(path)!r} cannot be written", "no file's name holds a NUL", "name another path")
    with suppress(FileNotFoundError, NotADirectoryError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            raise PackageError(
                f"{path} cannot be written: it is {_kind(mode)}", "a new file would take its place", "name another path"
            )


@contextmanager
def refusing(path: Path, file: IO[bytes] | None = None) -> Iterator[None]:
    """What the system refuses while ``path`` is written is a PackageError, with the numbers of its disk."""
    try:
        yield
    except OSError as error:
        room = ""
        with suppress(OSError, ValueError):
            written = 0 if file is None else os.fstat(file.fileno()).st_size
            room = f"; {written:,} bytes were written, {_free(path):,} are free there"
        raise PackageError(
            f"{path} cannot be written: {error}{room}", "nothing is left of it", "make room, or name another path"
        ) from error


def _free(path: Path) -> int:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
