"""Step latency between machines: ours against diffusers' context parallelism, on emulated machines with shaped links.

    python benchmarks/cluster.py                                                   the whole grid (root needed)
    python benchmarks/cluster.py --layouts 2x2 --rates 200mbit --models flux --rounds 3 --contenders ours ulysses

A cell is machines x ranks, the rate of every machine's uplink, and a model (benchmarks/cluster_models.py). The ranks of
a layout start once; link rates change under the running job, contenders of a cell take turns (A B C A B C), and every
output is compared with one process. "ours" is what a user types, topology="auto": the planner's choice on links that
its compile measured in half a second; "ours, tuned" is given what doctor --measure finds in the same job; "ours torus"
and so on are forced. Peers: benchmarks/cluster_peers.py and cluster_hand_peers.py. One thread a rank, the same weights
and inputs for all. On one machine (1x4) there is no uplink, so one rate stands for all.

The limit of a cell is the larger of compute alone (communication replaced by nothing, all ranks at once) and the least
bytes of any of our schedules over the payload rate of an uplink. Where the planner shards less than the forced
schedules do (it computes more and sends less), that has a limit of its own, and the cell's is the lower one.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from emulated_machines import emulated_machines

HERE = Path(__file__).resolve().parent
LAYOUTS = ("2x2", "4x1", "3x1", "2x1", "1x4")
RATES = ("100mbit", "200mbit", "500mbit", "1gbit")
MODELS = ("flux", "wan", "cogvideox", "pixart", "flux6", "guided", "uneven")
SLOW = ("100mbit", "200mbit")
USP = "diffusers usp"
TUNED = "ours, tuned"
PEERS = ("chunked ulysses", "gathered kv")
FORCED = ("ours torus", "ours ulysses", "ours ring", "ours usp")


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


def times(ratio: float) -> str:
    """A ratio for people; "-" where there is none."""
    return f"{ratio:.2f}x" if ratio == ratio else "-"


def groups(cells: list[Cell]) -> list[str]:
    """Per layout and rate, over the models: peers' seconds over ours, and the limit over ours."""
    lines = [f"{'machines x ranks, uplink':<28}{'best peer: mean, least':>26}{'USP: mean, most':>20}{'effic.':>10}"]
    for layout, rate in dict.fromkeys(cell.key[:2] for cell in cells):
        here = [cell for cell in cells if cell.key[:2] == (layout, rate)]
        best = [cell.over() for cell in here if cell.peers]
        usp = [cell.over(USP) for cell in here if USP in cell.peers]
        peers = f"{times(statistics.mean(best))}, {times(min(best))}" if best else "-"
        placed = f"{times(statistics.mean(usp))}, {times(max(usp))}" if usp else "-"
        efficiency = statistics.mean(cell.efficiency for cell in here)
        lines.append(f"{f'{layout}, {rate}':<28}{peers:>26}{placed:>20}{efficiency:>10.2f}")
    return [*lines, ""]


def report(cells: list[Cell]) -> str:
    """The tables."""
    lines = []
    names = list(dict.fromkeys(name for cell in cells for name in cell.medians))
    head = f"{'cell':<36}" + "".join(
        f"{name.replace('diffusers', 'dif').replace('yunchang', 'yun').replace('ours ', ''):>16}" for name in names
    )
    lines.append("seconds a step, the slowest rank: median of the rounds (half the spread)")
    lines.append(head)
    for cell in cells:
        text = f"{' '.join(cell.key):<36}"
        for name in names:
            took = cell.rows.get(name, {}).get("seconds")
            text += f"{f'{statistics.median(took):.3f}({(max(took) - min(took)) / 2:.2f})' if took else '-':>16}"
        lines.append(text)
    lines.append("")
    columns = ("limit", "wire", "alone", "effic.", "best peer", "USP", "regret", "waits/layer", "error")
    lines.append(f"{'cell':<36}" + "".join(f"{name:>12}" for name in columns) + "  plan")
    for cell in cells:
        mine = cell.rows.get("ours", {})
        exposed = (
            statistics.median(mine["blocked"]) / max(1, cell.raw["sites"]) if mine.get("blocked") else float("nan")
        )
        worst = max(row["error"] for row in cell.rows.values() if row["error"] == row["error"])
        values = (
            *(f"{seconds:.3f}" for seconds in cell.limits),
            f"{cell.efficiency:.2f}", times(cell.over()), times(cell.over(USP)),
            f"{cell.regret:+.0%}" if cell.forced else "-",
            f"{exposed * 1e3:.0f} ms", f"{worst:.0e}",
        )  # fmt: skip
        lines.append(f"{' '.join(cell.key):<36}" + "".join(f"{v:>12}" for v in values) + f"  {mine.get('plan', '')}")
    lines.append("")
    lines += groups(cells)
    slow = [cell for cell in cells if cell.raw["rate"] in SLOW and cell.peers]
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
    lines.append(f"efficiency against the limit: mean {statistics.mean(cell.efficiency for cell in cells):.2f}")
    regrets = [cell.regret for cell in cells if cell.forced]
    if regrets:
        lines.append(f"regret of the planner's pick: largest {max(regrets):+.0%}")
    typed = [cell.ours / cell.medians[TUNED] for cell in cells if TUNED in cell.medians]
    if typed:
        lines.append(f"as typed over tuned: mean {statistics.mean(typed):.2f}, most {max(typed):.2f}")
    return "\n".join(lines)


def write_csv(path: Path, cells: list[Cell]) -> None:
    """One line per cell and contender."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(
            ["layout", "rate", "model", "inner", "contender", "plan", "median_s", "min_s", "max_s", "rounds",
             "blocked_s", "across_bytes", "error", "limit_s"]
        )  # fmt: skip
        for cell in cells:
            for name, row in cell.rows.items():
                times = row["seconds"]
                if times:
                    out.writerow(
                        [*cell.key, name, row["plan"], f"{statistics.median(times):.4f}", f"{min(times):.4f}",
                         f"{max(times):.4f}", len(times), f"{statistics.median(row['blocked']):.4f}",
                         row["across_bytes"] or "", f"{row['error']:.1e}", f"{cell.limit_s:.4f}"]
                    )  # fmt: skip


def draw(path: Path, cells: list[Cell]) -> None:
    """One panel per layout and model: seconds a step by link rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layouts = list(dict.fromkeys(cell.key[0] for cell in cells))
    models = list(dict.fromkeys(cell.key[2] for cell in cells))
    figure, axes = plt.subplots(
        len(layouts), len(models), figsize=(4 * len(models), 3.2 * len(layouts)), squeeze=False, layout="constrained"
    )
    shown = {"ours": "ours (planner)", "diffusers ulysses": "diffusers Ulysses", "diffusers ring": "diffusers ring"}
    shown |= {USP: "USP as peers place it"}
    for i, layout in enumerate(layouts):
        for j, model in enumerate(models):
            axis = axes[i][j]
            here = [cell for cell in cells if (cell.key[0], cell.key[2]) == (layout, model)]
            rates = [cell.key[1] for cell in here]
            width = 0.8 / len(shown)
            for n, (name, label) in enumerate(shown.items()):
                heights = [cell.medians.get(name, 0.0) for cell in here]
                axis.bar([x + n * width for x in range(len(here))], heights, width, label=label)
            for x, cell in enumerate(here):
                axis.plot([x - width / 2, x + 0.8 - width / 2], [cell.limit_s] * 2, "k--", linewidth=1,
                          label="limit" if x == 0 else None)  # fmt: skip
            axis.set_xticks([x + 0.4 - width / 2 for x in range(len(here))], rates)
            axis.set_title(f"{model}, {layout}", fontsize=10)
            axis.set_ylabel("seconds a step")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def summary(cells: list[Cell], out: Path | None) -> None:
    """Print, and write beside ``out`` if there is one."""
    order = {name: i for i, name in enumerate((*LAYOUTS, *RATES, *MODELS))}
    cells = sorted(cells, key=lambda cell: [order.get(part, -1) for part in cell.key])
    groups = defaultdict(list)
    for cell in cells:
        groups[cell.key[3]].append(cell)
    text = "\n\n".join(f"inner: {inner}\n{report(group)}" for inner, group in groups.items())
    print("\n" + text)
    if out is not None:
        out.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
        write_csv(out.with_suffix(".csv"), cells)
        for inner, group in groups.items():
            draw(out.with_name(out.name + ("" if inner == "eager" else f"-{inner}")).with_suffix(".png"), group)


def job(layout: str, settings: dict[str, Any], folder: Path) -> int:
    """Run one job on emulated machines and print what it says; its exit code."""
    machines, ranks = map(int, layout.split("x"))
    config = folder / "config.json"
    plain = {name: None if isinstance(value, Path) else value for name, value in settings.items()}
    if machines == 1:
        plain["rates"] = plain["rates"][:1]
    config.write_text(json.dumps(plain))
    env = {
        "SFCOMPILE_LOG": "error",
        "PYTHONWARNINGS": "ignore",
        "GLOG_minloglevel": "2",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    env["SFCOMPILE_CACHE"] = str(folder / "cache")  # what was measured on other links must not count
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    with emulated_machines(machines, "10gbit") as cluster:
        code, outputs = cluster.torchrun(ranks, [str(HERE / "cluster_rank.py"), str(config)], env)
    if code:
        print("\n".join(f"[machine {i}] {line}" for i, o in enumerate(outputs) for line in o.splitlines()[-100:]))
    print("\n".join(line for line in outputs[0].splitlines() if line.startswith("  ")), flush=True)
    return code


def memory(args: argparse.Namespace) -> int:
    """Memory and overhead: ours with more and more layers, and diffusers' Ulysses."""
    settings = vars(args) | {"peers": True}
    with tempfile.TemporaryDirectory() as folder:
        for layout in args.layouts:
            print(f"{layout}, {args.models[0]}, {args.rates[0]}", flush=True)
            cases = [("ours", 1, args.steps), ("diffusers ulysses", 1, args.steps), ("ours", 2, 3), ("ours", 4, 3)]
            for name, blocks, steps in cases:
                more = {"contenders": [name], "blocks": blocks, "steps": steps}
                code = job(layout, settings | more, Path(folder))
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
    parser.add_argument("--raw", type=Path, help="keep (and add to) the raw numbers of every cell here")
    parser.add_argument("--trace", help="a folder for one traced step of ours per cell: pictures, a Perfetto trace")
    parser.add_argument("--memory", action="store_true", help="peak RSS, heap and Python overhead instead of the grid")
    parser.add_argument("--steps", type=int, default=50, help="with --memory: steps of one contender in one job")
    parser.add_argument("--report-only", action="store_true", help="tables from --raw, nothing is run")
    args = parser.parse_args()
    if args.memory:
        return memory(args)
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        results = args.raw or Path(folder) / "cells.jsonl"
        for layout in [] if args.report_only else args.layouts:
            settings = vars(args) | {"peers": not args.no_peers, "results": str(results)}
            print(f"{layout}", flush=True)
            code = job(layout, settings, Path(folder))
            if code:
                return code
        cells = [Cell(json.loads(line)) for line in results.read_text().splitlines()]
    summary(cells, args.out)
    return code


if __name__ == "__main__":
    sys.exit(main())
