"""Regular files only; what is written appears whole or not at all."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from sfcompile.errors import PackageError
from sfcompile.package.disk import beside, file_hash, open_regular, writing


def test_only_regular_files_are_opened_and_nothing_blocks(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(tmp_path / "socket"))
        for name, kind in (
            ("fifo", "a FIFO"),
            (".", "a folder"),
            ("socket", "No such device|socket"),
            ("no", "No such"),
        ):
            with pytest.raises(PackageError, match=f"cannot be read: .*({kind})"):
                open_regular(tmp_path / name)
    with pytest.raises(PackageError, match="it is a device"):
        open_regular(Path("/dev/zero"))
    with pytest.raises(PackageError, match="cannot be read"):
        open_regular(Path("a\0b"))


def test_links_are_followed_where_the_user_wrote_the_path_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"abc" and len(file_hash(file)) == 64
    with pytest.raises(PackageError, match="it is a symbolic link"):
        open_regular(tmp_path / "link", follow=False)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(PackageError, match="round in a circle"):
        open_regular(tmp_path / "loop")


@pytest.mark.parametrize("name", ["../w", "/etc/passwd", "a/b", "", ".", "..", "a\0", None, 3])
def test_a_package_names_files_of_its_own_folder_only(tmp_path: Path, name: object) -> None:
    assert beside(tmp_path / "p.sf", "w") == tmp_path / "w"
    with pytest.raises(PackageError, match="names its weights"):
        beside(tmp_path / "p.sf", name)


def test_a_file_appears_whole_and_a_link_at_its_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"important")
    (tmp_path / "out").symlink_to(tmp_path / "victim")
    with writing(tmp_path / "out") as file:
        file.write(b"new")
        assert (tmp_path / "out").read_bytes() == b"important"
    assert (tmp_path / "out").read_bytes() == b"new" and not (tmp_path / "out").is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"important" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_nothing_is_left_of_what_failed(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), writing(tmp_path / "out") as file:
        file.write(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_its_numbers(tmp_path: Path) -> None:
    with pytest.raises(
        PackageError, match=r"out cannot be written: .*No space.*; 1,048,576 bytes were written, [\d,]+ are free there"
    ):
        with writing(tmp_path / "out") as file:
            file.write(bytes(2**20))
            file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_only_a_name_that_is_free_or_a_files_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name, why in (("folder", "it is a folder"), ("fifo", "it is a FIFO"), ("a\0b", "holds a NUL")):
        with pytest.raises(PackageError, match=why), writing(tmp_path / name):
            raise AssertionError("it was opened")
    for nowhere in (Path("/dev/null"), Path("")):
        with pytest.raises(PackageError, match="cannot be written"), writing(nowhere):
            raise AssertionError("it was opened")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "folder"]


def test_a_disk_that_lets_nothing_be_removed_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(PackageError, match="Input/output error"), writing(tmp_path / "out"):
        raise OSError(errno.EIO, "Input/output error")
