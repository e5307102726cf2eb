"""One cell of benchmarks/cluster.py: what its job wrote, and what follows from it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

LAYOUTS = ("2x2", "4x1", "3x1", "2x1", "1x4")
RATES = ("100mbit", "200mbit", "500mbit", "1gbit")
MODELS = ("flux", "wan", "cogvideox", "pixart", "flux6", "guided", "uneven")
SLOW = ("100mbit", "200mbit")
USP = "diffusers usp"
TUNED = "ours, tuned"
PEERS = ("chunked ulysses", "gathered kv")
FORCED = ("ours torus", "ours ulysses", "ours ring", "ours usp")
SETTINGS = ("inner", "blocks", "scale", "rounds", "contenders")
"""What cells must have alike to stand in one table, beside layout, rate and model."""


class Cell:
    """One cell's numbers, in seconds."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.rows: dict[str, dict[str, Any]] = {row["name"]: row for row in raw["rows"]}
        self.medians = {name: statistics.median(row["seconds"]) for name, row in self.rows.items() if row["seconds"]}
        self.peers = {
            name: s for name, s in self.medians.items() if name in PEERS or name.startswith(("diffusers", "yunchang"))
        }
        self.forced = {name: self.medians[name] for name in self.medians if name in FORCED}
        self.ours = self.medians.get("ours", float("nan"))

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.raw["layout"], self.raw["rate"], self.model, self.raw["inner"]

    @property
    def model(self) -> str:
        """The model's name, and how many times its usual blocks it has."""
        blocks = self.raw.get("blocks", 1)
        return self.raw["model"] + (f" x{blocks}" if blocks > 1 else "")

    @property
    def limits(self) -> tuple[float, float, float]:
        """Seconds: the limit, the wire's and the compute's part in it."""
        bounds = []
        for alone, names in (("compute alone", FORCED), ("ours alone", ("ours",))):
            if alone not in self.medians:
                continue
            counted = [self.rows[name]["across_bytes"] for name in (*names, alone) if name in self.rows]
            sent = min((count for count in counted if count is not None), default=0)
            wire_s = sent / self.raw["machines"] / self.raw["payload_bytes_per_s"]
            bounds.append((max(self.medians[alone], wire_s), wire_s, self.medians[alone]))
        return min(bounds, default=(float("nan"),) * 3)

    @property
    def limit_s(self) -> float:
        return self.limits[0]

    @property
    def efficiency(self) -> float:
        return self.limit_s / self.ours

    @property
    def regret(self) -> float:
        """How far the planner's pick is above the best forced schedule; below zero: it is the best of all."""
        return self.ours / min(self.forced.values()) - 1 if self.forced else float("nan")

    def over(self, name: str | None = None) -> float:
        """A peer's time over ours; the best peer's without a name."""
        if not self.peers:
            return float("nan")
        return (self.peers.get(name, float("nan")) if name else min(self.peers.values())) / self.ours

    @property
    def slow(self) -> bool:
        """Whether machines are joined by slow links; one machine alone has none, whatever rate it stands under."""
        return self.raw["rate"] in SLOW and self.raw["machines"] > 1

    @property
    def times(self) -> dict[str, float]:
        """Where a step of ours goes (cluster_times.py), in seconds; empty if it was not traced."""
        return dict(self.raw.get("times", {}))


def read(path: Path) -> list[dict[str, Any]]:
    """The cells that jobs have written to a file, the last of each; none if there is no file."""
    if not path.exists():
        return []
    cells: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        raw = json.loads(line)
        cells[json.dumps([raw["layout"], raw["rate"], raw["model"], *settings_of(raw)])] = raw
    return list(cells.values())


def settings_of(raw: dict[str, Any]) -> list[Any]:
    """The settings of a cell, or of a run's options; those that a file from before does not name are the defaults."""
    defaults = {"inner": "eager", "blocks": 1, "scale": 1.0, "rounds": 3, "contenders": []}
    return [raw.get(name, defaults[name]) for name in SETTINGS]
