"""Predicted step time of full-size models on 1 to 128 machines of 8 ranks, as a page with tables and pictures.

    python benchmarks/scaling.py [--out docs/scaling.md] [--pictures docs/pictures] [--csv FILE] [--presets h100-ib]
                                 [--workloads image] [--machines 1 2] [--lengths 2]

Nothing runs: a model is traced on the meta device with some of its blocks, planned for each topology by the compiler's
own passes, and played in the simulator (codegen/plan/step.py). Blocks of a kind are alike and follow one another, so
the step of the whole model is that of the traced one, and for each block more the seconds from the second to the third
attention of its kind. The 80 cells of one preset take about ten minutes of CPU time, each a line when it is there;
with ``--csv`` a run that was cut goes on where it stopped. The page is written by scaling_page.py.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import scaling_page
import torch
from scaling_page import INSIDE, MACHINES, Cell
from torch import fx

from sfcompile.capture.graph import Captured
from sfcompile.codegen.plan.step import Step
from sfcompile.commands.meta_model import build_meta_model
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import State
from sfcompile.prediction.predict import each_graph, step_of
from sfcompile.runtime.program.topology import Topology


@dataclass(frozen=True)
class Kind:
    """Blocks of one kind, in a row: how many the model has, and how many are traced (three at least)."""

    field: str
    blocks: int
    traced: int = 3


@dataclass(frozen=True)
class Workload:
    """A model, and what it is called with. ``batch`` 2 is a guidance pair."""

    title: str
    model: str
    kinds: tuple[Kind, ...]
    batch: int
    lengths: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return sum(kind.blocks for kind in self.kinds)


WORKLOADS = (
    Workload(
        "image", "flux", (Kind("num_layers", 19), Kind("num_single_layers", 38)), 1,
        (4096, 16384, 36864, 65536, 147456),
    ),
    Workload("video", "wan", (Kind("num_layers", 40),), 2, (8192, 32760, 75600, 151200, 302400)),
)  # fmt: skip


def trace(workload: Workload, tokens: int) -> tuple[str, Captured]:
    """The model's name, and its graph with as many blocks as are traced, in bf16."""
    built = build_meta_model(
        workload.model, tokens, workload.batch, config={kind.field: kind.traced for kind in workload.kinds}
    )
    graphs: list[Captured] = []

    def visit(gm: fx.GraphModule, captured: Captured) -> None:
        graphs.append(captured)

    kwargs = {name: _half(value) for name, value in built.kwargs.items()}
    each_graph(torch.nn.Module.to(built.model, torch.bfloat16), (), kwargs, visit)
    if len(graphs) != 1:
        raise SystemExit(f"{built.class_name} has {len(graphs)} graphs; this page adds up blocks of one")
    return built.class_name, graphs[0]


def _half(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_half(entry) for entry in value)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(torch.bfloat16)
    return value


def predicted(workload: Workload, name: str, captured: Captured, tokens: int, machines: int, preset: str) -> Cell:
    """One cell, of a model's class and graph."""
    began = time.process_time()
    topology = Topology.parse(f"{machines}x{INSIDE}:{preset}")
    state = State(captured.gm, captured.mode, topology, 0)
    step = step_of(run_pipeline(state), 0, topology)
    seconds, exposed, compute = whole(workload, step)
    main = state.choices.main
    best = main.best if main is not None and step.attention_s else None
    split, copies = (state.group.batch, state.group.copies) if state.group is not None else (1, 1)
    plan = (
        f"{f'batch {split} x ' if split > 1 else ''}{best or 'not sharded'}{f', {copies} copies' if copies > 1 else ''}"
    )
    return Cell(
        workload.title, name, workload.blocks, workload.batch, preset, tokens, machines, plan, split,
        best.kind if best else "none", seconds, exposed, compute, seconds * step.limit_s / step.seconds,
        time.process_time() - began,
    )  # fmt: skip


def whole(workload: Workload, step: Step) -> tuple[float, float, float]:
    """Seconds, exposed seconds and attention's compute of all blocks, from a step of those that were traced."""
    spent = step.attention_s
    totals = [step.seconds, step.exposed_s, sum(float(times.attend_s[0]) for times in step.stages)]
    heaviest = max(spent, key=spent.__getitem__, default=None)
    ends: dict[Any, tuple[float, float, float]] = {}  # by call of the main attention: all three when it ends
    exposed = computed = 0.0
    for times in step.stages:
        exposed += times.waits_s
        computed += float(times.attend_s[0])
        if id(times.schedule) == heaviest:
            ends[times.stage.program, times.stage.site] = float(times.stop_s[0]), exposed, computed
    marks = list(ends.values())
    traced = sum(kind.traced for kind in workload.kinds)
    if len(marks) != traced:  # beyond what pays every rank computes some blocks whole: take the mean block
        share = workload.blocks / traced
        return totals[0] * share, totals[1] * share, totals[2] * share
    first = 0
    for kind in workload.kinds:
        last = first + kind.traced - 1
        for at in range(3):
            totals[at] += (kind.blocks - kind.traced) * (marks[last][at] - marks[last - 1][at])
        first += kind.traced
    return totals[0], totals[1], totals[2]


def read_csv(path: Path) -> list[Cell]:
    """The cells of an earlier run; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [Cell(*(kind(row[name]) for name, kind in get_type_hints(Cell).items())) for row in csv.DictReader(file)]


def append_csv(path: Path, cell: Cell) -> None:
    """One more line; the names of the columns before the first."""
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        if fresh:
            table.writerow(Cell._fields)
        table.writerow(cell)


def run(args: argparse.Namespace, known: list[Cell]) -> Iterator[Cell]:
    """The cells that are not known, in order; a model is traced once for each length."""
    done = {cell.key for cell in known}
    for workload in (workload for workload in WORKLOADS if workload.title in args.workloads):
        for tokens in workload.lengths[: args.lengths]:
            wanted = [
                (preset, machines)
                for preset in args.presets
                for machines in args.machines
                if (workload.title, preset, tokens, machines) not in done
            ]
            if wanted:
                name, captured = trace(workload, tokens)
            for preset, machines in wanted:
                yield predicted(workload, name, captured, tokens, machines, preset)


def main() -> None:
    """Everything, cell by cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page")
    parser.add_argument("--pictures", type=Path, help="a folder for both pictures")
    parser.add_argument("--csv", type=Path, help="all cells; those that are there already are not predicted again")
    parser.add_argument("--machines", type=int, nargs="+", default=list(MACHINES), choices=MACHINES)
    parser.add_argument("--lengths", type=int, default=5, help="so many of the lengths, the short ones")
    titles = [workload.title for workload in WORKLOADS]
    parser.add_argument("--workloads", nargs="+", default=titles, choices=titles)
    parser.add_argument("--presets", nargs="+", default=["a100-efa"], help="of runtime/program/presets.py")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    cells = read_csv(args.csv) if args.csv else []
    total = sum(len(w.lengths[: args.lengths]) for w in WORKLOADS if w.title in args.workloads)
    total *= len(args.presets) * len(args.machines)
    for cell in run(args, list(cells)):
        cells.append(cell)
        if args.csv:
            append_csv(args.csv, cell)
        print(
            f"{len(cells)} of {total}: {' '.join(map(str, cell.key))}: {cell.plan}, {cell.step_s:.4f} s, limit "
            f"{cell.limit_s:.4f} s; {cell.cpu_s:.1f} s of CPU time", flush=True,
        )  # fmt: skip
    cells.sort(key=lambda cell: (titles.index(cell.workload), *cell.key[1:]))
    print(f"{len(cells)} cells in {sum(cell.cpu_s for cell in cells) / 60:.1f} minutes of CPU time")
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        scaling_page.draw_steps(args.pictures / "scaling-step.png", cells)
        scaling_page.draw_plans(args.pictures / "scaling-plans.png", cells)
    if args.out:
        args.out.write_text(scaling_page.page(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
