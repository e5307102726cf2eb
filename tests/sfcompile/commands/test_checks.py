"""Files and folders that cannot be read or written are found before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sfcompile.commands.checks import check_folder, check_function, check_readable, check_writable
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


def test_a_function_is_looked_for_without_running_its_file(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("import gone\nfrom os import path as kept\ndef make(): ...\nif gone:\n    other = make\n1 / 0\n")
    for name in ("make", "other", "kept"):
        check_function(f"{file}:{name}")
    check_function("package.module:make")  # looked up by the import
    for text, said in (
        (f"{file}:mkae", "Did you mean 'make'"),
        (f"{file}:x", "Its functions: make"),
        (f"{file}", "names no function; .*own.py has make"),
        (f"{file}:", "names no function"),
        (":make", "names no function"),
        (f"{tmp_path}/gone.py:make", "gone.py is not there"),
    ):
        with pytest.raises(OptionError, match=said):
            check_function(text)
    file.write_text("from gone import *\n")
    check_function(f"{file}:anything")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match="is no Python"):
        check_function(f"{file}:make")


def test_a_closed_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(OptionError, match="may not be written to"):
        check_folder(tmp_path, "--out")
