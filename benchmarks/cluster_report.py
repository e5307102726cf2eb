"""The tables, the CSV and the picture of benchmarks/cluster.py's cells."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path

from cluster_cell import LAYOUTS, MODELS, RATES, TUNED, USP, Cell
from cluster_times import BESIDE, PARTS

WORDS = """Words. A cell is machines x ranks, the rate of every machine's uplink, a model, what runs inside ("eager").
  ours            what a user types: the planner's choice on links that its compile measured
  ours, tuned     the planner's choice on links that doctor --measure found in the same job
  torus, ...      ours with that schedule forced, every attention sharded
  dif, yun        diffusers' context parallelism; yunchang's USP under the same plan
  compute alone   communication replaced by nothing, all ranks at once, forced Ulysses; "alone": ours, if it shards less
  limit           the larger of compute alone and of the bytes over an uplink's payload rate (wire)
  effic.          limit / ours
  best peer, USP  a peer's seconds over ours: above 1 ours is faster
  regret          ours over the fastest forced schedule, less one: below zero the planner's choice is the fastest of all
  waits/layer     seconds in which the most blocked rank waits, per attention or exchange
  error           largest difference from one process, over the largest magnitude
  n/a             the contender cannot run that cell
"""


def times(ratio: float) -> str:
    """A ratio for people."""
    return f"{ratio:.2f}x" if ratio == ratio else "n/a"


def groups(cells: list[Cell]) -> list[str]:
    """Per layout and rate, over the models: peers' seconds over ours, and the limit over ours."""
    lines = [f"{'machines x ranks, uplink':<28}{'best peer: mean, least':>26}{'USP: mean, most':>20}{'effic.':>10}"]
    for layout, rate in dict.fromkeys(cell.key[:2] for cell in cells):
        here = [cell for cell in cells if cell.key[:2] == (layout, rate)]
        best = [cell.over() for cell in here if cell.peers]
        usp = [cell.over(USP) for cell in here if USP in cell.peers]
        peers = f"{times(statistics.mean(best))}, {times(min(best))}" if best else "n/a"
        placed = f"{times(statistics.mean(usp))}, {times(max(usp))}" if usp else "n/a"
        efficiency = statistics.mean(cell.efficiency for cell in here)
        lines.append(f"{f'{layout}, {rate}':<28}{peers:>26}{placed:>20}{efficiency:>10.2f}")
    return [*lines, ""]


def seconds_table(cells: list[Cell]) -> list[str]:
    """Every contender's step."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.medians))
    head = f"{'cell':<36}" + "".join(
        f"{name.replace('diffusers', 'dif').replace('yunchang', 'yun').replace('ours ', ''):>16}" for name in names
    )
    lines = ["seconds a step, the slowest rank: median of the rounds (half the spread)", head]
    for cell in cells:
        text = f"{' '.join(cell.key):<36}"
        for name in names:
            took = cell.rows.get(name, {}).get("seconds")
            text += f"{f'{statistics.median(took):.3f}({(max(took) - min(took)) / 2:.2f})' if took else 'n/a':>16}"
        lines.append(text)
    return [*lines, ""]


def limits_table(cells: list[Cell]) -> list[str]:
    """Every cell against its limit and its peers."""
    columns = ("limit", "wire", "alone", "effic.", "best peer", "USP", "regret", "waits/layer", "error")
    lines = [f"{'cell':<36}" + "".join(f"{name:>12}" for name in columns) + "  plan"]
    for cell in cells:
        mine = cell.rows.get("ours", {})
        exposed = (
            statistics.median(mine["blocked"]) / max(1, cell.raw["sites"]) if mine.get("blocked") else float("nan")
        )
        worst = max((row["error"] for row in cell.rows.values() if row["error"] == row["error"]), default=float("nan"))
        values = (
            *(f"{seconds:.3f}" for seconds in cell.limits),
            f"{cell.efficiency:.2f}", times(cell.over()), times(cell.over(USP)),
            f"{cell.regret:+.0%}" if cell.forced else "n/a",
            f"{exposed * 1e3:.0f} ms", f"{worst:.0e}",
        )  # fmt: skip
        lines.append(f"{' '.join(cell.key):<36}" + "".join(f"{v:>12}" for v in values) + f"  {mine.get('plan', '')}")
    return [*lines, ""]


def times_table(cells: list[Cell]) -> list[str]:
    """Where a step of ours goes: what it loses against its limit, and to what."""
    known = [cell for cell in cells if cell.times]
    if not known:
        return []
    names = (*PARTS, *BESIDE)
    lines = [
        "where a step of ours goes: seconds of the slowest rank, means of traced steps (other steps than those above)",
        *(f"  {name:<12}{what}" for name, what in (PARTS | BESIDE).items()),
        f"{'cell':<36}" + "".join(f"{name:>11}" for name in ("step", "limit", *names)),
    ]
    for cell in known:
        values = [cell.times["step"], cell.limit_s, *(cell.times.get(name, float("nan")) for name in names)]
        lines.append(f"{' '.join(cell.key):<36}" + "".join(f"{value:>11.3f}" for value in values))
    mean = {name: statistics.mean(cell.times.get(name, 0.0) / cell.times["step"] for cell in known) for name in names}
    lines.append(f"{'mean, parts of the step':<58}" + "".join(f"{mean[name]:>11.1%}" for name in names))
    return [*lines, ""]


def verdicts(cells: list[Cell]) -> list[str]:
    """A line for each claim."""
    lines = []
    slow = [cell for cell in cells if cell.slow and cell.peers]
    if slow:
        usp = [cell.over(USP) for cell in slow if USP in cell.peers]
        best = [cell.over() for cell in slow]
        if usp:
            lines.append(f"100 and 200 mbit, against USP: mean {statistics.mean(usp):.2f}x, best {max(usp):.2f}x")
        lines.append(
            f"100 and 200 mbit, against the best peer: mean {statistics.mean(best):.2f}x, least {min(best):.2f}x"
        )
    every = [cell.over() for cell in cells if cell.peers]
    if every:
        lines.append(f"all cells, against the best peer: least {min(every):.2f}x, mean {statistics.mean(every):.2f}x")
    efficiency = [cell.efficiency for cell in cells]
    lines.append(f"efficiency against the limit: mean {statistics.mean(efficiency):.2f}, least {min(efficiency):.2f}")
    regrets = [cell.regret for cell in cells if cell.forced]
    if regrets:
        lines.append(f"regret of the planner's pick: largest {max(regrets):+.0%}")
    typed = [cell.ours / cell.medians[TUNED] for cell in cells if TUNED in cell.medians]
    if typed:
        lines.append(f"as typed over tuned: mean {statistics.mean(typed):.2f}, most {max(typed):.2f}")
    return lines


def report(cells: list[Cell]) -> str:
    """The tables of cells with one thing inside."""
    tables = (seconds_table(cells), limits_table(cells), times_table(cells), groups(cells), verdicts(cells))
    return "\n".join(line for table in tables for line in table)


def write_csv(path: Path, cells: list[Cell]) -> None:
    """One line per cell and contender; where a step goes is said of ours."""
    names = ("step", *PARTS, *BESIDE)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(
            ["layout", "rate", "model", "inner", "contender", "plan", "median_s", "min_s", "max_s", "rounds",
             "blocked_s", "across_bytes", "error", "limit_s", *(f"{name.replace(' ', '_')}_s" for name in names)]
        )  # fmt: skip
        for cell in cells:
            for name, row in cell.rows.items():
                took = row["seconds"]
                if took:
                    where = [
                        f"{cell.times[part]:.4f}" if name == "ours" and part in cell.times else "" for part in names
                    ]
                    out.writerow(
                        [*cell.key, name, row["plan"], f"{statistics.median(took):.4f}", f"{min(took):.4f}",
                         f"{max(took):.4f}", len(took), f"{statistics.median(row['blocked']):.4f}",
                         row["across_bytes"] or "", f"{row['error']:.1e}", f"{cell.limit_s:.4f}", *where]
                    )  # fmt: skip


SHOWN = {
    "ours": "ours, as typed", "diffusers ulysses": "diffusers Ulysses", "diffusers ring": "diffusers ring",
    USP: "diffusers USP", "yunchang usp": "yunchang USP", "chunked ulysses": "chunked Ulysses",
    "gathered kv": "gathered K/V",
}  # fmt: skip
"""The contenders of the picture."""


def draw(path: Path, cells: list[Cell]) -> None:
    """One panel per layout and model: seconds a step by link rate, one axis of seconds for each layout.

    A contender that cannot run a cell has "n/a" in place of its bar; one that no cell has is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layouts = list(dict.fromkeys(cell.key[0] for cell in cells))
    models = list(dict.fromkeys(cell.key[2] for cell in cells))
    shown = {name: label for name, label in SHOWN.items() if any(name in cell.medians for cell in cells)}
    figure, axes = plt.subplots(
        len(layouts), len(models), figsize=(max(6.0, 3.2 * len(models)), 3.0 * len(layouts) + 0.8), squeeze=False,
        layout="constrained", sharey="row",
    )  # fmt: skip
    width = 0.8 / len(shown)
    colours = plt.get_cmap("tab10").colors
    for i, layout in enumerate(layouts):
        for j, model in enumerate(models):
            axis, here = axes[i][j], [cell for cell in cells if (cell.key[0], cell.key[2]) == (layout, model)]
            if not here:
                axis.axis("off")
                continue
            for n, name in enumerate(shown):
                at = [x + (n + 0.5) * width for x in range(len(here))]
                ran = [(x, cell.medians[name]) for x, cell in zip(at, here, strict=True) if name in cell.medians]
                axis.bar([x for x, _ in ran], [height for _, height in ran], width, color=colours[n])
                for x, cell in zip(at, here, strict=True):
                    if name not in cell.medians:
                        word = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 9, "weight": "bold"}
                        word["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                        axis.text(x, 0, " n/a", color=colours[n], zorder=3, **word)
            for x, cell in enumerate(here):
                axis.plot([x, x + 0.8], [cell.limit_s] * 2, "k--", linewidth=1, zorder=2)
            links = ["no uplink" if cell.raw["machines"] == 1 else cell.key[1] for cell in here]
            axis.set_xticks([x + 0.4 for x in range(len(here))], links)
            axis.set_title(f"{model}, {layout}", fontsize=10)
        axes[i][0].set_ylabel("seconds a step")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[n]) for n in range(len(shown))]
    handles.append(plt.Line2D([], [], color="k", linestyle="--", linewidth=1))
    figure.legend(handles, [*shown.values(), "limit"], loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def summary(cells: list[Cell], out: Path | None, head: str = "") -> None:
    """Print, and write OUT.txt, OUT.csv and OUT.png if ``out`` is given; ``head`` says how the cells were made."""
    order = {name: i for i, name in enumerate((*LAYOUTS, *RATES, *MODELS))}
    cells = sorted(cells, key=lambda cell: [order.get(part, -1) for part in cell.key])
    by_inner = defaultdict(list)
    for cell in cells:
        by_inner[cell.key[3]].append(cell)
    text = f"{head}\n\n{WORDS}\n" + "\n\n".join(f"inner: {inner}\n{report(group)}" for inner, group in by_inner.items())
    print("\n" + text)
    if out is not None:
        out.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
        write_csv(out.with_suffix(".csv"), cells)
        for inner, group in by_inner.items():
            draw(out.with_name(out.name + ("" if inner == "eager" else f"-{inner}")).with_suffix(".png"), group)
