"""What a step costs besides its work: CPU time of this project's own Python and wires, in a step of three parts.

    python benchmarks/step_cost.py [--ranks 2] [--depth 4] [--width 512] [--steps 30] [--inner eager]
                                   [--profile] [--out FILE]

Ranks of one box run the DiT of examples/hello.py with all tokens in three parts, as ranks of slow machines would. The
same graph runs on few tokens too, heads of 12: what is left there is Python, dispatch and messages. A step's cost is
the CPU time of all threads of a rank (a wait that sleeps costs none), and what is added is that less the plain model's
on as few tokens. Medians over the steps, of rank 0; the kinds take turns.

    ops      inside the graph's own nodes: puts, attend, collect (attention itself included, on few tokens); their clock
             costs two microseconds a node, so these steps are others
    graph    the rest: the call around the graph, and three times the plain model's nodes

Messages go through shared memory here; over TCP each costs a system call or two more (benchmarks/cluster.py --memory).
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sfcompile.commands.launch import launch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PARTS = 3
OPS = ("put", "attend", "collect", "receive")


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of one call, of all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


class OpClock:
    """CPU time of this thread inside a session's site methods, added up."""

    def __init__(self, session: Any) -> None:
        self.seconds = 0.0
        self._session = session

    def measure(self, work: Callable[[], Any]) -> float:
        """Seconds of one call."""
        self.seconds = 0.0
        for name in OPS:
            setattr(self._session, name, self._timed(getattr(self._session, name)))
        work()
        for name in OPS:
            delattr(self._session, name)
        return self.seconds

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.thread_time()
            try:
                return method(*args)
            finally:
                self.seconds += time.thread_time() - start

        return timed


@torch.no_grad()
def worker(depth: int, width: int, steps: int, inner: str, profiled: bool, out: str) -> None:
    """One rank."""
    sys.path.insert(0, str(EXAMPLES))
    from hello import DiT

    from sfcompile.passes import choose_schedules
    from sfcompile.passes.state import Asked
    from sfcompile.runtime.program.topology import Topology
    from sfcompile.runtime.rank.session import current_session

    torch.set_num_threads(1)
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    Asked.parts, choose_schedules._WORTH = (PARTS,), float("inf")  # in three parts, whatever that saves
    choose_schedules._WORTH_MORE = float("inf")
    topology = Topology.grid(ranks, 1, network_bytes_per_s=2.5e7)
    options = {"topology": topology, "placement": "shard", "inner": inner}

    def built(side: int, wide: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        torch.manual_seed(0)
        model = DiT(width=wide, depth=depth, side=side).eval()
        given = (torch.randn(1, 4, side, side), torch.tensor([500.0]))
        compiled = torch.compile(model, backend="streamfusion", options=options)
        difference = float((compiled(*given) - model(*given)).abs().max())
        assert difference < 1e-4, difference
        return lambda: compiled(*given), lambda: model(*given)

    whole, _ = built(128, width)
    tiny, plain = built(12, 96)
    clock = OpClock(current_session())
    few, ops, own, full = [], [], [], []
    for _ in range(3):
        full.append(cpu_seconds(whole))
        tiny(), plain()
    for _ in range(steps):
        few.append(cpu_seconds(tiny))
        own.append(cpu_seconds(plain))
        ops.append(clock.measure(tiny))
    profile = cProfile.Profile()
    if profiled:
        for _ in range(20):
            profile.runcall(tiny)
    if rank:
        return
    few_s, ops_s, own_s, full_s = map(statistics.median, (few, ops, own, full))
    added = few_s - own_s
    text = (
        f"{depth} blocks, {ranks} ranks, {PARTS} parts, {inner}, {steps} steps, load {os.getloadavg()[0]:.1f} on "
        f"{os.cpu_count()} cores\n"
        f"on few tokens: {few_s * 1e3:.2f} ms of CPU time a step; ops {ops_s * 1e3:.2f}, graph "
        f"{(few_s - ops_s) * 1e3:.2f}; the plain model {own_s * 1e3:.2f}\n"
        f"added to the plain model: {added * 1e3:.2f} ms a step; a rank's step on 4096 tokens, width {width}: "
        f"{full_s * 1e3:.0f} ms of CPU time; added: {added / full_s:.2%}\n"
    )
    print(text, end="")
    if out:
        Path(out).write_text(text, encoding="utf-8")
    if profiled:
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        pstats.Stats(profile).sort_stats("cumtime").print_stats("sfcompile|runtime|passes", 40)


def main() -> int:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--depth", type=int, default=4, help="blocks")
    parser.add_argument("--width", type=int, default=512, help="of the model on 4096 tokens")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--inner", default="eager", choices=("eager", "inductor"), help="what runs the local graph")
    parser.add_argument("--profile", action="store_true", help="print where rank 0's own thread spends a step's time")
    parser.add_argument("--out", default="", help="a file for the result")
    args = parser.parse_args()
    if "RANK" in os.environ:
        worker(args.depth, args.width, args.steps, args.inner, args.profile, args.out)
        return 0
    return launch([__file__, *sys.argv[1:]], args.ranks)


if __name__ == "__main__":
    raise SystemExit(main())
