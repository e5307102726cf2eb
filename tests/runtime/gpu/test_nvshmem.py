"""NVSHMEM's start, symmetric heaps, domains; the library is emulated (tests/support/emulated_nvshmem.py), or the real
one, which starts without a GPU and then has no memory."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import nvshmem_workers
import pytest
import torch
from emulated_nvshmem import Library
from processes import run_outcomes
from threads import run_threads

from sfcompile.codegen.toolchain.nvshmem_bitcode import wheel
from sfcompile.errors import HeapError, StreamFusionError, UnsupportedError
from sfcompile.runtime.gpu import nvshmem
from sfcompile.runtime.gpu.nvshmem import Nvshmem, NvshmemHeap, domains_of
from sfcompile.runtime.rank.session import current_session
from sfcompile.runtime.wires.symmetric_heap import HeapSize

CPU = torch.device("cpu")
IBGDA_IS_ON = "NVSHMEM_IB_ENABLE_IBGDA=1 in the environment"


def alone(value: Any, doing: str) -> list[Any]:
    return [value]


def started() -> tuple[Nvshmem, Library]:
    library = Library(0, lambda: None, lambda pe: True)
    return Nvshmem(0, 1, CPU, alone, (library, library)), library


def test_one_pe_with_a_heap() -> None:
    pe, library = started()
    assert pe.version() == "3.4.5" and library.job
    size = HeapSize(2, 256, 1)
    heap = NvshmemHeap(pe, size, (0,), alone)
    assert heap.table.tolist() == [[heap.address, 0, heap.address]] and heap.domains == (0,)
    assert not heap.chunk(0, 0, (64,), torch.float32).any()  # zeroed, whatever was there
    heap.chunk(1, 16, (2, 3), torch.int32).fill_(7)
    heap.words(size.credits_at, 1).fill_(5)
    assert heap._memory.view(torch.int64)[size.credits_at // 8] == 5
    start = size.bank_at(1) + 16
    assert heap._memory[start : start + 24].view(torch.int32).tolist() == [7] * 6
    heap.close()
    pe.close()
    assert library.finalized


@pytest.mark.parametrize(
    ("reached", "machine_of", "domains"),
    [
        ([[1, 1], [1, 1]], (0, 0), (0, 0)),
        ([[1, 1], [1, 1]], (0, 1), (0, 1)),
        ([[1, 0], [1, 1]], (0, 0), (0, 1)),
        ([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], (0, 0, 1, 1), (0, 0, 2, 2)),
        ([[1, 1, 0], [1, 1, 1], [0, 1, 1]], (0, 0, 0), (0, 1, 2)),
    ],
)
def test_domains(reached: list[list[int]], machine_of: tuple[int, ...], domains: tuple[int, ...]) -> None:
    assert domains_of([list(map(bool, row)) for row in reached], machine_of) == domains


def test_missing_packages_are_named_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvshmem", None)
    monkeypatch.setitem(sys.modules, "nvshmem.core", None)
    monkeypatch.setitem(sys.modules, "nvshmem.bindings", None)
    with pytest.raises(UnsupportedError, match="pip install nvshmem4py-cu13"):
        nvshmem.load()
    with pytest.raises(UnsupportedError, match="needs nvshmem4py"):
        Nvshmem(0, 1, CPU, alone)
    library = Library(0, lambda: None, lambda pe: True)
    with pytest.raises(UnsupportedError, match="rank 1: it is missing there"):
        Nvshmem(0, 2, CPU, lambda value, doing: [None, ("it is missing there", "", "")], (library, library))


def test_a_library_that_is_not_found_is_told_as_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvshmem4py is there and its libraries are not: it raises a RuntimeError, of several lines."""
    (tmp_path / "nvshmem").mkdir()
    (tmp_path / "nvshmem" / "__init__.py").write_text("raise RuntimeError('libnvshmem_host.so.3\\n not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "nvshmem"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UnsupportedError, match=r"cannot be imported \(libnvshmem_host.so.3 not found\)"):
        nvshmem.load()


@pytest.mark.parametrize("value", ["1", "true", "Y", "on", ""])
def test_network_cards_driven_by_kernels_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """3.4.5's bitcode has no code for it: puts would get lost. On every rank, if one asks for it."""
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", value)
    with pytest.raises(UnsupportedError, match="Unset NVSHMEM_IB_ENABLE_IBGDA"):
        started()
    monkeypatch.delenv("NVSHMEM_IB_ENABLE_IBGDA")
    library = Library(0, lambda: None, lambda pe: True)
    with pytest.raises(UnsupportedError, match=f"rank 1: {IBGDA_IS_ON}"):
        Nvshmem(0, 2, CPU, lambda value, doing: [None, (IBGDA_IS_ON, "", "")], (library,) * 2)
    for harmless in ("0", "false", "no"):
        monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", harmless)
        started()


def start_fails_on_the_other(value: Any, doing: str) -> list[Any]:
    told = ("NVSHMEM does not start on rank 1: Status code 7", "", "")
    return [value, told if doing == "start NVSHMEM" else value]


def test_a_library_that_does_not_start_or_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Status code 7")

    library = Library(0, lambda: None, lambda pe: True)
    monkeypatch.setattr(library, "init", fails)
    with pytest.raises(HeapError, match="does not start on rank 0: Status code 7"):
        Nvshmem(0, 1, CPU, alone, (library, library))
    with pytest.raises(UnsupportedError, match="rank 1: NVSHMEM does not start on rank 1: Status code 7"):
        Nvshmem(0, 2, CPU, start_fails_on_the_other, (Library(0, lambda: None, lambda pe: True),) * 2)
    monkeypatch.setattr(library, "init", lambda **kwargs: time.sleep(1.0))
    with pytest.raises(HeapError, match="does not start on rank 0: no answer within 0.1 s"):
        Nvshmem(0, 1, CPU, alone, (library, library), limit_s=0.1)
    monkeypatch.setattr(library, "get_unique_id", fails)
    with pytest.raises(HeapError, match="does not start on rank 0: Status code 7"):
        Nvshmem(0, 1, CPU, alone, (library, library))
    silent = Library(0, lambda: None, lambda pe: True)
    monkeypatch.setattr(silent, "get_version", fails)
    with pytest.raises(HeapError, match="does not start on rank 0: Status code 7"):
        Nvshmem(0, 1, CPU, alone, (silent, silent))
    pe, library = started()
    monkeypatch.setattr(library, "tensor", fails)
    with pytest.raises(HeapError, match="NVSHMEM_SYMMETRIC_SIZE"):
        pe.allocate(1 << 20)


def test_a_rank_that_does_not_come_holds_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """To make memory, to give it back, or to leave."""
    library = Library(0, lambda: None, lambda pe: True)
    pe = Nvshmem(0, 1, CPU, alone, (library, library), limit_s=0.1)
    memory = pe.allocate(64)
    library.free_tensor = lambda tensor: time.sleep(1.0)  # type: ignore[method-assign]
    with pytest.raises(HeapError, match=r"is not given back \(no answer within 0.1 s\)"):
        pe.free(memory)
    library.tensor = lambda *args, **kwargs: time.sleep(1.0)  # type: ignore[method-assign]
    with pytest.raises(HeapError, match=r"cannot be had from NVSHMEM \(no answer within 0.1 s\)"):
        pe.allocate(64)
    library.finalize = lambda: time.sleep(1.0)  # type: ignore[method-assign]
    pe.close()
    assert "rank 0 leaves NVSHMEM alone: no answer within 0.1 s" in caplog.text


@pytest.mark.parametrize("how", ["before", "after", "everywhere"])
def test_memory_is_had_on_every_rank_or_on_none(how: str) -> None:
    """On rank 1, before the others come or behind them: each is told why, and by whom. On all ranks: no harm."""
    meet = threading.Barrier(2)

    def work(rank: int) -> bool:
        library = Library(rank, lambda: meet.wait(5.0), lambda pe: True)
        pe = Nvshmem(rank, 2, CPU, current_session().exchange, (library, library), limit_s=0.5)
        whole = library.tensor

        def tensor(shape: tuple[int], dtype: torch.dtype) -> torch.Tensor:
            if how == "everywhere" or (how == "before" and rank == 1):
                raise RuntimeError("Status code 2")
            memory = whole(shape, dtype)
            if rank == 1:
                raise RuntimeError("Status code 2")
            return memory

        library.tensor = tensor  # type: ignore[method-assign]
        with pytest.raises(StreamFusionError, match="Status code 2") as caught:
            pe.allocate(64)
        assert caught.value.on_every_rank and (rank == 1 or how == "everywhere" or "rank 1: " in caught.value.what)
        library.tensor = whole  # type: ignore[method-assign]
        if how == "everywhere":
            pe.give_back(pe.allocate(64))
            return not pe.broken and not library._mapped
        with pytest.raises(HeapError, match="no more memory to give"):
            pe.allocate(64)
        return bool(pe.broken)

    assert run_threads(2, work) == [True, True]


def test_what_one_rank_does_not_give_back_is_an_error_on_all() -> None:
    def work(rank: int) -> bool:
        library = Library(rank, barrier.wait, lambda pe: True)
        pe = Nvshmem(rank, 2, CPU, current_session().exchange, (library, library))
        memory = pe.allocate(64)
        if rank == 1:
            library.free_tensor = lambda tensor: 1 // 0  # type: ignore[method-assign,assignment,return-value]
        with pytest.raises(StreamFusionError, match="is not given back .*by zero"):
            pe.give_back(memory)
        return bool(pe.broken)

    barrier = threading.Barrier(2)
    assert run_threads(2, work) == [True, True]


RELEASE = (wheel() or ("", "3.4.5", Path()))[1]
NO_MEMORY = "a symmetric heap of 0.1 MiB per rank cannot be had from NVSHMEM"
REAL = {  # by what is wrong: what every rank that is left says
    # 3.4.5 starts without a GPU. 3.7.2, which torch's CUDA build needs from 2.15 on, asks the driver first.
    "well": ["3.4.5", NO_MEMORY] if RELEASE == "3.4.5" else ["NVSHMEM does not start on rank"],
    "other release": [f"the ranks have several releases of NVSHMEM: rank 0 {RELEASE}, rank 1 3.8.0"],
    "IBGDA": [IBGDA_IS_ON],
    "no interface": ["NVSHMEM does not start on rank 0"],
    "killed": ["rank 1"],
}


@pytest.mark.ranks
@pytest.mark.parametrize(
    "how", ["well", "killed", *(pytest.param(how, marks=pytest.mark.thorough) for how in list(REAL)[1:4])]
)
def test_the_real_library_starts_on_two_ranks_or_on_none(how: str) -> None:
    outcomes = run_outcomes(2, nvshmem_workers.starts, (how,), timeout_s=60.0)
    for outcome in outcomes[:1] if how == "killed" else outcomes:
        assert outcome.error is None and outcome.value is not None, outcome
        assert len(outcome.value) == len(REAL[how]), outcome.value
        for said, expected in zip(outcome.value, REAL[how], strict=True):
            assert expected in said, outcome.value
