"""Which cells benchmarks/cluster.py runs, in which order, and about how long each takes.

The cells that decide most come first, so that a run that is cut still says something: slow links between two machines
of two ranks and four of one, for the four plain models; then the same layouts whole; then the other layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cluster_cell import SLOW

FIRST_LAYOUTS = ("2x2", "4x1")
FIRST_MODELS = ("flux", "wan", "cogvideox", "pixart")
STEP_S = {"100mbit": 2.6, "200mbit": 1.8, "500mbit": 1.2, "1gbit": 1.0}
"""About the seconds of a step of a contender, the mean of all, on two cores (2026-11-28)."""
WEIGHT = {"flux6": 3.0, "guided": 2.0}
"""Steps of these take so many times as long."""
BUILD_S = 30.0
"""Compiling ours, six times."""


class Planned(NamedTuple):
    """A cell to be run."""

    layout: str
    rate: str
    model: str

    @property
    def wave(self) -> int:
        """Cells of lower waves run first."""
        if self.layout not in FIRST_LAYOUTS:
            return 2
        return 0 if self.rate in SLOW and self.model in FIRST_MODELS else 1


def planned(layouts: Sequence[str], rates: Sequence[str], models: Sequence[str]) -> list[Planned]:
    """Every cell, in the order in which they run. Without an uplink (one machine) one rate stands for all."""
    cells = [
        Planned(layout, rate, model)
        for layout in layouts
        for model in models
        for rate in (rates[:1] if layout.startswith("1x") else rates)
    ]
    return sorted(cells, key=lambda cell: cell.wave)  # stable: as typed within a wave


def jobs(cells: Sequence[Planned]) -> list[list[Planned]]:
    """The cells of each job: ranks of a layout start once in a wave."""
    by_job: dict[tuple[int, str], list[Planned]] = {}
    for cell in cells:
        by_job.setdefault((cell.wave, cell.layout), []).append(cell)
    return list(by_job.values())


def guess_s(cell: Planned, contenders: int, rounds: int, scale: float, blocks: int) -> float:
    """About how many seconds a cell takes: each contender runs ``rounds`` times, once to be checked."""
    rate = "1gbit" if cell.layout.startswith("1x") else cell.rate
    step_s = STEP_S.get(rate, max(STEP_S.values())) * WEIGHT.get(cell.model, 1.0) * blocks * scale
    return BUILD_S + (rounds + 1) * contenders * step_s


class Clock:
    """What is left, from guesses that the cells so far have corrected."""

    def __init__(self, guesses: Sequence[float]) -> None:
        self.left = list(guesses)
        self.guessed_s = self.took_s = 0.0

    @property
    def factor(self) -> float:
        """What the cells so far took, over what was guessed."""
        return self.took_s / self.guessed_s if self.guessed_s else 1.0

    @property
    def left_s(self) -> float:
        """Seconds for all that is left."""
        return sum(self.left) * self.factor

    def done(self, took_s: float) -> None:
        """The next cell took so long."""
        self.guessed_s += self.left.pop(0)
        self.took_s += took_s


def minutes(seconds: float) -> str:
    """For people."""
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"
