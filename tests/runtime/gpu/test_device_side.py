"""GPU ranks end to end without GPUs: symmetric memory, credits and epochs on the device, heaps that grow."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import device_workers
import pytest
import torch
from emulated_nvshmem import Library
from processes import run_outcomes, run_processes
from threads import run_threads

from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.engines.transfers import ReleaseKernel, WaitKernel
from sfcompile.errors import HeapError, StreamFusionError
from sfcompile.runtime.gpu.device_side import NvshmemSide
from sfcompile.runtime.gpu.nvshmem import Nvshmem
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import current_session
from sfcompile.runtime.wires.symmetric_heap import HeapSize

pytestmark = pytest.mark.ranks


# Peer stores and calls beside each other from the host, and calls from kernels; four ranks that interpret kernels take
# long, and tests/benchmarks/test_virtual_ranks.py has them in one launch.
QUICK = [((0, 1), True), ((0, 0, 1, 1), False)]
CELLS = [
    pytest.param(
        machine_of, kernels, id=f"{name}-{'kernels' if kernels else 'host calls'}",
        marks=[] if (machine_of, kernels) in QUICK else pytest.mark.thorough,
    )
    for name, machine_of in {"one machine": (0, 0), "two": (0, 1), "two of two": (0, 0, 1, 1)}.items()
    for kernels in (True, False)
]  # fmt: skip


@pytest.mark.parametrize(("machine_of", "kernels"), CELLS)
def test_attention_and_gather_on_a_symmetric_heap(machine_of: tuple[int, ...], kernels: bool) -> None:
    """Uneven chunks, masks or causal, one rank late; the heap grows in between, and an older program runs again."""
    results = run_processes(len(machine_of), device_workers.run, (5, kernels, 3, 1), machine_of)
    for result in results:
        assert result["error"] < 1e-5 and result["same"]
        assert result["names"] == []
    assert results[0]["domains"] == tuple(machine_of.index(machine) for machine in machine_of)


@pytest.mark.parametrize(("machine_of", "kernels"), CELLS)
def test_weights_in_shares_come_over_a_symmetric_heap(machine_of: tuple[int, ...], kernels: bool) -> None:
    results = run_processes(len(machine_of), device_workers.weights_in_shares, (kernels,), machine_of)
    for result in results:
        assert result["error"] < 1e-5 and result["programs"] == 2
    assert sum(result["rows"] for result in results) == 32


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "host calls"])
def test_ranks_in_other_calls_are_told(kernels: bool) -> None:
    """Signals carry tags: no picture of two calls without a word, and no call after that either."""
    for _, told, afterwards in run_processes(2, device_workers.in_other_calls, (kernels,), (0, 0)):
        assert told.startswith("RankMismatchError") and "of another call" in told
        assert "GPU ranks cannot start afresh" in afterwards


MISSING = [
    ("killed", True), pytest.param("raises", True, marks=pytest.mark.thorough), ("asleep", True),
    ("killed", False), pytest.param("raises", False, marks=pytest.mark.thorough),
    pytest.param("asleep", False, marks=pytest.mark.thorough),
]  # fmt: skip


@pytest.mark.parametrize(("how", "kernels"), MISSING)
def test_a_missing_peer_is_a_clear_error_in_time(how: str, kernels: bool, tmp_path: Path) -> None:
    """Kernels, or the stream, wait for it: they end because the watchdog hears of it, or after their 3 s."""
    outcomes = run_outcomes(3, device_workers.loses_a_peer, (1, how, kernels, tmp_path), (0, 0, 1))
    survivors = [outcomes[0].value, outcomes[2].value]
    assert None not in survivors, outcomes
    if how == "asleep":  # the times of both are up at once: who looks later may hear of it from the other
        assert any(told.startswith("RuntimeTimeoutError") for told, _ in survivors), survivors
    for told, seconds in survivors:
        if how == "asleep":
            heard = told.startswith("PeerFailedError") and "another rank failed first" in told
            assert heard or told.startswith("RuntimeTimeoutError"), told
            assert "from rank 1 did not come" in told and "waited 3 s" in told, told
            assert not kernels or "a kernel of" in told, told
        else:
            assert seconds < 60.0, told  # they heard of it: their kernels alone would have waited so long
            assert told.startswith("PeerFailedError") and "rank 1: " in told, told
            assert ("its process" if how == "killed" else "the victim's own mistake") in told, told


@pytest.mark.parametrize("machine_of", [(0, 0), (0, 0, 1)], ids=["one machine", "two"])
def test_puts_that_compute_what_they_send(machine_of: tuple[int, ...]) -> None:
    """Norms and RoPE in the put kernels of q and k; v is a cat of two inputs. By peer stores, and by both ways."""
    results = run_processes(len(machine_of), device_workers.fused, (), machine_of)
    for result in results:
        assert max(result["errors"]) < 1e-5, result["errors"]
        assert result["fused"] == (3, 3) and result["order"] == results[0]["order"]


def test_sites_that_end_in_the_other_order_and_gathers_side_by_side() -> None:
    """Graphs as the passes make them for GPUs, twice each, over the session's device side."""
    for result in run_processes(2, device_workers.graphs_out_of_order, (), (0, 0)):
        assert max(result["errors"].values()) < 1e-5, result["errors"]
        assert result["other order"] and result["two gathers"]  # what this is about does happen


def test_replays_that_no_host_counts_and_calls_that_the_host_numbers() -> None:
    """Two models on one heap: the second one's calls go on from where the first one's CUDA graph has got to."""
    for result in run_processes(2, device_workers.beside_replays, (), (0, 0)):
        assert result["error"] < 1e-5 and result["behind"] > 2 and result["grown"]


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "host calls"])
def test_without_room_for_a_larger_heap_the_old_programs_go_on(kernels: bool) -> None:
    """The old heap was given back to make room: what ran on it runs on another one like it."""
    for said, error in run_processes(2, device_workers.without_room, (kernels,), (0, 0)):
        assert len(said) == 2 and all("NVSHMEM_SYMMETRIC_SIZE" in text for text in said), said
        assert error < 1e-5


def test_a_side_that_does_not_start_leaves_no_thread() -> None:
    library, told = Library(0, lambda: None, lambda pe: True), list[bool]()
    nvshmem = Nvshmem(0, 1, torch.device("cpu"), lambda value, doing: [value], (library, library))

    def refuses(address: int, pe: int) -> int:
        raise RuntimeError("Status code 7")

    nvshmem.num_ranks, library.ptr = 2, refuses  # type: ignore[method-assign]
    topology, kernels = Topology.grid(1, 1), cast(Any, None)
    before = threading.active_count()
    with pytest.raises(HeapError, match="NVSHMEM does not start on rank 0: Status code 7"):
        NvshmemSide(nvshmem, topology, lambda value, doing: [value], kernels, 5.0, lambda: None, told.append)
    assert threading.active_count() == before


def _kernels(domains: Sequence[int]) -> tuple[ReleaseKernel, WaitKernel]:
    target = KernelTarget(torch.device("cpu"))
    return ReleaseKernel(0, 1, target, domains), WaitKernel(0, target)


def test_the_end_waits_for_no_rank_that_has_gone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was heard of: nothing is tried. One that went without a word: the limit ends it, once."""
    for notice in (None, "rank 1: its process has ended"):
        library = Library(0, lambda: None, lambda pe: True)
        nvshmem = Nvshmem(0, 1, torch.device("cpu"), lambda value, doing: [value], (library, library), limit_s=0.1)
        told, ended = list[bool](), threading.Event()
        side = NvshmemSide(
            nvshmem, Topology.grid(1, 1), lambda value, doing: [value], _kernels, 5.0, lambda: None, told.append
        )
        side.make_heap(HeapSize(1, 4096, 1), 0)
        monkeypatch.setattr(library, "free_tensor", lambda tensor, ended=ended: ended.wait(5.0))
        if notice is not None:
            side.abort(notice)
        side.close(False)
        ended.set()
        assert told == [notice is not None] and not library.finalized
    assert caplog.text.count("leaves NVSHMEM alone") == 1


def test_a_heap_that_captured_graphs_read_is_kept() -> None:
    """Replays go on in the old one; else the memory is given back when the heap grows."""
    for captured in (False, True):
        library = Library(0, lambda: None, lambda pe: True)
        nvshmem = Nvshmem(0, 1, torch.device("cpu"), lambda value, doing: [value], (library, library))

        topology, told = Topology.grid(1, 1), list[bool]()
        side = NvshmemSide(nvshmem, topology, lambda value, doing: [value], _kernels, 5.0, lambda: None, told.append)
        side.make_heap(HeapSize(1, 4096, 1), 0)
        assert side._runs is not None
        side._runs.captured = captured
        side.make_heap(HeapSize(1, 8192, 1), 4)
        assert len(library._mapped) == (2 if captured else 1)
        side.begin(7)
        for runs in (*(runs for _, runs in side._kept), side._runs):
            assert int(runs._counter[1]) & 7 == 7  # signals of replays hold the call's tag too
        side.close(False)
        assert library.finalized and not library._mapped and told == [False]


def test_memory_that_one_rank_lacks_is_the_end_of_nvshmems_on_all() -> None:
    """What the others got lies at an offset that is still free there: a further heap would lie at different places, and
    puts into it would fall upon something else. So there is none, and nothing is given back alone."""
    meet = threading.Barrier(2)

    def work(rank: int) -> bool:
        share, told = current_session().exchange, list[bool]()
        library = Library(rank, lambda: meet.wait(20.0), lambda pe: True)
        nvshmem = Nvshmem(rank, 2, torch.device("cpu"), share, (library, library))
        side = NvshmemSide(nvshmem, Topology.grid(1, 2), share, _kernels, 5.0, lambda: None, told.append)
        side.make_heap(HeapSize(1, 4096, 2), 0)
        whole = library.tensor

        def tensor(shape: tuple[int], dtype: torch.dtype) -> torch.Tensor:
            memory = whole(shape, dtype)
            if rank == 1:
                raise RuntimeError("Status code 3")
            return memory

        library.tensor = tensor  # type: ignore[method-assign]
        for said in ("Status code 3", "NVSHMEM has no more memory to give: before, on some ranks and not on others"):
            with pytest.raises(StreamFusionError, match=said) as caught:
                side.make_heap(HeapSize(1, 8192, 2), 4)
            assert caught.value.on_every_rank and side.size is None
            library.tensor = whole  # type: ignore[method-assign]
        side.close(False)
        return told == [True] and not library.finalized

    assert run_threads(2, work) == [True, True]
