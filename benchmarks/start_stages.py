"""What a start's CPU seconds go to on one rank, by stage, with few and with many blocks; cold, and started again.

    python benchmarks/start_stages.py [--ranks 2] [--blocks 2 8 57] [--scale 0.0625] [--out FILE]

The model of benchmarks/first_image.py. CPU seconds of rank 0's main thread from the call of torch.compile to the first
output: other work on the machine changes them far less than seconds. A stage is a function whose calls are timed (names
of torch's private ones; one that this torch lacks is left out), less the stages inside it. "collector" is Python's
collector of cycles, wherever it ran, and is in the other rows too. What C++ compilers and other threads spend is not in
them; the last rows say what the rank spent in all, and its compilers.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STAGES = {
    "torch._dynamo.symbolic_convert:InstructionTranslator.run": "Dynamo: the model's Python",
    "torch._dynamo.variables.builder:VariableBuilder.__call__": "Dynamo: what it reads of the model",
    "torch._dynamo.output_graph:SubgraphTracer.create_proxy": "Dynamo: nodes of its graph",
    "torch._dynamo.output_graph:OutputGraph.compile_and_call_fx_graph": "Dynamo: its graph handed over",
    "torch._dynamo.guards:CheckFunctionManager.__init__": "Dynamo: guards",
    "torch._subclasses.fake_tensor:FakeTensorMode.dispatch": "fake tensors, wherever",
    "sfcompile.backend:KeptPlans.of": "text of the graph",
    "sfcompile.backend:_captured": "capture",
    "sfcompile.backend:run_passes": "passes",
    "sfcompile.backend:KeptPlans.keep_graph": "keep the rank's graph",
    "sfcompile.backend:_planned": "read the rank's graph",
    "sfcompile.backend:_links": "links",
    "sfcompile.backend:compile_once": "compile once: compare, take out, run",
    "sfcompile.lowering.inner:blocks_of": "find blocks",
    "sfcompile.lowering.compile_once:take_start": "what Inductor finds at a start",
    "sfcompile.lowering.inner:compile_with_inductor": "Inductor: before its cache",
    "torch._inductor.compile_fx:compile_fx_inner": "Inductor: cache, or compile",
    "sfcompile.backend:streamfusion_backend": "backend: the rest",
}


class Clock:
    """Seconds of the thread by stage, each less those inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def switch(self, name: str | None) -> None:
        """Begin a stage inside the present one, or (None) end the present one."""
        now = time.thread_time()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
        if name is None:
            self._open.pop()
        else:
            self._open.append(name)

    def watch(self, path: str, name: str) -> None:
        """Time a function's calls from now on."""
        module, _, inside = path.partition(":")
        *owners, attribute = inside.split(".")
        owner: Any = importlib.import_module(module)
        for each in owners:
            owner = getattr(owner, each, None)
        function: Callable[..., Any] | None = getattr(owner, attribute, None)
        if function is None:
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.switch(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch(None)

        unbound = isinstance(vars(owner).get(attribute), staticmethod)
        setattr(owner, attribute, staticmethod(timed) if unbound else timed)


def worker(blocks: int, scale: float) -> None:
    """One rank: the seconds of its stages, as JSON in a file of its own."""
    import torch
    from cluster_models import flux

    torch.set_num_threads(1)
    torch.manual_seed(1)
    two_streams = max(1, round(blocks / 3))
    model, inputs = flux(scale, two_streams, parallel=max(1, blocks - two_streams))
    clock, collector, since = Clock(), 0.0, 0.0
    run = torch.compile(model, backend="streamfusion", options={"timeout_s": 3600.0})
    for path, name in STAGES.items():
        clock.watch(path, name)

    def collects(phase: str, info: dict[str, int]) -> None:
        nonlocal collector, since
        if phase == "start":
            since = time.thread_time()
        else:
            collector += time.thread_time() - since

    gc.callbacks.append(collects)
    before = os.times()
    clock.switch("first call, and all else")
    with torch.no_grad():
        run(**inputs, return_dict=False)
    clock.switch(None)
    after = os.times()
    gc.callbacks.remove(collects)
    told = clock.seconds | {
        "collector": collector,
        "main thread": sum(clock.seconds.values()),
        "the rank": after.user + after.system - before.user - before.system,
        "its compilers": after.children_user + after.children_system - before.children_user - before.children_system,
    }
    Path(os.environ["START_STAGES"], os.environ["RANK"]).write_text(json.dumps(told))


def start(ranks: int, blocks: int, scale: float, cache: Path) -> dict[str, float]:
    """What rank 0 said."""
    from first_image import environment  # not above: what a rank imports is timed

    with tempfile.TemporaryDirectory() as told:
        env = environment(cache) | {"START_STAGES": told}
        launch = [sys.executable, "-m", "sfcompile", "run", "--ranks", str(ranks)]
        work = [str(HERE / "start_stages.py"), "--work", "--blocks", str(blocks), "--scale", str(scale)]
        subprocess.run([*launch, *work], env=env, check=True)
        seconds: dict[str, float] = json.loads(Path(told, "0").read_text())
        return seconds


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 8, 57], help="at least two")
    parser.add_argument("--scale", type=float, default=0.0625, help="of the token count")
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        worker(args.blocks[0], args.scale)
        return 0
    columns: dict[str, dict[str, float]] = {}
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory() as cache:
            for how in ("cold", "again"):
                columns[f"{blocks} {how}"] = start(args.ranks, blocks, args.scale, Path(cache))
    last = ("collector", "main thread", "the rank", "its compilers")
    names = dict.fromkeys(name for told in columns.values() for name in told if name not in last)
    rows = sorted(names, key=lambda name: -sum(told.get(name, 0.0) for told in columns.values()))
    lines = [
        f"CPU seconds of rank 0 of {args.ranks}, {date.today()}, load {os.getloadavg()[0]:.1f}",
        " " * 40 + "".join(f"{name:>10}" for name in columns),
    ]
    for name in (*rows, *last):
        lines.append(f"{name:<40}" + "".join(f"{told.get(name, 0.0):>10.2f}" for told in columns.values()))
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
