"""The page of benchmarks/scaling.py: its cells as tables and pictures, and what wins where."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MACHINES = (1, 2, 4, 8, 16, 32, 64, 128)
INSIDE = 8
"""Ranks of a machine."""


class Cell(NamedTuple):
    """One prediction.

    ``model`` is a class of so many blocks, called with a batch of ``samples``; ``plan`` is that of its main attention,
    whose batch is split ``split`` ways. Seconds are of a step of the whole model on rank 0: the step, the waits in it,
    the attention computed in it, and what no order of this work and these bytes can beat; ``cpu_s`` is what the
    prediction took.
    """

    workload: str
    model: str
    blocks: int
    samples: int
    preset: str
    tokens: int
    machines: int
    plan: str
    split: int
    kind: str
    step_s: float
    exposed_s: float
    compute_s: float
    limit_s: float
    cpu_s: float

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Which cell it is."""
        return self.workload, self.preset, self.tokens, self.machines

    @property
    def efficiency(self) -> float:
        """The limit over the step."""
        return self.limit_s / self.step_s

    @property
    def waits(self) -> float:
        """The part of the step in which rank 0 is blocked."""
        return self.exposed_s / self.step_s


HEAD = """# Predicted scaling, 1 to {most} machines

{date}, written by `python benchmarks/scaling.py` in {minutes:.0f} minutes of CPU time. **Predictions, not measurements:
no GPU was involved.** {models}, at {lengths} lengths each, in bf16, with the whole weights on every rank, on machines
of {inside} ranks.

**Every constant is assumed**, none was measured by us. What machines can do is taken from data sheets and from what
programs are known to reach of them (`runtime/program/presets.py`; `a100-efa` is 8 GPUs behind four 100 Gb/s cards).
What this project's software costs on GPUs is assumed within a range: an attention call {launch} us, a message {message}
us, a wait {wait} us; an explanation ([looking](looking.md)) says of a plan where it would be another one inside the
range. Nothing here is the paper's software.

* *step*: predicted time of one transformer step. *waits*: the part of it in which rank 0 is blocked.
* *limit*: the larger of compute alone and bytes over bandwidth, for the plan that was taken; no order of that work
  beats it. *efficiency*: limit over step.
* *speed-up*: over one machine. The best of each length is in bold: beyond it more machines only cost.
* *plan*: kind, Ulysses x ring; "across" is the axis that crosses machines, "by n" in n lanes, "2Q 2KV" the chunks cut
  in two; "batch 2 x": each half of the ranks takes a sample; "2 copies": two groups of machines compute the same each,
  because together they would be slower, so further machines neither help nor harm.

## What wins where, and why

![Step time](pictures/scaling-step.png)

![Kinds of plans](pictures/scaling-plans.png)

{why}
"""


def page(cells: Sequence[Cell]) -> str:
    """All tables; the pictures are drawn by :func:`draw_steps` and :func:`draw_plans`."""
    from sfcompile.runtime.program.presets import SOFTWARE

    costs = SOFTWARE["nvshmem"]
    lines = [
        HEAD.format(
            date=datetime.date.today().isoformat(), minutes=sum(cell.cpu_s for cell in cells) / 60, inside=INSIDE,
            most=max(cell.machines for cell in cells), why=reasons(cells),
            lengths=max(len(_lengths(panel)) for panel in _panels(cells)),
            models=" and ".join(
                f"{first.model} ({first.workload}, {first.blocks} blocks, batch {first.samples})"
                for (first, *_) in _panels(cells)
            ),
            **{name: f"{costs[f'{name}_s'].value * 1e6:g}" for name in ("launch", "message", "wait")},
        )
    ]  # fmt: skip
    for panel in _panels(cells):
        first = panel[0]
        lines += [
            f"\n## {first.model}, {first.blocks} blocks, batch {first.samples}, `{first.preset}`\n",
            "| tokens | machines | ranks | plan | step ms | limit ms | efficiency | waits | speed-up |",
            "|---:|---:|---:|---|---:|---:|---:|---:|---:|",
        ]
        for tokens in _lengths(panel):
            row = [cell for cell in panel if cell.tokens == tokens]
            best = min(row, key=lambda cell: cell.step_s)
            for cell in row:
                speed_up = f"{_alone(row) / cell.step_s:.2f}"
                lines.append(
                    f"| {tokens} | {cell.machines} | {INSIDE * cell.machines} | {cell.plan} "
                    f"| {cell.step_s * 1e3:.1f} | {cell.limit_s * 1e3:.1f} | {cell.efficiency:.0%} | {cell.waits:.0%} "
                    f"| {'**' + speed_up + '**' if cell is best else speed_up} |"
                )
    return "\n".join(lines) + "\n"


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
    """For each kind of plan: how often it is taken, where, and why; and how far each length scales."""
    lines = []
    for kind, why in WHY.items():
        taken = [cell for cell in cells if cell.kind == kind]
        if taken:
            few, many = min(c.machines for c in taken), max(c.machines for c in taken)
            where = f"{few} to {many} machines" if few != many else f"{few} machine{'s' * (few > 1)}"
            mean = statistics.mean(cell.efficiency for cell in taken), statistics.mean(cell.waits for cell in taken)
            lines.append(
                f"* **{kind}**, {len(taken)} of {len(cells)} cells, {where}: {why}. Mean efficiency {mean[0]:.0%}, "
                f"{mean[1]:.0%} of the step in waits."
            )
    for panel in _panels(cells):
        ends = []
        for tokens in _lengths(panel):
            row = [cell for cell in panel if cell.tokens == tokens]
            best = min(row, key=lambda cell: cell.step_s)
            ends.append(f"{tokens} tokens to {best.machines} ({_alone(row) / best.step_s:.1f}x)")
        lines.append(f"* How far it pays to go, in machines, {panel[0].workload}: {', '.join(ends)}.")
    return "\n".join(lines)


def draw_steps(path: Path, cells: Sequence[Cell]) -> None:
    """Step over machines, a line for each length; dashed its limit, dotted an even share of the fewest machines."""
    figure, axes = _grid("Predicted step of a transformer on machines of 8 ranks (assumed constants)", cells)
    for axis, panel in zip(axes, _panels(cells), strict=True):
        for tokens in _lengths(panel):
            row = [cell for cell in panel if cell.tokens == tokens]
            machines = [cell.machines for cell in row]
            (line,) = axis.plot(machines, [c.step_s for c in row], "o-", ms=3, label=f"{tokens} tokens")
            axis.plot(machines, [c.limit_s for c in row], "--", lw=0.9, color=line.get_color())
            axis.plot(machines, [_alone(row) / m for m in machines], ":", lw=0.9, color=line.get_color())
        axis.plot([], [], "k--", lw=0.9, label="limit")
        axis.plot([], [], "k:", lw=0.9, label="even share")
        axis.set(xscale="log", yscale="log", xlabel="machines", ylabel="step, seconds")
        axis.set_title(f"{panel[0].workload}, {panel[0].model}, {panel[0].preset}", fontsize=10)
        axis.set_xticks(list(MACHINES), [str(m) for m in MACHINES])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def draw_plans(path: Path, cells: Sequence[Cell]) -> None:
    """Which kind of plan is taken, length by machines; the number is the efficiency."""
    from matplotlib.patches import Patch, Rectangle

    palette = ("#bbbbbb", "#7fb3d5", "#f5b971", "#8fc98f", "#e88b8b", "#c9a0c4", "#f0dc82")
    colours = dict(zip(WHY, palette, strict=True))
    figure, axes = _grid("Kind of plan that wins, and its efficiency: limit over step (assumed constants)", cells)
    for axis, panel in zip(axes, _panels(cells), strict=True):
        lengths, machines = _lengths(panel), [m for m in MACHINES if any(cell.machines == m for cell in panel)]
        for cell in panel:
            at = machines.index(cell.machines), lengths.index(cell.tokens)
            axis.add_patch(Rectangle(at, 1, 1, facecolor=colours[cell.kind], edgecolor="white"))
            split = f"{cell.split} x " if cell.split > 1 else ""
            text = f"{split}{cell.kind}\n{cell.efficiency:.0%}"
            axis.text(at[0] + 0.5, at[1] + 0.5, text, ha="center", va="center", fontsize=7)
        axis.set(xlim=(0, len(machines)), ylim=(0, len(lengths)), xlabel="machines", ylabel="tokens")
        axis.set_xticks([at + 0.5 for at in range(len(machines))], [str(m) for m in machines])
        axis.set_yticks([at + 0.5 for at in range(len(lengths))], [str(n) for n in lengths])
        axis.set_title(f"{panel[0].workload}, {panel[0].model}, {panel[0].preset}", fontsize=10)
    taken = [kind for kind in WHY if any(cell.kind == kind for cell in cells)]
    figure.legend(
        handles=[Patch(color=colours[kind], label=kind) for kind in taken], loc="outside lower center",
        ncols=len(taken), fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=110)


def _alone(row: Sequence[Cell]) -> float:
    """Seconds on one machine; of a row that begins with more, as if it had scaled evenly so far."""
    return row[0].step_s * row[0].machines


def _lengths(cells: Sequence[Cell]) -> list[int]:
    return sorted({cell.tokens for cell in cells})


def _panels(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """The cells of each model and preset."""
    for key in dict.fromkeys((cell.workload, cell.preset) for cell in cells):
        yield [cell for cell in cells if (cell.workload, cell.preset) == key]


def _grid(title: str, cells: Sequence[Cell]) -> tuple[Any, Any]:
    """A figure with a panel for each model and preset, two in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = sum(1 for _ in _panels(cells))
    rows, columns = -(-count // 2), min(count, 2)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(7.5 * columns, 4.8 * rows), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes.flat[:count]
