"""How long our capture and passes take beside Inductor on the same graphs, in one process, with fresh caches.

    python benchmarks/compile_time.py [--topology 1x4] [--zoo FOLDER] [names ...]

Ours: the capture, and all passes as one rank runs them, planning included. Inductor: the graphs as Dynamo gives them,
on one process, compiled anew (no cache). Dynamo's own tracing is the same for both and in neither.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.utils import fresh_cache
from zoo import FOLDER, known

from sfcompile.capture.graph import capture, compile_with_inductor
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.topology import Topology

NAMES = (
    "flux", "sd3", "pixart_sigma", "wan_t2v", "hunyuan_video", "ltx", "sana", "latte", "cogvideox_rope", "lumina_next",
    "z_image", "kandinsky6",
)  # fmt: skip
GOAL = 0.2


def seconds_of(model: torch.nn.Module, kwargs: dict[str, Any], topology: Topology) -> dict[str, float]:
    """Seconds of every pass, of the capture and of Inductor, summed over the graphs of a model."""
    found: dict[str, float] = {}

    def add(name: str, seconds: float) -> None:
        found[name] = found.get(name, 0.0) + seconds

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        captured = capture(gm, inputs)
        add("capture", time.perf_counter() - start)
        state = State(captured.gm, captured.mode, topology, 0, Asked(shard_everything=True))
        start = time.perf_counter()
        compiled = run_pipeline(state)
        add("passes", time.perf_counter() - start)
        for name, seconds in compiled.report.pass_seconds.items():
            add(name, seconds)
        start = time.perf_counter()
        with fresh_cache():
            run = compile_with_inductor(gm, inputs, None, {"force_disable_caches": True})
        add("Inductor", time.perf_counter() - start)
        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**kwargs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="1x4")
    parser.add_argument("--zoo", type=Path, default=FOLDER)
    parser.add_argument("--passes", action="store_true", help="also the seconds of every pass")
    parser.add_argument("names", nargs="*", default=list(NAMES))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    topology, models = Topology.parse(args.topology), known(args.zoo)
    for_warm_up = next(iter(args.names))
    seconds_of(*models[for_warm_up](), topology)
    print(f"{'model':<22}{'capture s':>10}{'passes s':>10}{'Inductor s':>12}{'ours / Inductor':>17}")
    within = 0
    for name in args.names:
        found = seconds_of(*models[name](), topology)
        ratio = (found["capture"] + found["passes"]) / found["Inductor"]
        within += ratio < GOAL
        print(
            f"{name:<22}{found['capture']:>10.2f}{found['passes']:>10.2f}{found['Inductor']:>12.2f}{ratio:>16.1%}",
            flush=True,
        )
        if args.passes:
            rest = {key: value for key, value in found.items() if key not in ("capture", "passes", "Inductor")}
            print("  " + ", ".join(f"{key} {value:.2f}" for key, value in sorted(rest.items(), key=lambda i: -i[1])))
    print(f"{within} of {len(args.names)} below {GOAL:.0%}")


if __name__ == "__main__":
    main()
