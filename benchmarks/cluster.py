"""Step latency between machines: ours against diffusers' context parallelism, on emulated machines with shaped links.

    python benchmarks/cluster.py --raw cells.jsonl --out grid                      the whole grid (root needed)
    python benchmarks/cluster.py --estimate                                        what it would take, cell by cell
    python benchmarks/cluster.py --layouts 2x2 --rates 200mbit --models flux --rounds 3 --contenders ours ulysses

A cell is machines x ranks, the rate of every machine's uplink, and a model (benchmarks/cluster_models.py). The ranks of
a layout start once in a wave; link rates change under the running job, contenders of a cell take turns (A B C A B C),
and every output is compared with one process. "ours" is what a user types, topology="auto": the planner's choice on
links that its compile measured in half a second; "ours, tuned" is given what doctor --measure finds in the same job;
"ours torus" and so on are forced. Peers: benchmarks/cluster_peers.py and cluster_hand_peers.py. One thread a rank, the
same weights and inputs for all. On one machine (1x4) there is no uplink, so one rate stands for all.

The limit of a cell is the larger of compute alone (communication replaced by nothing, all ranks at once) and the least
bytes of any of our schedules over the payload rate of an uplink. Where the planner shards less than the forced
schedules do (it computes more and sends less), that has a limit of its own, and the cell's is the lower one. What a
step of ours loses to is read off traced steps (cluster_times.py).

The whole grid is 119 cells of up to 14 contenders, by guess five hours on two quiet cores (--estimate says it cell by
cell): those that decide most come first, 16 cells in 40 minutes (cluster_grid.py), and each is a line when it is there,
with the time that is left. Tables, CSV and picture are written after every wave, and when the run is stopped (Ctrl-C,
or --minutes). With --raw, cells that are in the file already, with the same settings, are not run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster_cell import LAYOUTS, MODELS, PEERS, RATES, SETTINGS, Cell, read, settings_of
from cluster_grid import Clock, Planned, guess_s, jobs, minutes, planned
from cluster_report import summary
from emulated_machines import emulated_machines

HERE = Path(__file__).resolve().parent
CONTENDERS = 14
"""Ours typed, tuned and forced; diffusers three times, yunchang, two by hand; compute alone twice."""


class Grid:
    """The cells of a run: which are known, which are left, and about how long those take."""

    def __init__(self, args: argparse.Namespace, results: Path) -> None:
        self.args, self.results = args, results
        self.wanted = planned(args.layouts, args.rates, args.models)
        self.settings = settings_of(vars(args))
        known = {(cell.raw["layout"], cell.raw["rate"], cell.raw["model"]) for cell in self.cells()}
        self.left = [cell for cell in self.wanted if tuple(cell) not in known]
        contenders = CONTENDERS - (4 + len(PEERS) if args.no_peers else 0)
        if args.contenders:
            contenders = min(contenders, 2 + len(args.contenders))
        self.guesses = [guess_s(cell, contenders, args.rounds, args.scale, args.blocks) for cell in self.left]
        self.clock = Clock(self.guesses)

    def cells(self) -> list[Cell]:
        """What the results file holds of this run's settings."""
        return [Cell(raw) for raw in read(self.results) if settings_of(raw) == self.settings]

    def estimate(self) -> str:
        """What is left to be run, in its order."""
        lines = [
            f"  wave {cell.wave + 1}  {' '.join(cell):<28}about {minutes(guess)}"
            for cell, guess in zip(self.left, self.guesses, strict=True)
        ]
        for wave in sorted({cell.wave for cell in self.left}):
            of_wave = [guess for cell, guess in zip(self.left, self.guesses, strict=True) if cell.wave == wave]
            lines.append(f"  wave {wave + 1}: {len(of_wave)} cells, about {minutes(sum(of_wave))}")
        done = len(self.wanted) - len(self.left)
        lines.append(
            f"{len(self.left)} cells, about {minutes(self.clock.left_s)} on two cores; {done} of {len(self.wanted)} "
            "are there already"
        )
        return "\n".join(lines)

    def hear(self, machine: int, line: str) -> None:
        """A line of a job: those of rank 0 that begin with blanks are for people; a finished cell says what is left."""
        if machine or not line.startswith("  "):
            return
        print(line, flush=True)
        took = re.search(r"; the cell took (\d+) s\)$", line)
        if took is not None and self.clock.left:
            self.clock.done(float(took[1]))
            at = len(self.wanted) - len(self.clock.left)
            print(f"  {at} of {len(self.wanted)} cells, about {minutes(self.clock.left_s)} left", flush=True)

    def head(self) -> str:
        """How the cells were made, for the result file."""
        told = ", ".join(f"{name} {value}" for name, value in zip(SETTINGS, self.settings, strict=True) if value)
        return (
            f"python benchmarks/cluster.py, {datetime.date.today().isoformat()}, {os.cpu_count()} cores, load "
            f"{os.getloadavg()[0]:.1f} at the end; {told}; {len(self.cells())} of {len(self.wanted)} cells"
        )

    def report(self) -> None:
        """The tables of what there is."""
        cells = self.cells()
        if cells:
            summary(cells, self.args.out, self.head())
        else:
            print("no cell has been run")


def job(layout: str, cells: list[Planned], settings: dict[str, Any], folder: Path, grid: Grid | None = None) -> int:
    """Run one job on emulated machines and print what it says; its exit code.

    Args:
        settings: for cluster_rank.py; ``cells`` are all of ``layout``.
    """
    machines, ranks = map(int, layout.split("x"))
    config = folder / "config.json"
    plain = {name: None if isinstance(value, Path) else value for name, value in settings.items()}
    config.write_text(json.dumps(plain | {"cells": [[cell.model, cell.rate] for cell in cells]}))
    env = {
        "SFCOMPILE_LOG": "error",
        "PYTHONWARNINGS": "ignore",
        "GLOG_minloglevel": "2",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    env["SFCOMPILE_CACHE"] = str(folder / "cache")  # what was measured on other links must not count
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])

    def show(machine: int, line: str) -> None:
        if not machine and line.startswith("  "):
            print(line, flush=True)

    with emulated_machines(machines, "10gbit") as cluster:
        heard = show if grid is None else grid.hear
        code, outputs = cluster.torchrun(ranks, [str(HERE / "cluster_rank.py"), str(config)], env, heard)
    if code:
        print("\n".join(f"[machine {i}] {line}" for i, o in enumerate(outputs) for line in o.splitlines()[-100:]))
    return code


def memory(args: argparse.Namespace) -> int:
    """Memory and overhead: ours with more and more layers, and diffusers' Ulysses."""
    settings = vars(args) | {"peers": True, "stop_at": None}
    with tempfile.TemporaryDirectory() as folder:
        for layout in args.layouts:
            print(f"{layout}, {args.models[0]}, {args.rates[0]}", flush=True)
            cases = [("ours", 1, args.steps), ("diffusers ulysses", 1, args.steps), ("ours", 2, 3), ("ours", 4, 3)]
            for name, blocks, steps in cases:
                more = {"contenders": [name], "blocks": blocks, "steps": steps}
                code = job(layout, [], settings | more, Path(folder))
                if code:
                    return code
    return 0


def run(grid: Grid, folder: Path) -> int:
    """Every job of the cells that are left, tables after every wave; the exit code of the first that failed."""
    args = grid.args
    stop_at = None if args.minutes is None else time.time() + 60 * args.minutes
    settings = vars(args) | {"peers": not args.no_peers, "results": str(grid.results), "stop_at": stop_at}
    print(grid.estimate().splitlines()[-1], flush=True)
    wave = 0
    for at, cells in enumerate(jobs(grid.left)):
        if stop_at is not None and time.time() > stop_at:
            print(f"--minutes {args.minutes:g} are over", flush=True)
            break
        if cells[0].wave > wave:
            wave = cells[0].wave
            if at:
                grid.report()
        print(f"{cells[0].layout}: {' '.join(f'{cell.model}/{cell.rate}' for cell in cells)}", flush=True)
        code = job(cells[0].layout, cells, settings, folder, grid)
        if code:
            return code
    return 0


def main() -> int:
    """The command line; the exit code of the first job that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), metavar="NxM", help="machines x ranks")
    parser.add_argument("--rates", nargs="+", default=list(RATES))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument(
        "--contenders", nargs="+", default=[], help='parts of names, "ours" for the planner\'s choice only; default all'
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the token counts, for smoke runs")
    parser.add_argument("--blocks", type=int, default=1, help="so many times the models' one or two blocks")
    parser.add_argument("--inner", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--parts", type=int, nargs="+", default=[], help="cuts of a rank's tokens to try instead")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, help="write OUT.txt, OUT.csv, OUT.png")
    parser.add_argument(
        "--raw", type=Path, help="keep the raw numbers of every cell here; what is there is not run again"
    )
    parser.add_argument("--minutes", type=float, help="begin no cell after so many; the tables are of what there is")
    parser.add_argument("--estimate", action="store_true", help="what is left to run, in its order, and what it takes")
    parser.add_argument("--trace", help="a folder for one traced step of ours per cell: pictures, a Perfetto trace")
    parser.add_argument("--memory", action="store_true", help="peak RSS, heap and Python overhead instead of the grid")
    parser.add_argument("--steps", type=int, default=50, help="with --memory: steps of one contender in one job")
    parser.add_argument("--report-only", action="store_true", help="tables from --raw, nothing is run")
    args = parser.parse_args()
    if args.memory:
        return memory(args)
    with tempfile.TemporaryDirectory() as folder:
        grid = Grid(args, args.raw or Path(folder) / "cells.jsonl")
        if args.estimate:
            print(grid.estimate())
            return 0
        code = 0
        try:
            if not args.report_only:
                code = run(grid, Path(folder))
        except KeyboardInterrupt:
            print("stopped; what there is:", flush=True)
            code = 130
        grid.report()
    return code


if __name__ == "__main__":
    sys.exit(main())
