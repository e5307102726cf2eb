"""How long the first image takes: one process under torch.compile, and ranks cold, and ranks that start again.

    python benchmarks/first_image.py [--ranks 4] [--blocks 2 8 57] [--pieces auto off regions] [--out FILE]

The Flux structure of benchmarks/cluster_models.py (a third of the blocks of two streams, the others parallel) with few
tokens: what is timed is compiling. A sixteenth of them leaves 256 image and 32 text tokens, which four ranks share
evenly, as they do all of them; at 0.05 there are 25 text tokens, and rank 0's graph, of other sizes, is compiled beside
that of the others. Seconds from the call of torch.compile to the first output, the slowest rank's, without imports;
every cold start has a cache folder of its own, the warm one that of the ranks before it. One thread a
process, all on the same cores, one after the other, in one run. The limit is one process: all ranks together have its
cores. A rank's own share is tracing (Dynamo's, once a rank) and our passes. Inductor's part is made once on a machine
for all ranks whose graphs are equal, and once for each distinct block ("of it": the rank's where it took longest).

``--pieces``: values of the option compile_blocks; "off" hands Inductor a rank's graph whole. With "regions" it is
sfcompile.compile_repeated_blocks, in the one process too: each kind of block is traced once. Under each row of a table
stand the CPU seconds of all processes and their compilers together, which a busy machine changes least, the median of
five steps after the first, and the load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS = 5
"""So many calls after the first are timed."""
REPEATS = 3
"""With fewer blocks there is one of each kind."""
Told = dict[str, float]


def worker(blocks: int, scale: float, pieces: str) -> None:
    """One process or one rank: seconds to its first output, and what Inductor did, as JSON in its own file."""
    import torch
    from cluster_models import flux
    from torch._dynamo.utils import compilation_time_metrics, counters

    torch.set_num_threads(1)
    torch.manual_seed(1)
    two_streams = max(1, round(blocks / 3))
    model, inputs = flux(scale, two_streams, parallel=max(1, blocks - two_streams))
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0")
    asked = {"timeout_s": 3600.0} | ({} if pieces == "regions" else {"compile_blocks": pieces})
    options: dict[str, Any] = {"backend": "streamfusion", "options": asked} if ranks > 1 else {}
    before, began = _cpu_seconds(), time.perf_counter()
    compiled: Any = torch.compile(model, **options) if pieces != "regions" else None
    if compiled is None:
        import sfcompile

        compiled = sfcompile.compile_repeated_blocks(model, options=asked)
    with torch.no_grad():
        compiled(**inputs, return_dict=False)
        told = {"seconds": time.perf_counter() - began, "cpu": _cpu_seconds() - before}
        steps = list[float]()
        for _ in range(STEPS):
            began = time.perf_counter()
            compiled(**inputs, return_dict=False)
            steps.append(time.perf_counter() - began)
    told["step"] = statistics.median(steps)
    told["inductor"] = sum(compilation_time_metrics.get("compile_fx.<locals>.fw_compiler_base", []))
    told |= {kind: counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss", "bypass")}
    Path(os.environ["FIRST_IMAGE"], rank).write_text(json.dumps(told))


def _cpu_seconds() -> float:
    """Of this process and of the compilers that it has waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def environment(cache: Path) -> dict[str, str]:
    """Of a process of one thread that keeps all that it compiles in ``cache``."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(cache), "SFCOMPILE_CACHE": str(cache), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path, "SFCOMPILE_LOG": "error",
    }  # fmt: skip


def timed(ranks: int, blocks: int, scale: float, cache: Path, pieces: str = "auto") -> list[Told]:
    """What every process said, by rank."""
    with tempfile.TemporaryDirectory() as told:
        env = environment(cache) | {"FIRST_IMAGE": told}
        work = [str(HERE / "first_image.py"), "--work", "--blocks", str(blocks), "--scale", str(scale)]
        launch = ["-m", "sfcompile", "run", "--ranks", str(ranks)] if ranks > 1 else []
        subprocess.run([sys.executable, *launch, *work, "--pieces", pieces], env=env, check=True)
        return [json.loads(Path(told, str(rank)).read_text()) for rank in range(ranks)]


def rows(ranks: int, blocks: int, scale: float, pieces: list[str]) -> list[str]:
    """The lines of a table for a number of blocks."""
    lines, one = [], dict[str, float]()
    for how in pieces:
        if how == "regions" and blocks < REPEATS:
            lines += [f"{blocks:>6}  {how:<7}{'n/a':>13}", "        one block of each kind: nothing repeats"]
            continue
        if not one or how == "regions":
            with tempfile.TemporaryDirectory() as alone:
                (one,) = timed(1, blocks, scale, Path(alone), how)
        with tempfile.TemporaryDirectory() as shared:
            cold = timed(ranks, blocks, scale, Path(shared), how)
            warm = timed(ranks, blocks, scale, Path(shared), how)
        first, again, inductor = (max(_of(job, key)) for job, key in
                                  ((cold, "seconds"), (warm, "seconds"), (cold, "inductor")))  # fmt: skip
        cells = f"{blocks:>6}  {how:<7}{one['seconds']:>13.1f}{one['inductor']:>7.1f}{first:>10.1f}{inductor:>7.1f}"
        ratios = f"{first / one['seconds']:>8.2f}x{again:>9.1f}{again / one['seconds']:>8.2f}x"
        compiled, taken = int(sum(_of(cold, "miss"))), int(sum(_of(cold, "hit")))
        lines.append(f"{cells}{ratios}{compiled:>10}{taken:>7}")
        spent = ", ".join(f"{sum(_of(job, 'cpu')):.1f}" for job in ([one], cold, warm))
        steps = ", ".join(f"{max(_of(job, 'step')):.2f}" for job in ([one], cold, warm))
        told = f"CPU seconds of one, cold, again: {spent}; a step after it: {steps} s; load {os.getloadavg()[0]:.1f}"
        lines.append(f"        {told}")
    return lines


def _of(job: list[Told], key: str) -> list[float]:
    return [rank[key] for rank in job]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 8, 57], help="at least two")
    parser.add_argument("--scale", type=float, default=0.0625, help="of the token count")
    parser.add_argument("--pieces", nargs="+", choices=("auto", "off", "regions"), default=["auto"])
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        worker(args.blocks[0], args.scale, args.pieces[0])
        return 0
    lines = [
        f"{'blocks':>6}  {'pieces':<7}{'one process s':>13}{'of it':>7}{f'{args.ranks} cold s':>10}{'of it':>7}"
        f"{'over one':>9}{'again s':>9}{'over one':>9}{'compiled':>10}{'taken':>7}"
    ]
    print(lines[0], flush=True)
    for blocks in args.blocks:
        lines += rows(args.ranks, blocks, args.scale, args.pieces)
        print("\n".join(lines[-2 * len(args.pieces) :]), flush=True)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
