"""The demo: its arithmetic and its words; then a tiny one for real, through the launcher and the backend."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from sfcompile.commands.demo import DemoConfig, Progress, Result, agrees, run_demo, summary

GOOD = Result(threads=1, first_s=9.0, step_s=[2.0, 4.0, 3.0], cpu_s=9.0, difference=1e-6, scale=2.0)
TINY = DemoConfig(ranks=2, tokens=256, text=24, layers=2, single_layers=2, heads=4, head_dim=16, steps=2, inner="eager")


def test_agreement_is_relative_to_the_scale() -> None:
    assert agrees([GOOD, replace(GOOD, difference=1.9e-5)])
    assert not agrees([GOOD, replace(GOOD, difference=2.1e-5)])


def test_nan_never_agrees_and_is_shown() -> None:
    broken = replace(GOOD, difference=math.nan)
    assert not agrees([GOOD, broken])
    assert "nan absolute" in summary(GOOD, [GOOD, broken], cores=2)
    assert "FAILED" in summary(GOOD, [GOOD, broken], cores=2)


def test_a_step_takes_as_long_as_its_slowest_rank() -> None:
    ranks = [replace(GOOD, step_s=[1.0, 1.0, 5.0]), replace(GOOD, step_s=[2.0, 2.0, 2.0])]
    text = summary(replace(GOOD, step_s=[4.0, 4.0, 4.0]), ranks, cores=2)
    assert re.search(r"2 ranks +2\.000 s per step", text)
    assert re.search(r"ratio +2\.00 x", text)


def test_a_busy_machine_is_not_trusted() -> None:
    even = replace(GOOD, step_s=[3.0, 3.1], cpu_s=6.0)
    uneven = replace(GOOD, step_s=[3.0, 9.0], cpu_s=12.0)
    starved = replace(even, cpu_s=3.0)
    short = replace(GOOD, step_s=[0.1, 0.1], cpu_s=0.1)
    assert "do not trust" not in summary(even, [even], cores=2)
    assert "do not trust" in summary(uneven, [even], cores=2)
    assert "do not trust" in summary(even, [uneven], cores=2)
    assert "got 49% of its threads' time" in summary(starved, [even], cores=2)
    assert "do not trust" not in summary(short, [short], cores=2)


@pytest.mark.parametrize(("cores", "words"), [(1, "Ranks share cores"), (8, "no speed-up from more hardware")])
def test_the_summary_says_what_the_machine_can_show(cores: int, words: str) -> None:
    assert words in summary(GOOD, [GOOD, GOOD], cores)


def test_progress_off_a_terminal_is_one_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("ranks", 2, shown=True)
    for done in range(3):
        progress.update(done, "note")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("] ")[1] for line in lines] == ["0/2  note", "1/2  note", "2/2  note"]
    assert "\x1b" not in "".join(lines)


def test_progress_of_other_ranks_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("ranks", 1, shown=False).update(1, "note")
    assert capsys.readouterr().out == ""


@pytest.mark.ranks
@pytest.mark.parametrize("machines", [2, pytest.param(1, marks=pytest.mark.thorough)])
def test_tiny_demo(machines: int, capfd: pytest.CaptureFixture[str]) -> None:
    code = run_demo(replace(TINY, machines=machines))
    out = capfd.readouterr().out
    assert code == 0, out
    assert "Plan of graph 1 of 1" in out
    assert re.search(rf"ranks +2 on {machines} machine", out)
    assert re.search(r"difference .* allowed 1e-05: OK", out)
    assert "2/2" in out
