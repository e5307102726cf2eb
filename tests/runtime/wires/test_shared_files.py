"""Files without a name: found by their owner's descriptor, read by who may only read, and gone with the last process.

What holds for segments in them is in test_shared_segments.py."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from sfcompile.runtime.wires import shared_files
from sfcompile.runtime.wires.shared_files import failures, in_words, no_room, opened, shared_file


def test_a_peer_reads_what_the_owner_wrote_and_keeps_it() -> None:
    with shared_file(8192) as place:
        assert os.fstat(place.fd).st_nlink == 0
        mmap.mmap(place.fd, 8192)[:4] = b"word"
        with opened(place, os.O_RDONLY) as fd:
            with pytest.raises(PermissionError):
                mmap.mmap(fd, 8192)  # writable and shared
            mine = mmap.mmap(fd, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    assert mine[:4] == b"word"
    with pytest.raises(OSError), opened(place, os.O_RDONLY):
        pass


def test_a_file_that_cannot_be_made_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as full, shared_file(2**50):
        pass
    assert "a cup of water does not fit in /dev/shm, where" in no_room("a cup of water", full.value)
    assert len(os.listdir("/proc/self/fd")) == before
    assert "cannot be made" in no_room("a cup", OSError(errno.EACCES, "Permission denied"))


def test_without_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_files, "SHM", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError), shared_file(4096):
        pass


def test_failures_are_told_by_rank() -> None:
    assert failures(["", "", ""]) == ""
    assert failures(["", "full"]) == "rank 1: full"
    assert failures(["x"] * 6).endswith("rank 3: x; and 2 more ranks")


def test_bytes_have_sensible_units() -> None:
    assert [in_words(n) for n in (0, 1000, 4096, 3 << 19, 5 << 30, 1 << 41)] == [
        "0 B", "1000 B", "4.0 KiB", "1.5 MiB", "5.0 GiB", "2.0 TiB",
    ]  # fmt: skip
