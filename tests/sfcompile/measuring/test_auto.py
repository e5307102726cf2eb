"""topology="auto": measured once, from the cache after that, and rank 0's numbers are everybody's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measuring_workers
import pytest
import torch
from processes import run_processes
from threads import run_threads

from sfcompile.errors import OptionError
from sfcompile.measuring import auto, cache
from sfcompile.measuring.quick import Quick
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import current_session


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ranks that measured, one entry each time; every rank finds other numbers."""
    monkeypatch.setenv("SFCOMPILE_CACHE", str(tmp_path))
    times: list[int] = []

    def measure(session: Any, base: Topology, dtype: torch.dtype) -> Quick:
        times.append(session.rank)
        return Quick({"flops_per_s": 1e9 * (session.rank + 1), "network_bytes_per_s": 1.25e7}, 0.05, 0.41)

    monkeypatch.setattr(auto, "measure_quickly", measure)
    return times


def ask(dtypes: tuple[torch.dtype, ...] = (torch.float32,), again: bool = False) -> list[list[auto.SourcedTopology]]:
    """What two ranks on two machines get, for each dtype."""

    def work(rank: int) -> list[auto.SourcedTopology]:
        session = current_session()
        found = [auto.measured_links(session, session.topology, "auto", dtype) for dtype in dtypes]
        if again:
            auto.forget(session)
            found.append(auto.measured_links(session, session.topology, "auto", dtypes[0]))
        return found

    return run_threads(2, work, (0, 1))


def test_a_session_measures_once_and_all_ranks_take_rank_0s_numbers(measured: list[int]) -> None:
    first, second = ask((torch.float32, torch.float32))
    assert first == second and first[0] is first[1] and sorted(measured) == [0, 1]
    assert first[0].topology == Topology((0, 1), flops_per_s=1e9, network_bytes_per_s=1.25e7)
    assert first[0].source.startswith(f"measured {cache.today()} in 0.41 s: 100 Mbit/s a machine (+-5%), 0.2 ms")


def test_a_later_job_reads_the_cache(measured: list[int]) -> None:
    before, _ = ask()
    after, other = ask()
    assert after == other and sorted(measured) == [0, 1]
    assert after[0].topology == before[0].topology
    assert after[0].source.startswith(f"from the cache of {cache.today()}: 100 Mbit/s")


def test_another_dtype_is_measured_on_its_own(measured: list[int]) -> None:
    ask((torch.float32, torch.bfloat16))
    assert sorted(measured) == [0, 0, 1, 1]


def test_forgotten_links_are_asked_for_anew(measured: list[int]) -> None:
    first, _ = ask(again=True)
    assert first[0].source.startswith("measured") and first[1].source.startswith("from the cache")
    assert sorted(measured) == [0, 1]


def test_unsteady_links_are_not_kept(measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "measure_quickly", lambda *args: Quick({"flops_per_s": 1e9}, 0.3, 0.41))
    for _ in range(2):
        first, _ = ask()
        assert "not kept (links were unsteady)" in first[0].source and "(+-30%)" in first[0].source


def test_what_busy_machines_measured_is_not_kept(measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "measure_quickly", lambda *args: Quick({"flops_per_s": 1e9}, 0.01, 0.41, busy=0.7))
    for _ in range(2):
        first, _ = ask()
        assert "not kept (other work had the cores for 70% of the time, links may carry more)" in first[0].source


def test_crowded_ranks_measure_again_and_the_better_numbers_count(
    measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until they have cores, three times at most."""
    cases = (((1.0, 0.6, 0.4, 0.0), 3e8, 3), ((1.0, 0.1), 2e8, 2), ((0.5,), 1e8, 1), ((0.9,) * 9, 3e8, 3))
    for case, (busy, want, times) in enumerate(cases):
        monkeypatch.setenv("SFCOMPILE_CACHE", str(tmp_path / str(case)))

        def measure(session: Any, *args: Any, busy: tuple[float, ...] = busy) -> Quick:
            tried = measured.count(session.rank)
            measured.append(session.rank)
            link = 1e8 * (tried + 1)
            return Quick({"network_bytes_per_s": link, "network_latency_s": 1 / link}, 0.3 / link, 0.4, busy[tried])

        monkeypatch.setattr(auto, "measure_quickly", measure)
        measured.clear()
        first, second = ask()
        links = first[0].topology
        assert first == second and measured.count(0) == times
        assert (links.network_bytes_per_s, links.network_latency_s) == (want, 1 / want)
        assert f" in {0.4 * times:.2f} s" in first[0].source


def test_a_cache_that_cannot_be_written_is_said(
    measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFCOMPILE_CACHE", str(tmp_path / "file"))
    first, second = ask()
    assert first == second and "not kept (" in first[0].source


def test_the_variable_turns_auto_off_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(auto.VARIABLE, "assumed")
    assert auto.resolved("auto") == "auto:assumed" and auto.resolved("2x1") == "2x1"
    for said in ("measured", None):
        monkeypatch.setenv(auto.VARIABLE, said) if said else monkeypatch.delenv(auto.VARIABLE)
        assert auto.resolved("auto") == "auto" and auto.resolved("auto:assumed") == "auto:assumed"
    monkeypatch.setenv(auto.VARIABLE, "no")
    with pytest.raises(OptionError, match="measured or assumed"):
        auto.resolved("auto")


def test_lines_say_where_numbers_come_from() -> None:
    topology = Topology.grid(2, 1)
    assert auto.assumed_links(topology).source.startswith("assumed: 10 Gbit/s a machine")
    assert auto.given_links(topology).source.startswith("given: 10 Gbit/s a machine")


@pytest.mark.ranks
def test_only_the_cache_of_rank_0_counts(tmp_path: Path) -> None:
    """Every rank has a cache of its own, with numbers of its own in it; then rank 0 has none, and measures with all."""
    first, second = run_processes(2, measuring_workers.own_caches, (str(tmp_path),), (0, 1), timeout_s=240.0)
    assert first == second
    given, after = first
    assert given == ("from the cache of", 1e9) and after[0].startswith("measured") and after[1] not in (1e9, 2e9)


@pytest.mark.ranks
@pytest.mark.parametrize("machine_of", [(0, 0), pytest.param((0, 1), marks=pytest.mark.thorough)])
def test_a_model_compiles_on_measured_links(machine_of: tuple[int, ...], tmp_path: Path) -> None:
    """Two models: the second knows. Then steps are compared with the prediction."""
    env = {auto.VARIABLE: "measured", "SFCOMPILE_CACHE": str(tmp_path)}
    results = run_processes(2, measuring_workers.compiles, (), machine_of, timeout_s=240.0, env=env)
    assert results[0]["links"] == results[1]["links"] and results[0]["plan"] == results[1]["plan"]
    for result in results:
        first, second = result["links"]
        assert first.startswith("measured") and second == first
        assert result["right"] and "measured" in result["printed"]
        assert "median of 4 calls" in result["steps"] and "predicted" in result["steps"]
