"""An attention alone on a device: what the real schedule's rank runs, with nobody else there."""

from __future__ import annotations

import pytest
import torch
from deadline import Deadline
from kernel_ranks import Job, make_site

from sfcompile.codegen.engines import trial
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.kernels.spec import has_tensor_copies, spec_of
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.toolchain.interpreter import interpreting
from sfcompile.errors import RuntimeTimeoutError
from sfcompile.runtime.wires.symmetric_heap import HeapSize

CPU = torch.device("cpu")
KINDS = {"torus": (2, 1, 2, 1), "usp": (1, 2, 1, 2)}
MASKS = [("none", True), ("key", False), ("full", True)]


def schedule_of(kind: str, mask: tuple[str, bool] = ("none", True)) -> AttentionSchedule:
    return Job(kind, *KINDS[kind], make_site([10, 6], 2), mask=mask[0], mask_is_bool=mask[1]).schedule()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("mask", MASKS, ids=[name for name, _ in MASKS])
def test_both_ways_run_time_and_again(kind: str, mask: tuple[str, bool]) -> None:
    schedule = schedule_of(kind, mask)
    with interpreting(Deadline(20.0)):
        for put, run, look in (
            trial.fused(schedule, 1, KernelTarget(CPU), mask),
            trial.library(schedule, 1, CPU, mask),
        ):
            for _ in range(2):
                put()
                run()
                look()


def test_what_is_timed_is_what_the_job_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between machines causal order at head size 128 is not Hopper's kernel, and A100's tile is a smaller one."""
    site = make_site([64, 64], 2, heads=2, head_dim=128, dtype=torch.bfloat16, causal=True)
    schedule, target, plain = Job("torus", 2, 1, 2, 1, site).schedule(), KernelTarget(CPU), ("none", True)
    for arch, alone, apart in ((90, "tma", "threads"), (80, "threads", "threads")):
        monkeypatch.setattr(KernelTarget, "architecture", arch)
        assert (
            trial.tile_in_job(schedule, target, plain, (0, 0)) == trial.tile_in_job(schedule, target, plain, ()) == {}
        )
        tile = trial.tile_in_job(schedule, target, plain, (0, 1))
        assert tile["fetch"] == apart and spec_of(schedule, arch).fetch == (alone if has_tensor_copies() else "threads")
        timed, runs = spec_of(schedule, arch, None, plain, **tile), spec_of(schedule, arch, (0, 1), plain)
        assert timed.with_(reach=runs.reach) == runs
    with interpreting(Deadline(20.0)):
        put, run, look = trial.fused(schedule_of("torus"), 0, KernelTarget(CPU), plain, (0, 1))
        put()
        run()
        look()


def test_a_kernel_that_waited_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without signals the wait ends after its limit, and the look says so."""
    made, random_bank = list[torch.Tensor](), trial._random_bank

    def kept(size: HeapSize, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(random_bank(size, dtype, device))
        return made[-1]

    monkeypatch.setattr(trial, "LIMIT_S", 0.1)
    monkeypatch.setattr(trial, "_random_bank", kept)
    with interpreting(lambda: None):
        _, run, look = trial.fused(schedule_of("torus"), 0, KernelTarget(CPU), ("none", True))
        made[0].zero_()
        run()
        with pytest.raises(RuntimeTimeoutError, match="waited in vain in a trial"):
            look()
