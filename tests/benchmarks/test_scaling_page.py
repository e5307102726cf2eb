"""The page of predicted scaling: every table and picture of some cells, and a run that goes on where it was cut."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import scaling
from scaling_page import Cell, draw_plans, draw_steps, page, reasons


def cells() -> list[Cell]:
    """Two models, two lengths, one to eight machines; the short one gets slower beyond four."""
    made = []
    for workload, samples, split in (("image", 1, 1), ("video", 2, 2)):
        for tokens in (4096, 65536):
            for machines in (1, 2, 4, 8):
                step_s = tokens / 4e4 / machines + 0.02 * (machines > 4) * (tokens < 10_000)
                kind = "ulysses" if machines == 1 else "torus"
                plan = f"{kind} {machines}x8"
                made.append(
                    Cell(
                        workload, "Net", 40, samples, "a100-efa", tokens, machines, plan, split, kind, step_s,
                        0.25 * step_s, 0.5 * step_s, 0.8 * step_s, 1.5,
                    )
                )  # fmt: skip
    return made


def test_the_page_has_a_line_for_each_cell_and_says_where_each_length_ends() -> None:
    text = page(cells())
    assert "Predicted scaling, 1 to 8 machines" in text and "Net (video, 40 blocks, batch 2)" in text
    assert "| 65536 | 8 | 64 | torus 8x8 | 204.8 | 163.8 | 80% | 25% | **8.00** |" in text
    assert "| 4096 | 4 | 32 | torus 4x8 | 25.6 | 20.5 | 80% | 25% | **4.00** |" in text
    assert text.count("\n| 4096 | ") == 8
    assert "**torus**, 12 of 16 cells, 2 to 8 machines" in reasons(cells())
    assert "video: 4096 tokens to 4 (4.0x), 65536 tokens to 8 (8.0x)" in reasons(cells())


def test_both_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_steps(tmp_path / "steps.png", cells())
    draw_plans(tmp_path / "plans.png", cells()[:8])
    assert all(path.stat().st_size > 10_000 for path in (tmp_path / "steps.png", tmp_path / "plans.png"))


def test_a_run_goes_on_where_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cells.csv"
    assert scaling.read_csv(file) == []
    for cell in cells()[:3]:
        scaling.append_csv(file, cell)
    assert scaling.read_csv(file) == cells()[:3]
    traced = []
    monkeypatch.setattr(
        scaling, "trace", lambda workload, tokens: traced.append((workload.title, tokens)) or ("", None)
    )
    monkeypatch.setattr(
        scaling, "predicted",
        lambda workload, name, graph, tokens, machines, preset: (workload.title, preset, tokens, machines),
    )  # fmt: skip
    args = argparse.Namespace(workloads=["image"], lengths=2, presets=["a100-efa"], machines=[1, 2, 4])
    left = list(scaling.run(args, cells()[:3]))
    assert left == [("image", "a100-efa", 16384, machines) for machines in (1, 2, 4)], "4096 is known for all of them"
    assert traced == [("image", 16384)]
