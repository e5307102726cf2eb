"""What the checks of a call cost: the same step with inputs compared, trusted, and sent from rank 0, in turns.

    python benchmarks/call_cost.py [--ranks 2] [--side 128] [--depth 4] [--pairs 15] [--out FILE]

One set of ranks, three compiles of the DiT of examples/hello.py. A round is one step of each kind in a new order; a
pair is a checked (or rank 0's) and a trusted step of one round, and its ratio is what is reported: median and quartiles
over the rounds, on rank 0. Beside it, alone and without noise of other ranks: microseconds of the fingerprint of the
step's inputs, and of comparing what is sent with its plan, over all sends of a step.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sfcompile.commands.launch import launch
from sfcompile.options import INPUTS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def microseconds(work: Callable[[], Any], times: int = 300) -> float:
    """Of one call, the median."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e6


def fit_microseconds() -> tuple[float, int]:
    """Of all comparisons of one step with its plan, and how many puts they are for."""
    from sfcompile.backend import reports
    from sfcompile.runtime.program.sites import AttentionSite
    from sfcompile.runtime.rank.fit import check_end, check_put
    from sfcompile.runtime.rank.session import current_session

    session, work = current_session(), []
    rank = session.rank
    program = next(name for name in reports()[0].programs if not name.startswith("inputs"))
    for plan in session.programs[program]:
        site = plan.site
        if isinstance(site, AttentionSite):
            for part in range(site.parts) if site.parts > 1 else [-1]:
                for tensor in "qkv":
                    shape = site.local_shape(tensor, rank, part)
                    given = torch.empty(shape, dtype=site.dtype)
                    work.append(lambda p=plan, t=tensor, g=given, n=part: check_put(p, rank, f"put_{t}", g, n))
                out = torch.empty(site.local_shape("o", rank, part), dtype=site.dtype)
                work.append(lambda p=plan, o=out, n=part: check_end(p, rank, o, n))
        else:
            held = torch.empty(site.local_shape(rank), dtype=site.dtype)
            wanted = torch.empty(site.wanted_shape(rank), dtype=site.dtype)
            work.append(lambda p=plan, g=held: check_put(p, rank, "exchange_start", g))
            work.append(lambda p=plan, o=wanted: check_end(p, rank, o))
    return microseconds(lambda: [check() for check in work]), len(work)


@torch.no_grad()
def worker(side: int, depth: int, pairs: int, out: str) -> None:
    """One rank."""
    sys.path.insert(0, str(EXAMPLES))
    from hello import DiT

    from sfcompile.runtime.rank.calls import fingerprint

    torch.manual_seed(0)
    model = DiT(depth=depth, side=side).eval()
    given = (torch.randn(1, 4, side, side), torch.tensor([500.0]))
    runs = {}
    for how in INPUTS:
        options = {"inputs": how, "placement": "shard", "inner": "eager"}
        runs[how] = torch.compile(model, backend="streamfusion", options=options)
        runs[how](*given)
    order, taken = random.Random(0), {how: [] for how in INPUTS}
    for _ in range(pairs + 1):
        for how in order.sample(INPUTS, len(INPUTS)):
            start = time.perf_counter()
            runs[how](*given)
            taken[how].append(time.perf_counter() - start)
    if os.environ["RANK"] != "0":
        return
    steps = {how: seconds[1:] for how, seconds in taken.items()}  # the first round warms up
    trusted_s = statistics.median(steps["trusted"])
    lines = [
        f"{(side // 2) ** 2} tokens, {depth} blocks, {os.environ['WORLD_SIZE']} ranks, {pairs} rounds, eager inside"
    ]
    lines.append(f"trusted step: median {trusted_s * 1e3:.1f} ms")
    for how in ("checked", "rank0"):
        low, middle, high = quartiles([a / b for a, b in zip(steps[how], steps["trusted"], strict=True)])
        lines.append(f"{how} over trusted: {middle:.4f} (quartiles {low:.4f} to {high:.4f})")
    mark_us = microseconds(lambda: fingerprint(given))
    fit_us, checks = fit_microseconds()
    for name, cost_us in (
        (f"fingerprint of {len(given)} inputs", mark_us),
        (f"{checks} comparisons with plans", fit_us),
    ):
        lines.append(f"{name}: {cost_us:.0f} us a step, {cost_us / trusted_s / 1e4:.4f} % of it")
    print("\n".join(lines))
    if out:
        Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--side", type=int, default=128, help="latents are side x side: (side / 2)^2 tokens")
    parser.add_argument("--depth", type=int, default=4, help="blocks")
    parser.add_argument("--pairs", type=int, default=15, help="rounds")
    parser.add_argument("--out", default="", help="a file for the result")
    args = parser.parse_args()
    if "RANK" in os.environ:
        worker(args.side, args.depth, args.pairs, args.out)
        return 0
    return launch([__file__, *sys.argv[1:]], args.ranks)


if __name__ == "__main__":
    raise SystemExit(main())
