"""torch's symmetric memory as the stores see it; the library is emulated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfcompile.errors import HeapError, UnsupportedError
from sfcompile.runtime.gpu import symmetric
from sfcompile.runtime.gpu.symmetric import TorchMemory, memory_maker
from sfcompile.runtime.program.topology import Topology

CPU = torch.device("cpu")


class Library:
    """torch.distributed._symmetric_memory of a machine with ranks 2 and 3."""

    def __init__(self, error: Exception | None = None, at: str = "") -> None:
        self.error, self.at = error, at

    def empty(self, nbytes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if self.at == "empty" and self.error is not None:
            raise self.error
        return torch.full((nbytes,), 7, dtype=dtype)

    def rendezvous(self, memory: torch.Tensor, group: str) -> Any:
        if self.at == "rendezvous" and self.error is not None:
            raise self.error
        assert group == "machine 1" and not memory.any()
        return self

    def get_buffer(self, place: int, sizes: tuple[int], dtype: torch.dtype, offset: int) -> torch.Tensor:
        return torch.full(sizes, place, dtype=dtype)


def memory(monkeypatch: pytest.MonkeyPatch, library: Library) -> TorchMemory:
    monkeypatch.setattr(symmetric, "symmetric_memory", lambda: library)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return TorchMemory(64, 3, 4, [2, 3], SimpleNamespace(group_name="machine 1"), CPU)


def test_neighbours_are_reached_by_their_rank_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    made = memory(monkeypatch, library)
    near = made.segments[2]
    assert made.segments[:2] == [None, None] and near is not None and near.tolist() == [0] * 64
    assert not made.segments[3].any()  # type: ignore[union-attr]  # its own, zeroed


def test_what_torch_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="rank 3's machine do not map each other's memory: no peer access"):
        memory(monkeypatch, Library(RuntimeError("no peer access\nat CUDASymmetricMemory.cu"), "rendezvous"))
    with pytest.raises(UnsupportedError, match="does not support device type cpu"):
        memory(monkeypatch, Library(RuntimeError("SymmetricMemory does not support device type cpu"), "empty"))
    with pytest.raises(HeapError, match="0.0 MiB of symmetric memory cannot be had"):
        memory(monkeypatch, Library(torch.OutOfMemoryError("out of memory"), "empty"))


def test_machines_of_one_rank_need_none() -> None:
    with pytest.raises(UnsupportedError, match="no machine has two ranks") as failed:
        memory_maker(0, Topology((0, 1)), [0, 1], CPU, 1.0)
    assert failed.value.on_every_rank
