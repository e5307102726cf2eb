"""Generated source becomes kernels once, linked with what they call."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from sfcompile.codegen.toolchain.loader import _temporary_home, cache_folder, link_options, load_source, write_source
from sfcompile.errors import CodegenError

SOURCE = (
    '"""A."""\nimport triton\nimport triton.language as tl\n\n\n@triton.jit\ndef one(x_ptr):\n    tl.store(x_ptr, 1)\n'
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_source_is_loaded_once_per_mode_and_lies_in_the_cache(cache: Path) -> None:
    first = load_source(SOURCE)
    assert load_source(SOURCE) is first and load_source(SOURCE, interpret=True) is not first
    assert cache_folder() == cache
    assert Path(str(first.__file__)).read_text() == SOURCE
    assert [path.name for path in (cache / "source").iterdir()] == [Path(str(first.__file__)).name]


def test_stand_ins_are_not_shared() -> None:
    def call() -> None:
        """Nothing."""

    loaded = load_source(SOURCE, True, {"call": call})
    assert loaded.call is call and load_source(SOURCE, True) is not loaded


def test_writing_again_changes_nothing_and_a_full_disk_is_an_error(tmp_path: Path) -> None:
    path = write_source("x = 1\n", tmp_path / "a" / "b.py")
    before = path.stat().st_mtime_ns
    assert write_source("x = 1\n", path).stat().st_mtime_ns == before
    assert write_source("x = 2\n", path).read_text() == "x = 2\n"
    path.write_bytes(b"\xff\x00")  # damaged: no text at all
    assert write_source("x = 2\n", path).read_text() == "x = 2\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(CodegenError, match="SFCOMPILE_CACHE"):
        write_source("x = 1\n", tmp_path / "file" / "b.py")


def test_only_kernels_that_call_nvshmem_are_linked() -> None:
    library = Path("lib.bc")
    assert link_options(library, "peer") == {} == link_options(None, "mixed")
    assert link_options(library, "mixed") == {"extern_libs": {"libnvshmem_device": "lib.bc"}}


def test_a_user_without_a_home_keeps_files_among_temporary_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in a folder named ~, nor in one that somebody else may write to."""
    monkeypatch.delenv("SFCOMPILE_CACHE")
    monkeypatch.setenv("HOME", "~")  # what expanduser gives where the user is not known
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _temporary_home.cache_clear()
    assert cache_folder() == tmp_path / f"home-of-{os.getuid()}" / ".cache" / "sfcompile"
    (tmp_path / f"home-of-{os.getuid()}").chmod(0o777)
    _temporary_home.cache_clear()
    assert cache_folder() == cache_folder() and cache_folder().parents[1].name.startswith("home-")
    assert cache_folder().parents[1].stat().st_mode & 0o77 == 0
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/sfcompile")
    monkeypatch.setenv("SFCOMPILE_CACHE", "~/mine")
    assert cache_folder() == Path("/home/me/mine")
