"""Sessions, engines and streams of whole jobs, their kernels run from PTX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from device_workers import joint_attention
from random_sites import random_case, rows
from rank_workers import attend_and_gather, schedules_of
from torch import fx

from ptx.capture import Capture, follow_inductor
from ptx.driver import MachineTarget
from ptx.job import MachineJob
from sfcompile.capture.graph import capture
from sfcompile.codegen.engines.device_engine import KernelEngine
from sfcompile.codegen.engines.launch import mask_kind
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.lowering.inner import run_inner
from sfcompile.options import Options
from sfcompile.passes.runner import Compiled, run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.gpu.device_side import NvshmemSide
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import Session

pytestmark = pytest.mark.thorough


def engines_of(
    schedules: Sequence[Schedule],
    rank: int,
    target: MachineTarget,
    side: NvshmemSide,
    mask: torch.Tensor | None = None,
) -> list[KernelEngine]:
    """Of a case's sites, for its kind of mask."""
    return [KernelEngine(schedule, rank, target, side.domains, [mask_kind(mask)]) for schedule in schedules]


def calls_of(seeds: tuple[int, ...], ranks: int, calls: int) -> object:
    """Attention and gather of random cases, one after the other; a larger one makes the heap grow."""

    def work(session: Session, target: MachineTarget, side: NvshmemSide) -> float:
        errors, rank = [], session.rank
        for seed in seeds:
            case = random_case(seed, torch.float16, ranks)
            schedules = schedules_of(case)
            session.load(f"p{seed}", schedules, engines_of(schedules, rank, target, side, case.mask))
            ticket = torch.zeros(1, dtype=torch.int64)
            for _ in range(calls):
                whole, ticket = attend_and_gather(case, rank, ticket, f"p{seed}")
                errors.append(float((whole.double() - case.expected).abs().max() / case.expected.abs().max()))
        return max(errors)

    return work


@pytest.mark.parametrize(
    ("machine_of", "arch", "seeds"),
    [
        pytest.param((0, 0), 80, (5,), marks=pytest.mark.thorough),
        pytest.param((0, 0, 1), 80, (3, 4, 3), marks=pytest.mark.thorough),
    ],
)
def test_calls(machine_of: tuple[int, ...], arch: int, seeds: tuple[int, ...]) -> None:
    job = MachineJob(machine_of, arch)
    errors = job.run(calls_of(seeds, len(machine_of), 2))  # type: ignore[arg-type]
    assert job.world.races() == []
    assert max(errors) < 4e-3, errors


def test_captured_calls_are_replayed() -> None:
    """Epochs are counted on the device: two calls captured once, played three times on other values."""

    def work(session: Session, target: MachineTarget, side: NvshmemSide) -> tuple[float, int]:
        case = random_case(5, torch.float16, 2)
        schedules = schedules_of(case)
        session.load("p", schedules, engines_of(schedules, session.rank, target, side, case.mask))
        q, k, v = (x.clone() for x in case.shard(session.rank))

        def call() -> torch.Tensor:
            for name, x in (("k", k), ("q", q), ("v", v)):
                session.put("p", 0, f"put_{name}", x)
            session.attend("p", 0, case.mask, [q, k, v])
            out = session.output("p", 0)
            assert out is not None
            session.collect("p", 0, out)
            return out

        call()
        assert target.driver is not None
        with Capture(target.driver) as capture:
            outs = [call(), call()]
        mine = rows(case.site.q_positions[session.rank])
        worst = 0.0
        for factor in (1.0, -0.5, 2.0):
            v.copy_(case.shard(session.rank)[2] * factor)
            for out in outs:
                out.fill_(torch.nan)
            capture.replay()
            want = case.expected[:, :, mine] * factor
            worst = max(worst, *(float((out.double() - want).abs().max()) for out in outs if want.numel()))
        return worst, capture.launches

    job = MachineJob((0, 0))
    errors, launches = zip(*job.run(work), strict=True)
    assert max(errors) < 1e-2 and min(launches) == 2 * 6
    assert job.world.races() == []


def joint() -> tuple[Any, list[torch.Tensor], list[Compiled]]:
    """A joint attention with norms and RoPE: captured, its inputs, and what the passes leave for each of two ranks."""
    torch.manual_seed(0)
    tables = (torch.randn(1, 14, 1, 16), torch.randn(1, 14, 1, 16))
    inputs = [torch.randn(1, 10, 32), torch.randn(1, 4, 32), *(torch.randn(32, 32) for _ in range(4))]
    inputs += [torch.randn(16), torch.randn(16), *tables]
    whole = capture(fx.symbolic_trace(joint_attention), inputs)
    asked = Asked(shard_everything=True, split_batch=False, parts=(), kernels=True, fuse_puts=True, late_reads=True)
    graphs = [run_pipeline(State(whole.gm, whole.mode, Topology((0, 0)), rank, asked)) for rank in range(2)]
    assert all(graph.report.fused_puts for graph in graphs)
    return whole, inputs, graphs


def test_a_compiled_graph_with_fused_puts() -> None:
    """Against the whole graph."""
    whole, inputs, graphs = joint()
    want = whole.gm(*inputs)[0]

    def work(session: Session, target: MachineTarget, side: NvshmemSide) -> float:
        ((program, schedules),) = graphs[session.rank].programs.items()
        session.load(program, schedules, engines_of(schedules, session.rank, target, side))
        with torch.no_grad():
            outs = [graphs[session.rank].gm(*inputs)[0] for _ in range(3)]
        return max(float((out - want).abs().max() / want.abs().max()) for out in outs)

    job = MachineJob((0, 0))
    assert max(job.run(work)) < 1e-5
    assert job.world.races() == []


def test_inductors_graph_is_captured_and_replayed() -> None:
    """Inductor's loops and memory between the ranks' kernels: once, then recorded, then replayed on other inputs."""
    whole, inputs, graphs = joint()
    with follow_inductor(), torch.no_grad():
        local = [run_inner(graph.gm, inputs, whole.mode, Options(inner="inductor")) for graph in graphs]

    def work(session: Session, target: MachineTarget, side: NvshmemSide) -> tuple[float, int, int]:
        ((program, schedules),) = graphs[session.rank].programs.items()
        session.load(program, schedules, engines_of(schedules, session.rank, target, side))
        own = [x.clone() for x in inputs]
        assert target.driver is not None
        errors = []
        with torch.no_grad():
            errors.append(_error(local[session.rank](*own)[0], whole.gm(*own)[0]))
            with Capture(target.driver) as recorded:
                outs = [local[session.rank](*own)[0] for _ in range(2)]
            for factor in (1.0, -0.5, 2.0):
                own[0].copy_(inputs[0] * factor)
                want = whole.gm(*own)[0]
                for out in outs:
                    out.fill_(torch.nan)
                recorded.replay()
                errors += [_error(out, want) for out in outs]
        return max(errors), recorded.launches, recorded.loops

    job = MachineJob((0, 0))
    errors, launches, loops = zip(*job.run(work), strict=True)
    assert max(errors) < 1e-5 and min(launches) > 0 and min(loops) > 0, (errors, launches, loops)
    assert job.world.races() == []


def _error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out - want).abs().max() / want.abs().max())
