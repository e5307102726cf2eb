"""Which attention is faster: by a fake clock, agreed between ranks, kept in a file; by gpu-check's rates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_ranks import Job, make_site
from random_sites import gather_site

from sfcompile.codegen.engines import trial
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.toolchain.gpu_results import GpuResult, write_result
from sfcompile.measuring import attention
from sfcompile.measuring.attention import TITLES, Make, Work, attention_work, compare, decide_attention
from sfcompile.runtime.program.topology import Topology

CPU = torch.device("cpu")
SMALL = Job("torus", 2, 1, 2, 1, make_site(8, 2)).schedule()
LARGE = Job("torus", 2, 1, 2, 1, make_site(64, 2)).schedule()
PLAIN = ("none", True)


class FakeClock:
    """A device on which a run takes what it says, and its first one, with the compilation, longer."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def now(self) -> float:
        return self.time_s

    def seconds(self, step: trial.Step) -> float:
        took = step()
        assert isinstance(took, float)
        self.time_s += took
        return took


def way(clock: FakeClock, small_s: float, large_s: float, compile_s: float = 0.0, log: list[Any] | None = None) -> Make:
    """What takes so long for each of the two schedules."""

    def make(schedule: AttentionSchedule, mask: tuple[str, bool]) -> tuple[trial.Step, trial.Step, trial.Step]:
        clock.time_s += compile_s
        if log is not None:
            log.append((schedule, mask))
        large = attention.flops(schedule) == attention.flops(LARGE)
        return (lambda: None), (lambda: large_s if large else small_s), (lambda: None)

    return make


def fails(error: Exception) -> Make:
    def make(schedule: AttentionSchedule, mask: tuple[str, bool]) -> tuple[trial.Step, trial.Step, trial.Step]:
        raise error

    return make


WORK = [Work(SMALL, PLAIN, 3), Work(LARGE, ("key", True), 2)]


@pytest.mark.parametrize(("fused_s", "best"), [(0.5, "triton"), (2.0, "aten"), (1.0, "triton")])
def test_the_sum_over_the_graph_decides(fused_s: float, best: str) -> None:
    clock = FakeClock()
    found = compare(WORK, {"triton": way(clock, 7.0, fused_s), "aten": way(clock, 7.0, 1.0)}, clock, 1e9)
    assert found.best == best and (found.timed, found.geometries) == (2, 2)
    assert found.seconds == {"triton": 3 * 7.0 + 2 * fused_s, "aten": 3 * 7.0 + 2 * 1.0}


def test_time_is_bounded_and_what_computes_most_comes_first() -> None:
    clock, log = FakeClock(), list[Any]()
    ways = {"triton": way(clock, 1e-3, 2e-3, 15.0, log), "aten": way(clock, 1e-3, 1e-3, 6.0)}
    found = compare(WORK, ways, clock)
    assert log == [(LARGE, ("key", True))] and clock.time_s < 2 * attention.BUDGET_S
    assert found.best == "aten" and "1 of 2 geometries" in found.line


def test_a_way_that_fails_is_left_out_with_a_word() -> None:
    clock = FakeClock()
    found = compare(
        WORK, {"triton": fails(RuntimeError("out of\n shared memory")), "aten": way(clock, 9.0, 9.0)}, clock
    )
    assert found.best == "aten"
    assert "the generated kernel left out: RuntimeError: out of shared memory" in found.line

    def late(schedule: AttentionSchedule, mask: tuple[str, bool]) -> tuple[trial.Step, trial.Step, trial.Step]:
        def look() -> None:
            raise ValueError("waited in vain")

        return (lambda: None), (lambda: 1e-9), look

    assert compare(WORK, {"triton": late, "aten": way(clock, 9.0, 9.0)}, clock).best == "aten"


class Ranks:
    """Ranks that decide one after the other, each told what rank 0 said at the same place."""

    def __init__(self, domains: tuple[int, ...] = (0, 0)) -> None:
        self.said: list[Any] = []
        self.domains = domains

    def decide(self, rank: int, **given: Any) -> tuple[str, str]:
        place = iter(range(99))

        def exchange(value: Any, doing: str) -> list[Any]:
            at = next(place)
            if rank == 0:
                self.said.append(value)
            return [self.said[at], value]

        session: Any = SimpleNamespace(rank=rank, exchange=exchange, side=SimpleNamespace(domains=self.domains))
        return decide_attention(session, CPU, WORK, **given)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFCOMPILE_CACHE", str(tmp_path))


def test_rank_0_decides_for_all_and_the_next_job_knows(tmp_path: Path) -> None:
    clock, never = FakeClock(), {name: fails(AssertionError("timed again")) for name in TITLES}
    ways = {"triton": way(clock, 2.0, 2.0), "aten": way(clock, 1.0, 1.0)}
    first = Ranks()
    told = first.decide(0, clock=clock, ways=ways)
    assert told[0] == "aten" and told[1].startswith("timed 20") and "on rank 0's GPU" in told[1]
    assert first.decide(1, clock=clock, ways=never) == told  # it would have found nothing
    again = Ranks().decide(0, clock=clock, ways=never)
    assert again == ("aten", f"cached, {told[1]}")
    (path,) = (tmp_path / "attention").iterdir()
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["setting"]["versions"]["torch"] = "another"
    path.write_text(json.dumps(raw), encoding="utf-8")
    assert Ranks().decide(0, clock=clock, ways=ways)[1].startswith("timed")
    good = json.loads(path.read_text(encoding="utf-8"))
    damaged = [
        {"seconds": {"triton": 1.0, "aten": float("inf")}}, {"seconds": {"triton": 1.0, "aten": "2.0"}},
        {"problems": ["what"]}, {"timed": "two"}, {"date": "yesterday"}, {"more": 1},
    ]  # fmt: skip
    for text in ("{", "[" * 100_000, *(json.dumps(good | {"found": good["found"] | entry}) for entry in damaged)):
        path.write_text(text, encoding="utf-8")
        assert Ranks().decide(0, clock=clock, ways=ways)[1].startswith("timed"), text[:200]
    assert Ranks().decide(0, clock=clock, ways=never)[1].startswith("cached")


def test_a_failure_is_not_kept(tmp_path: Path) -> None:
    clock = FakeClock()
    ways: dict[str, Make] = {"triton": fails(RuntimeError("once")), "aten": way(clock, 1.0, 1.0)}
    assert Ranks().decide(0, clock=clock, ways=ways)[0] == "aten"
    assert not (tmp_path / "attention").exists()


@pytest.mark.parametrize("measure", [True, False])
def test_without_a_timing_rates_of_gpu_check_decide(tmp_path: Path, measure: bool) -> None:
    given: dict[str, Any] = {"measure": measure, "ways": {name: fails(RuntimeError("no")) for name in TITLES}}
    chosen, why = Ranks().decide(0, **given)
    assert chosen == "triton" and "gpu-check has no rates of cpu" in why
    assert ("RuntimeError: no" in why) == measure and ("the topology is assumed" in why) != measure
    rates = {64: {"fused": 2.0, "library": 3.0}, 128: {"fused": 9.0}}
    write_result(GpuResult("cpu", "2026-12-01", rates), tmp_path / "gpu-check")
    chosen, why = Ranks().decide(0, **given)
    assert chosen == "aten" and "1.50 x as fast by gpu-check of 2026-12-01 on cpu" in why


def test_sites_of_one_geometry_are_timed_once() -> None:
    gather = build_exchange(gather_site(2), Mesh.of(Topology.grid(1, 2), 2, 1))
    named = replace(SMALL, site=replace(SMALL.site, name="other"))
    work = attention_work({SMALL: [PLAIN, PLAIN], named: [PLAIN, ("key", True)], gather: [PLAIN]})
    assert [(entry.mask, entry.calls) for entry in work] == [(PLAIN, 3), (("key", True), 1)]
    assert decide_attention(SimpleNamespace(), CPU, [])[0] == "triton"  # type: ignore[arg-type]


def test_the_real_ways_on_the_device_at_hand() -> None:
    """The library; the generated kernel needs an interpreter here and is left out, in words."""
    found = compare([Work(SMALL, PLAIN, 1)], attention.ways_on(CPU), attention.DeviceClock(CPU), 60.0)
    assert set(found.seconds) | set(found.problems) == set(TITLES) and found.seconds["aten"] > 0.0


def test_from_sm_100_on_the_library_is_taken_unless_a_figure_speaks_for_the_kernel(tmp_path: Path) -> None:
    work = attention_work({LARGE: [PLAIN]})
    for arch, want in ((90, "triton"), (100, "aten"), (120, "aten")):
        chosen, why = attention.from_results("A GPU", work, "nothing was timed", arch)
        assert chosen == want and "nothing was timed" in why and "gpu-check has no rates of A GPU" in why
    write_result(GpuResult("A GPU", "2026-12-01", {64: {"fused": 3.0, "library": 2.0}}), tmp_path / "gpu-check")
    assert attention.from_results("A GPU", work, "nothing was timed", 100)[0] == "triton"
