"""The benchmark's arithmetic: limits, ratios and regret of a cell; the jobs themselves take a quiet machine."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cluster_cell  # noqa: E402
import cluster_report  # noqa: E402


def row(name: str, *seconds: float, across_bytes: int | None = None) -> dict[str, Any]:
    times = list(seconds)
    return {
        "name": name, "plan": name, "seconds": times, "blocked": [0.1] * len(times), "error": 1e-7,
        "across_bytes": across_bytes,
    }  # fmt: skip


def cell(rate: str = "100mbit", wire: int = 20_000_000) -> cluster_cell.Cell:
    rows = [
        row("ours", 2.0, 1.9, 2.3, across_bytes=wire), row("ours ulysses", 2.2, across_bytes=wire),
        row("ours ring", 3.0, across_bytes=2 * wire), row("diffusers ulysses", 3.0), row("diffusers usp", 4.0),
        row("compute alone", 1.5),
    ]  # fmt: skip
    return cluster_cell.Cell(
        {
            "layout": "2x2", "rate": rate, "model": "flux", "inner": "eager", "payload_bytes_per_s": 6e6,
            "machines": 2, "sites": 2, "heap_bytes": 1, "rows": rows,
        }
    )  # fmt: skip


def test_a_cell_is_measured_against_its_limit_and_its_peers() -> None:
    bound_by_link, bound_by_compute = cell(), cell(wire=10_000_000)
    assert bound_by_link.limits == pytest.approx((20e6 / 2 / 6e6, 20e6 / 2 / 6e6, 1.5))
    assert bound_by_compute.limit_s == 1.5 and bound_by_compute.efficiency == 0.75
    assert bound_by_link.over() == 1.5 and bound_by_link.over(cluster_cell.USP) == 2.0
    assert bound_by_link.regret == pytest.approx(2.0 / 2.2 - 1)


def test_a_plan_that_shards_less_has_a_limit_of_its_own() -> None:
    raw = cell().raw
    rows = [row("ours", 2.0, across_bytes=5_000_000), *raw["rows"][1:]]
    # Its bytes and the other schedules' compute are no limit of anything.
    assert cluster_cell.Cell(raw | {"rows": rows}).limits == pytest.approx((20e6 / 2 / 6e6, 20e6 / 2 / 6e6, 1.5))
    for alone, limit in ((1.6, 1.6), (1.9, 20e6 / 2 / 6e6)):
        more = [*rows, row("ours alone", alone, across_bytes=5_000_000)]
        assert cluster_cell.Cell(raw | {"rows": more}).limit_s == pytest.approx(limit)


def test_as_typed_is_held_against_tuned() -> None:
    raw = cell().raw
    assert "as typed over tuned" not in cluster_report.report([cell()])
    tuned = cluster_cell.Cell(raw | {"rows": [*raw["rows"], row(cluster_cell.TUNED, 1.6)]})
    assert "as typed over tuned: mean 1.25, most 1.25" in cluster_report.report([tuned])
    assert tuned.regret == cell().regret and tuned.limits == cell().limits


def test_tables_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster_report.summary([cell(), cell("1gbit")], tmp_path / "grid")
    text = capsys.readouterr().out
    assert "100 and 200 mbit, against USP: mean 2.00x, best 2.00x" in text
    assert "all cells, against the best peer: least 1.50x" in text
    assert (tmp_path / "grid.txt").read_text().strip() in text
    lines = list(csv.DictReader((tmp_path / "grid.csv").open()))
    assert len(lines) == 12 and lines[0]["median_s"] == "2.0000" and lines[0]["limit_s"] == "1.6667"
    assert (tmp_path / "grid.png").stat().st_size > 1000
