"""Where kernels run: what they are linked with, and how many programs move."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_ranks import Job, make_site
from triton.runtime import _allocation

from sfcompile.codegen.engines import target as kernel_target
from sfcompile.codegen.engines.launch import AttendKernel
from sfcompile.codegen.engines.target import INTERPRETED_PROGRAMS, MOVE_PROGRAMS, KernelTarget
from sfcompile.codegen.kernels.chunks import ChunkSpec, send_source
from sfcompile.codegen.toolchain.gpu_results import GpuResult, write_result

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Launches:
    """A kernel that notes its grids and options."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values, **options: self.seen.append((grid, values, options))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_machines_decide_whether_nvshmem_is_linked(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_target, "slim_library", lambda arch: Path(f"sm_{arch}.bc"))
    assert KernelTarget.of(GPU, (0, 0)) == KernelTarget(GPU)
    assert KernelTarget.of(GPU, (0, 1)).library == Path("sm_90.bc")
    assert KernelTarget(GPU).architecture == 90 and KernelTarget(CPU).architecture == 0


def test_launches_have_options_on_gpus_alone() -> None:
    kernel, library = Launches(), Path("nvshmem.bc")
    KernelTarget(CPU).move(kernel, [1], "mixed", maxnreg=9)
    KernelTarget(GPU, library).move(kernel, [1], "mixed", maxnreg=9)
    KernelTarget(GPU, library).move(kernel, [1], "peer")
    linked = {"libnvshmem_device": "nvshmem.bc"}
    assert kernel.seen == [
        ((INTERPRETED_PROGRAMS,), (1,), {}),
        ((MOVE_PROGRAMS,), (1,), {"maxnreg": 9, "extern_libs": linked}),
        ((MOVE_PROGRAMS,), (1,), {}),
    ]


def test_stand_ins_go_to_kernels_that_call_nvshmem(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[tuple[bool, Any]] = []

    def load(source: str, interpret: bool, calls: Any) -> Any:
        loads.append((interpret, calls))
        return SimpleNamespace(send="near", send_nvshmem="far")

    monkeypatch.setattr(kernel_target, "load_source", load)
    target = KernelTarget(CPU, calls={})
    for reach, want in (("peer", "near"), ("mixed", "far")):
        assert target.load(send_source(ChunkSpec(reach)), "send", reach) == want
    assert loads == [(True, None), (True, {})]


def test_tiles_that_gpu_check_found_fastest_are_taken_for_what_it_ran(
    hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    fastest = {"block_m": 64, "block_n": 32, "warps": 4, "stages": 2, "tails": "inside"}

    def schedule(**changes: Any) -> Any:
        site = make_site([8, 8], 2, **{"head_dim": 64, "dtype": torch.bfloat16} | changes)
        return Job("torus", 2, 1, 2, 1, site).schedule()

    none = ("none", True)
    assert KernelTarget(GPU).measured_tile(schedule(), none) == {}
    write_result(GpuResult("A GPU", "2026-12-01", {}, {64: fastest}), tmp_path / "gpu-check")
    assert KernelTarget(GPU).measured_tile(schedule(), none) == fastest
    for other in ({"causal": True}, {"head_dim": 32}, {"dtype": torch.float32}, {"kv_heads": 1}):
        assert KernelTarget(GPU).measured_tile(schedule(**other), none) == {}, other
    assert KernelTarget(GPU).measured_tile(schedule(), ("key", True)) == {}
    assert KernelTarget(CPU).measured_tile(schedule(), none) == {}
    write_result(GpuResult("A GPU", "2026-12-02", {}, {64: fastest | {"fetch": "tma"}}), tmp_path / "gpu-check")
    assert KernelTarget(GPU).measured_tile(schedule(), none) == {}  # that one is taken where chunks are long enough


def test_memory_that_a_kernel_keeps_comes_from_torch_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's own allocator of Triton's is the one it was after the launch."""
    allocators: list[Any] = []

    def own(size: int, alignment: int, stream: int | None) -> Any:
        raise AssertionError

    monkeypatch.setattr(_allocation, "_allocator", ContextVar("_allocator", default=own))
    monkeypatch.setattr(KernelTarget, "interpreted", False)
    KernelTarget(CPU).with_scratch(lambda: allocators.append(_allocation._allocator.get()))
    assert _allocation._allocator.get() is own and allocators[0] is not own
    assert allocators[0](256, 128, None).numel() == 256


def test_a_measured_tile_is_the_kernels_and_what_is_set_by_hand_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Job("torus", 2, 1, 2, 1, make_site([8, 8], 2)).schedule()
    monkeypatch.setattr(KernelTarget, "measured_tile", lambda *given: {"block_m": 32, "block_n": 16})
    spec = AttendKernel(schedule, 0, KernelTarget(CPU)).spec
    assert (spec.block_m, spec.block_n) == (32, 16)
    assert AttendKernel(schedule, 0, KernelTarget(CPU), block_n=64).spec.block_n == 64
    assert AttendKernel(schedule, 0, KernelTarget(CPU), (0, 1)).spec.block_m != 32  # gpu-check times one machine
