"""The grid of benchmarks/cluster.py: what runs first, what is left, and what its tables and its picture say."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import pytest
from cluster import Grid
from cluster_cell import LAYOUTS, MODELS, RATES, Cell, read
from cluster_grid import Clock, jobs, planned
from cluster_report import draw, report, summary
from cluster_times import PARTS, parts_of

from sfcompile.runtime.rank.recorder import Event


def raw(layout: str, rate: str, model: str, seconds: dict[str, float], **more: Any) -> dict[str, Any]:
    """What a job writes of a cell."""
    return {
        "layout": layout, "rate": rate, "model": model, "inner": "eager", "blocks": 1, "scale": 1.0, "rounds": 3,
        "contenders": [], "payload_bytes_per_s": 1e7, "machines": int(layout[0]), "sites": 2,
        "rows": [
            {"name": name, "plan": "a plan", "seconds": [took] * 3, "blocked": [0.1] * 3, "error": 1e-7,
             "across_bytes": 10**6}
            for name, took in seconds.items()
        ],
    } | more  # fmt: skip


def options(**more: Any) -> argparse.Namespace:
    """The command line's defaults."""
    plain = {
        "layouts": list(LAYOUTS), "rates": list(RATES), "models": list(MODELS), "contenders": [], "rounds": 3,
        "scale": 1.0, "blocks": 1, "inner": "eager", "no_peers": False, "out": None, "minutes": None,
    }  # fmt: skip
    return argparse.Namespace(**(plain | more))


def test_what_decides_most_runs_first_and_no_cell_is_lost() -> None:
    cells = planned(LAYOUTS, RATES, MODELS)
    assert len(cells) == len(set(cells)) == 4 * 4 * 7 + 7
    assert {cell.layout for cell in cells[:16]} == {"2x2", "4x1"}
    assert {cell.rate for cell in cells[:16]} == {"100mbit", "200mbit"}
    assert [cell for job in jobs(cells) for cell in job if cell.layout == "2x2"] == [
        cell for cell in cells if cell.layout == "2x2"
    ]
    assert all(len({cell.layout for cell in job}) == 1 for job in jobs(cells)) and len(jobs(cells)) == 7
    only = planned(["3x1"], ["1gbit"], ["wan"])
    assert [tuple(cell) for cell in only] == [("3x1", "1gbit", "wan")]


def test_cells_that_are_there_are_not_run_again_unless_their_settings_differ(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    first = raw("2x2", "100mbit", "flux", {"ours": 2.0})
    with file.open("w") as out:
        for cell in (first, raw("2x2", "100mbit", "wan", {"ours": 2.0}, rounds=1), first | {"sites": 7}):
            out.write(json.dumps(cell) + "\n")
    grid = Grid(options(), file)
    assert len(grid.left) == len(grid.wanted) - 1
    assert [cell.raw["sites"] for cell in grid.cells()] == [7], "the last line of a cell counts"
    assert "118 cells, about" in grid.estimate() and "1 of 119 are there already" in grid.estimate()
    assert len(read(file)) == 2
    grid.hear(1, "  of another machine; the cell took 10 s)")
    assert len(grid.clock.left) == 118
    grid.hear(0, "  2x2 100mbit wan ours 1.0  (plan x; compiled in 3 s; the cell took 10 s)")
    assert len(grid.clock.left) == 117 and grid.clock.took_s == 10


def test_what_is_left_is_corrected_by_what_cells_took() -> None:
    clock = Clock([10.0, 20.0, 30.0])
    assert clock.left_s == 60
    clock.done(20.0)
    assert clock.left_s == 100


def test_the_parts_of_a_step_add_up_to_it() -> None:
    def event(lane: str, start_s: float, stop_s: float) -> Event:
        return Event(0, lane, lane, start_s, stop_s, 0, None, 0, 0, 1)

    events = [
        event("send", 1.0, 1.5), event("stage", 1.0, 2.0),  # a put: half a second of copying beyond the message
        event("wait", 3.0, 3.5), event("compute", 3.5, 5.0), event("wait", 5.0, 5.25), event("compute", 5.25, 6.0),
        event("stage", 3.0, 6.5),
        event("wait", 7.0, 8.0), event("stage", 7.0, 8.5),
    ]  # fmt: skip
    parts = parts_of(events, 0.0, 10.0, merges_s=0.25)
    assert tuple(parts) == tuple(PARTS) and sum(parts.values()) == pytest.approx(10.0)
    assert parts == pytest.approx(
        {"model": 4.0, "attention": 2.0, "merges": 0.25, "python": 1.5, "sends": 0.5, "fill": 0.5, "waits": 0.25,
         "drain": 1.0}
    )  # fmt: skip


def some_cells() -> list[Cell]:
    where = dict.fromkeys(PARTS, 0.25) | {"step": 2.0, "slowed": 0.1, "wire cpu": 0.05}
    both = {"ours": 1.0, "ours torus": 1.0, "compute alone": 0.8, "diffusers ulysses": 1.5, "diffusers ring": 2.0}
    return [
        Cell(raw("2x2", "100mbit", "flux", both, times=where)),
        Cell(raw("2x2", "200mbit", "flux", {"ours": 1.0, "ours torus": 1.1, "compute alone": 0.9})),
        Cell(raw("1x4", "100mbit", "flux", both)),
    ]


def test_tables_say_where_a_step_goes_and_who_cannot_run() -> None:
    text = report(some_cells())
    assert "n/a" in text.splitlines()[3], "no peer ran at 200 mbit"
    line = next(line for line in text.splitlines() if line.startswith("2x2 100mbit") and line.count("0.250") == 8)
    assert line.split()[4:6] == ["2.000", "0.800"], "the traced step, and the limit"
    assert "100 and 200 mbit, against the best peer: mean 1.50x" in text
    assert text.count("against the best peer: mean") == 1, "one machine has no slow links"


def test_the_files_of_a_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    summary(some_cells(), tmp_path / "grid", "how it was run")
    assert (tmp_path / "grid.txt").read_text().startswith("how it was run\n\nWords.")
    with (tmp_path / "grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["contender"] == "ours" and rows[0]["drain_s"] == "0.2500" and rows[1]["drain_s"] == ""
    assert (tmp_path / "grid.png").stat().st_size > 5_000


def test_a_contender_that_cannot_run_has_no_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    heights, words = [], []
    bar, text = axes.Axes.bar, axes.Axes.text
    monkeypatch.setattr(axes.Axes, "bar", lambda self, x, h, *a, **k: heights.extend(h) or bar(self, x, h, *a, **k))
    monkeypatch.setattr(
        axes.Axes, "text", lambda self, x, y, s, **k: words.append(s.strip()) or text(self, x, y, s, **k)
    )
    draw(tmp_path / "grid.png", some_cells())
    assert len(heights) == 7 and 0.0 not in heights
    assert words == ["n/a", "n/a"], "both peers at 200 mbit"
