"""Predicted step time of full-size models on 1 to 128 machines of 8 ranks, as a page with tables and pictures.

    python benchmarks/scaling.py [--out docs/scaling.md] [--pictures docs/pictures] [--csv FILE] [--presets h100-ib]

Nothing runs: a model is traced on the meta device with some of its blocks, planned for each topology by the compiler's
own passes, and played in the simulator (codegen/plan/step.py). Blocks of a kind are alike and follow one another, so
the step of the whole model is that of the traced one, and for each block more the seconds from the second to the third
attention of its kind. About four minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx

from sfcompile.capture.graph import Captured
from sfcompile.codegen.plan.choose_plan import SitePlan
from sfcompile.codegen.plan.step import Step
from sfcompile.commands.meta_model import build_meta_model
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import State
from sfcompile.prediction.predict import each_graph, step_of
from sfcompile.runtime.program.topology import Topology

MACHINES = (1, 2, 4, 8, 16, 32, 64, 128)
INSIDE = 8


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


class Cell(NamedTuple):
    """One prediction, in seconds of the whole model; ``row`` is the plan of its main attention."""

    workload: str
    preset: str
    tokens: int
    machines: int
    plan: str
    batch: int
    kind: str
    step_s: float
    exposed_s: float
    compute_s: float
    efficiency: float
    row: SitePlan | None


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


def predicted(workload: Workload, captured: Captured, tokens: int, machines: int, preset: str) -> Cell:
    """One cell."""
    topology = Topology.parse(f"{machines}x{INSIDE}:{preset}")
    state = State(captured.gm, captured.mode, topology, 0)
    step = step_of(run_pipeline(state), 0, topology)
    seconds, exposed, compute = whole(workload, step)
    main = state.choices.main
    best = main.best if main is not None and step.attention_s else None
    split = state.num_groups
    plan = f"batch {split} x {best}" if split > 1 and best else str(best) if best else "not sharded"
    return Cell(
        workload.title, preset, tokens, machines, plan, split, best.kind if best else "none", seconds, exposed,
        compute, step.limit_s / step.seconds, main if best else None,
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


# ---------------------------------------------------------------------- the page

HEAD = """# Predicted scaling, 1 to 128 machines

{date}, written by `python benchmarks/scaling.py` in {minutes:.1f} minutes of CPU time. **Predictions, not measurements:
no GPU was involved.** Two models in bf16 with the whole weights on every rank: an image model of 57 blocks (Flux, 19
with two streams) and a video model of 40 (Wan, a guidance pair as batch 2), at five lengths each, on machines of 8.

**Every constant is assumed**: what machines can do is taken from data sheets and what programs are known to reach
(`runtime/program/presets.py`: `a100-efa`, four 100 Gb/s cards for 8 GPUs), and what
this project's software costs on GPUs (a call 8 us, a message 2 us, a wait 1 us) is assumed within a range until a GPU
was at hand; a plan's own notes say where it would be another one inside the range. Nothing here is the paper's
software.

* *step*: predicted time of one transformer step; *waits*: the part of it in which rank 0 is blocked.
* *efficiency*: the larger of compute alone and bytes over bandwidth, over the step.
* *speed-up*: over one machine. The best of each length is in bold: beyond it more machines only cost.

## What wins where, and why

![Step time](pictures/scaling-step.png)

![Kinds of plans](pictures/scaling-plans.png)

{why}
"""


def write_page(
    path: Path, cells: Sequence[Cell], names: dict[str, str], presets: Sequence[str], minutes: float
) -> None:
    """All tables, with the pictures beside."""
    lines = [HEAD.format(date=datetime.date.today().isoformat(), minutes=minutes, why=reasons(cells))]
    for workload in WORKLOADS:
        for preset in presets:
            lines += [
                f"\n## {names.get(workload.title, workload.model)}, {workload.blocks} blocks, batch {workload.batch}, "
                f"`{preset}`\n",
                "| tokens | machines | ranks | plan | step ms | waits | efficiency | speed-up |",
                "|---:|---:|---:|---|---:|---:|---:|---:|",
            ]
            for tokens in workload.lengths:
                row = [c for c in cells if (c.workload, c.preset, c.tokens) == (workload.title, preset, tokens)]
                if not row:
                    continue
                best = min(row, key=lambda cell: cell.step_s)
                for cell in row:
                    speed_up = f"{row[0].step_s * row[0].machines / cell.step_s:.2f}"
                    lines.append(
                        f"| {tokens} | {cell.machines} | {INSIDE * cell.machines} | {cell.plan} "
                        f"| {cell.step_s * 1e3:.1f} | {cell.exposed_s / cell.step_s:.0%} | {cell.efficiency:.0%} "
                        f"| {'**' + speed_up + '**' if cell is best else speed_up} |"
                    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


WHY = {
    "none": "every rank computes the whole model: there are too few tokens for what messages and calls cost",
    "ulysses": "heads alone are split: one machine's links carry the all-to-all at once, and there is no ring to walk",
    "usp": "Ulysses and a ring without stages: few calls and messages, where links are fast enough to wait for",
    "tas": "Ulysses across machines, the ring inside them, without stages: least bytes between machines, and half the "
    "calls of the torus, which count where a chunk is attended in microseconds",
    "torus": "staged: a chunk is attended while the next travels; pays where an attention call is long against its "
    "start, and links are the limit",
    "ring": "keys and values go round: heads are too few to split",
    "allgather": "only keys and values travel, once to each machine",
}


def reasons(cells: Sequence[Cell]) -> str:
    """For each kind of plan: how often it is taken, where, and why."""
    lines = []
    for kind, why in WHY.items():
        taken = [cell for cell in cells if cell.kind == kind]
        if taken:
            few, many = min(c.machines for c in taken), max(c.machines for c in taken)
            where = f"{few} to {many} machines" if few != many else f"{few} machine{'s' * (few > 1)}"
            lines.append(f"* **{kind}**, {len(taken)} of {len(cells)} cells, {where}: {why}.")
    return "\n".join(lines)


def draw_steps(path: Path, cells: Sequence[Cell], presets: Sequence[str]) -> None:
    """Step over machines, a line for each length; the ideal is the dotted line."""
    figure, axes = _grid("Predicted step of a transformer, one to 128 machines of 8 ranks (assumed constants)", presets)
    for axis, workload, preset, mine in _panels(axes, cells, presets):
        for tokens in workload.lengths:
            row = [cell for cell in mine if cell.tokens == tokens]
            if row:
                (line,) = axis.plot([c.machines for c in row], [c.step_s for c in row], "o-", ms=3, label=f"{tokens}")
                ideal = [row[0].step_s * row[0].machines / c.machines for c in row]
                axis.plot([c.machines for c in row], ideal, ":", lw=0.8, color=line.get_color())
        axis.set(xscale="log", yscale="log", xlabel="machines", ylabel="step, seconds")
        axis.set_title(f"{workload.title}, {preset}", fontsize=10)
        axis.set_xticks(list(MACHINES), [str(m) for m in MACHINES])
        axis.legend(title="tokens", fontsize=7, title_fontsize=7)
    figure.savefig(path, dpi=110)


def draw_plans(path: Path, cells: Sequence[Cell], presets: Sequence[str]) -> None:
    """Which kind of plan is taken, length by machines; the number is the efficiency."""
    from matplotlib.patches import Rectangle

    colours = dict(zip(WHY, ("#bbbbbb", "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#edc948"), strict=True))
    figure, axes = _grid("Kind of plan that wins, and its efficiency (limit over step)", presets)
    for axis, workload, preset, mine in _panels(axes, cells, presets):
        for cell in mine:
            at = MACHINES.index(cell.machines), workload.lengths.index(cell.tokens)
            axis.add_patch(Rectangle(at, 1, 1, color=colours[cell.kind], alpha=0.85, ec="white"))
            split = f"{cell.batch} x " if cell.batch > 1 else ""
            text = f"{split}{cell.kind}\n{cell.efficiency:.0%}"
            axis.text(at[0] + 0.5, at[1] + 0.5, text, ha="center", va="center", fontsize=6.5)
        axis.set(xlim=(0, len(MACHINES)), ylim=(0, len(workload.lengths)), xlabel="machines", ylabel="tokens")
        axis.set_xticks([at + 0.5 for at in range(len(MACHINES))], [str(m) for m in MACHINES])
        axis.set_yticks([at + 0.5 for at in range(len(workload.lengths))], [str(n) for n in workload.lengths])
        axis.set_title(f"{workload.title}, {preset}", fontsize=10)
    figure.savefig(path, dpi=110)


def _grid(title: str, presets: Sequence[str]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = len(WORKLOADS), len(presets)
    if size[1] == 1:  # one panel beside the other
        figure, axes = pyplot.subplots(1, size[0], figsize=(11, 4.5), layout="constrained", squeeze=False)
        axes = axes.T
    else:
        figure, axes = pyplot.subplots(*size, figsize=(11, 8), layout="constrained", squeeze=False)
    figure.suptitle(title)
    return figure, axes


def _panels(axes: Any, cells: Sequence[Cell], presets: Sequence[str]) -> list[tuple[Any, Workload, str, list[Cell]]]:
    return [
        (
            axes[row][column], workload, preset,
            [cell for cell in cells if (cell.workload, cell.preset) == (workload.title, preset)],
        )
        for row, workload in enumerate(WORKLOADS)
        for column, preset in enumerate(presets)
    ]  # fmt: skip


def main() -> None:
    """Everything, cell by cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page")
    parser.add_argument("--pictures", type=Path, help="a folder for both pictures")
    parser.add_argument("--csv", type=Path, help="all cells")
    parser.add_argument("--machines", type=int, nargs="+", default=list(MACHINES), choices=MACHINES)
    parser.add_argument("--lengths", type=int, default=5, help="so many of the lengths, the short ones")
    parser.add_argument("--presets", nargs="+", default=["a100-efa"], help="of runtime/program/presets.py")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    cells: list[Cell] = []
    names: dict[str, str] = {}
    began = time.process_time()
    for workload in WORKLOADS:
        for tokens in workload.lengths[: args.lengths]:
            names[workload.title], captured = trace(workload, tokens)
            for preset in args.presets:
                for machines in args.machines:
                    start = time.process_time()
                    cells.append(cell := predicted(workload, captured, tokens, machines, preset))
                    taken = f"{time.process_time() - start:.1f} s of CPU time"
                    where = f"{workload.title} {tokens} {preset} {machines}"
                    print(f"{where}: {cell.plan}, {cell.step_s:.4f} s, {taken}", flush=True)
    minutes = (time.process_time() - began) / 60
    print(f"{len(cells)} cells in {minutes:.1f} minutes of CPU time")
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([field for field in Cell._fields if field != "row"])
            table.writerows([value for field, value in cell._asdict().items() if field != "row"] for cell in cells)
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        draw_steps(args.pictures / "scaling-step.png", cells, args.presets)
        draw_plans(args.pictures / "scaling-plans.png", cells, args.presets)
    if args.out:
        write_page(args.out, cells, names, args.presets, minutes)


if __name__ == "__main__":
    main()
