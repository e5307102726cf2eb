"""Safetensors written and read without its library, held against the library."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfcompile.errors import PackageError
from sfcompile.package.tensors import ALIGN, NAMES, map_open, read_tensors, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in NAMES}
    return found | {"wide": torch.randn(16, 16), "turned": torch.randn(4, 6).T, "empty": torch.empty(0, 4)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype and value.shape == b[name].shape
        assert value.contiguous().view(torch.uint8).equal(b[name].contiguous().view(torch.uint8)), name


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return map_open(file, path)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    with (tmp_path / "ours").open("wb") as file:
        write_tensors(file, tensors())
    same(load_file(tmp_path / "ours"), tensors())


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    save_file({name: value.contiguous() for name, value in tensors().items()}, tmp_path / "theirs", {"made": "here"})
    memory = mapped(tmp_path / "theirs")
    same(read_tensors(memory, 0, len(memory), "theirs"), tensors())


def test_every_tensor_lies_on_a_boundary_and_writing_to_it_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ours"
    with path.open("wb") as file:
        write_tensors(file, tensors())
    memory, before = mapped(path), path.read_bytes()
    found = read_tensors(memory, 0, len(memory), "ours")
    assert all(value.data_ptr() % ALIGN == 0 for value in found.values() if value.numel())
    found["wide"].zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:5],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:-1],
        lambda data: data.replace(b'"F32"', b'"F33"'),
        lambda data: data.replace(b'"shape":[16,16]', b'"shape":[16,17]'),
        lambda data: data.replace(b'{"', b"{'", 1),
    ],
)
def test_damage_is_an_error(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "ours"
    with path.open("wb") as file:
        write_tensors(file, tensors())
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    memory = mapped(path)
    with pytest.raises(PackageError, match="not in safetensors' format"):
        read_tensors(memory, 0, len(memory), "ours")


def test_what_cannot_be_read_or_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(PackageError, match="cannot be read"):
        mapped(tmp_path / "empty")
    with (tmp_path / "x").open("wb") as file, pytest.raises(PackageError, match="complex128"):
        write_tensors(file, {"x": torch.zeros(1, dtype=torch.complex128)})
