"""Files and folders that cannot be read or written are found before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sfcompile.commands.checks import check_folder, check_readable, check_writable
from sfcompile.errors import OptionError


def test_what_can_be_used_passes_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    check_readable(tmp_path / "there", "--show")
    check_writable(tmp_path / "there", "--out")
    check_writable(tmp_path / "new", "--out")
    check_folder(tmp_path, "--out")
    check_folder(tmp_path / "a" / "b", "--out", create=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="--show .*gone is not there"):
        check_readable(tmp_path / "gone", "--show")
    with pytest.raises(OptionError, match="is a folder"):
        check_readable(tmp_path, "--show")
    with pytest.raises(OptionError, match="is a folder"):
        check_writable(tmp_path, "--out")
    with pytest.raises(OptionError, match="gone is not there.*mkdir -p"):
        check_writable(tmp_path / "gone" / "file", "--out")
    with pytest.raises(OptionError, match="is not there"):
        check_folder(tmp_path / "gone", "--out")
    for made in (False, True):
        with pytest.raises(OptionError, match="file is a file"):
            check_folder(tmp_path / "file", "--out", made)
    with pytest.raises(OptionError, match="file is a file"):
        check_folder(tmp_path / "file" / "in it", "--out", create=True)


def test_a_closed_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(OptionError, match="may not be written to"):
        check_folder(tmp_path, "--out")
