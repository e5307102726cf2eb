"""Cold start: from nothing to the first result, compiled anew or loaded from a package.

    python benchmarks/export_cold_start.py [--ranks 2] [--depth 8] [--width 256] [--out results.json]

Every run is a set of fresh processes with an empty Inductor cache. The clock of a rank starts when torch is imported:
it counts importing the library, and building the model (fresh) or reading the package (load), up to the first result;
the second step is timed too, to show that what was loaded is as fast. Printed: the slowest rank.

    fresh eager     torch.compile(model, backend="streamfusion"), local graph run eagerly
    load eager      sfcompile.load of a package with inner="eager"
    fresh inductor  as the first, local graph compiled by Inductor (the default)
    load inductor   a package whose graph is compiled by Inductor at load: no trace, no passes, but the same compile
    load aoti       sfcompile.load of a package with compiled objects (inner="aoti")
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

STARTED = time.perf_counter()
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUNS = ("fresh eager", "load eager", "fresh inductor", "load inductor", "load aoti")


def build(depth: int, width: int) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """The DiT of examples/hello.py and inputs: 256 tokens."""
    sys.path.insert(0, str(EXAMPLES))
    from hello import DiT

    torch.manual_seed(0)
    model = DiT(width=width, heads=8, depth=depth).eval()
    return model, inputs()


def inputs() -> tuple[torch.Tensor, ...]:
    """Latents and a timestep."""
    return torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([500.0])


@torch.no_grad()
def worker(run: str, folder: Path, depth: int, width: int) -> None:
    """One rank of one run: writes its seconds and a checksum of its result."""
    how, inner = run.split()
    if how == "fresh":
        model, given = build(depth, width)
        options = {"inner": inner, "placement": "shard"}
        call: Any = torch.compile(model, backend="streamfusion", options=options)
    else:
        from sfcompile.package.load import load

        given = inputs()
        call = load(folder / ("aoti.sf" if inner == "aoti" else "plain.sf"), inner=inner)
    out = call(*given)
    first_s = time.perf_counter() - STARTED
    start = time.perf_counter()
    call(*given)
    result = {"first_s": first_s, "step_s": time.perf_counter() - start, "sum": float(out.double().abs().sum())}
    (folder / f"{run.replace(' ', '-')}-{os.environ['RANK']}.json").write_text(json.dumps(result))


def main() -> int:
    """Export, run everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--depth", type=int, default=8, help="blocks")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    parser.add_argument("--worker", nargs=2, metavar=("RUN", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], Path(args.worker[1]), args.depth, args.width)
        return 0
    from sfcompile.commands.launch import launch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_s = write_packages(folder, args)
        table = {}
        for run in args.runs:
            argv = [__file__, "--depth", str(args.depth), "--width", str(args.width), "--worker", run, str(folder)]
            env = {
                "TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache-{run.replace(chr(32), chr(45))}"),
                "SFCOMPILE_LOG": "warning",
            }
            code = launch(argv, args.ranks, env=env)
            if code:
                return code
            ranks = [
                json.loads((folder / f"{run.replace(' ', '-')}-{rank}.json").read_text()) for rank in range(args.ranks)
            ]
            table[run] = {key: max(rank[key] for rank in ranks) for key in ("first_s", "step_s", "sum")}
            print(
                f"{run:<16}{table[run]['first_s']:8.2f} s to the first result, then {table[run]['step_s']:.4f} s a step"
            )
    for load, fresh in (("load eager", "fresh eager"), ("load aoti", "fresh inductor")):
        if load in table and fresh in table:
            print(f"{load} is {table[fresh]['first_s'] / table[load]['first_s']:.1f} x faster than {fresh}")
    print(f"exports took {export_s}; largest difference of the results' sums: {spread(table):.1e}")
    if args.out:
        about = {"ranks": args.ranks, "depth": args.depth, "width": args.width, "torch": torch.__version__}
        args.out.write_text(
            json.dumps({**about, "cores": os.cpu_count(), "export_s": export_s, "runs": table}, indent=1) + "\n"
        )
    return 0


def write_packages(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """The packages that the runs need, and the seconds that each export took."""
    from sfcompile.package.export import export

    model, given = build(args.depth, args.width)
    seconds = {}
    for name, inner in (("plain", "eager"), ("aoti", "aoti")):
        if any(run.startswith("load") and (run.endswith("aoti") == (inner == "aoti")) for run in args.runs):
            start = time.perf_counter()
            export(model, given, {}, folder / f"{name}.sf", topology=f"1x{args.ranks}", inner=inner, placement="shard")
            seconds[name] = round(time.perf_counter() - start, 2)
    return seconds


def spread(table: dict[str, dict[str, float]]) -> float:
    """Relative difference between the runs' results."""
    sums = [row["sum"] for row in table.values()]
    return (max(sums) - min(sums)) / max(sums)


if __name__ == "__main__":
    sys.exit(main())
