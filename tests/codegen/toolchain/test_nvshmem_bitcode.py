"""NVSHMEM's device code: versions that work together, the cut library."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfcompile.codegen.toolchain import nvshmem_bitcode
from sfcompile.codegen.toolchain.nvshmem_bitcode import device_library, refuse_pair, slim_library, wheel
from sfcompile.codegen.toolchain.nvshmem_calls import SYMBOLS
from sfcompile.errors import CodegenError


@pytest.mark.parametrize(("triton", "nvshmem"), [("3.6.0", "3.4.5"), ("3.9.0", "3.4.5"), ("3.9.1", "3.8.0")])
def test_pairs_that_work(triton: str, nvshmem: str) -> None:
    refuse_pair(triton, nvshmem)


@pytest.mark.parametrize(("triton", "nvshmem"), [("3.6.0", "3.8.0"), ("3.8.1", "3.9.2"), ("3.9.0", "3.3.24")])
def test_pairs_that_cannot_work_say_what_to_install(triton: str, nvshmem: str) -> None:
    with pytest.raises(CodegenError, match="pip install nvidia-nvshmem-cu13==3.4.5"):
        refuse_pair(triton, nvshmem)


@pytest.mark.thorough  # test_compiler.py links kernels with it
def test_the_cut_library_is_small_whole_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFCOMPILE_CACHE", str(tmp_path))
    found = wheel()
    assert found is not None and found[1].startswith("3.")
    path = slim_library(90)
    assert 1000 < path.stat().st_size < device_library(90).stat().st_size / 20
    names = path.read_bytes()
    assert all(symbol.encode() in names for symbol, _, _ in SYMBOLS.values())
    before = path.stat().st_mtime_ns
    assert slim_library(90) == path and path.stat().st_mtime_ns == before
    for damage in (names[:-100], bytes(len(names)), b""):
        path.write_bytes(damage)
        assert slim_library(90).read_bytes() == names
    with pytest.raises(CodegenError, match="lacks nvshmem_no_such_function"):
        slim_library(90, ["nvshmem_no_such_function"])


def test_no_library_and_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvshmem_bitcode, "wheel", lambda: None)
    with pytest.raises(CodegenError, match="not installed"):
        device_library(90)
    monkeypatch.setenv("SFCOMPILE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(nvshmem_bitcode, "wheel", lambda: ("nvidia-nvshmem-cu13", "3.4.5", tmp_path))
    with pytest.raises(CodegenError, match="no device bitcode for sm_90"):
        device_library(90)
    (tmp_path / "lib" / "libnvshmem_device_sm_90.bc").write_bytes(b"not bitcode")
    with pytest.raises(CodegenError, match="cannot read"):
        slim_library(90)


def test_a_host_library_of_another_release_than_the_device_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = ("nvidia-nvshmem-cu13", "3.4.5", Path("/wheel"))
    monkeypatch.setattr(nvshmem_bitcode, "wheel", lambda: installed)
    nvshmem_bitcode.refuse_other_host("3.4.5")
    with pytest.raises(CodegenError, match=r"loaded is 3.8.0, and the device library in /wheel is 3.4.5"):
        nvshmem_bitcode.refuse_other_host("3.8.0")
