"""Generated source becomes kernels once; NVSHMEM's state goes where it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfcompile.codegen.toolchain import loader as kernel_loader
from sfcompile.codegen.toolchain.loader import cache_folder, fill_device_state, link_options, load_source, write_source
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
    (tmp_path / "file").write_text("")
    with pytest.raises(CodegenError, match="SFCOMPILE_CACHE"):
        write_source("x = 1\n", tmp_path / "file" / "b.py")


def test_only_kernels_that_call_nvshmem_are_linked_and_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Path("lib.bc")
    assert link_options(library, "peer") == {} == link_options(None, "mixed")
    assert link_options(library, "mixed") == {"extern_libs": {"libnvshmem_device": "lib.bc"}}

    hooks: list[Any] = []
    from triton import knobs

    monkeypatch.setattr(knobs.runtime.kernel_load_end_hook, "add", hooks.append)
    monkeypatch.setattr(kernel_loader, "_filled", [])
    monkeypatch.setattr(kernel_loader, "NVSHMEM_KERNELS", set())
    load_source(SOURCE.replace("def one", "def one_nvshmem"))
    old: list[int] = []
    new: list[int] = []
    fill_device_state(old.append)
    fill_device_state(new.append)
    (hook,) = hooks  # one hook for the process, the last library counts
    hook(17, 1, "one_nvshmem", None, "hash")
    hook(18, 1, "somebody_elses", None, "hash")
    assert old == [] and new == [17]
