"""How long the first image takes: one process under torch.compile, and ranks cold, and ranks that start again.

    python benchmarks/first_image.py [--ranks 4] [--blocks 2 8] [--scale 0.1] [--out FILE]

The Flux structure of benchmarks/cluster_models.py (as many blocks of two streams as parallel ones) with few tokens:
what is timed is compiling. Seconds from the call of torch.compile to the first output, the slowest rank's, imports
apart; every cold start has a cache folder of its own, the warm one has that of the ranks before it. One thread a
process, all on the same cores, one after the other, in one run. The limit is one process: all ranks together have its
cores. A rank's own share is tracing (Dynamo's, once a rank) and our passes; Inductor's part is made once on a machine
for all ranks whose graphs are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def worker(blocks: int, scale: float) -> None:
    """One process or one rank: seconds to its first output, and Inductor's hits and misses, as JSON in its own file."""
    import torch
    from cluster_models import build
    from torch._dynamo.utils import counters

    torch.set_num_threads(1)
    model, inputs = build("flux", scale, blocks)
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0")
    options: dict[str, Any] = {"backend": "streamfusion", "options": {"timeout_s": 600.0}} if ranks > 1 else {}
    began = time.perf_counter()
    with torch.no_grad():
        torch.compile(model, **options)(**inputs)
    seconds = time.perf_counter() - began
    seen = {kind: counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss", "bypass")}
    Path(os.environ["FIRST_IMAGE"], rank).write_text(json.dumps({"seconds": seconds, **seen}))


def timed(ranks: int, blocks: int, scale: float, cache: Path) -> list[dict[str, float]]:
    """What every process said, by rank."""
    with tempfile.TemporaryDirectory() as told:
        path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(cache), "SFCOMPILE_CACHE": str(cache), "FIRST_IMAGE": told,
            "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "SFCOMPILE_LOG": "error",
        }  # fmt: skip
        work = [str(HERE / "first_image.py"), "--work", "--blocks", str(blocks), "--scale", str(scale)]
        launch = ["-m", "sfcompile", "run", "--ranks", str(ranks)] if ranks > 1 else []
        subprocess.run([sys.executable, *launch, *work], env=env, check=True)
        return [json.loads(Path(told, str(rank)).read_text()) for rank in range(ranks)]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 8], help="half of them of two streams")
    parser.add_argument("--scale", type=float, default=0.1, help="of the token count")
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        worker(max(1, args.blocks[0] // 2), args.scale)
        return 0
    lines = [
        f"{'blocks':>6}{'one process s':>15}{f'{args.ranks} ranks cold s':>17}{'over one':>10}{'again s':>9}"
        f"{'over one':>10}  compiled, found by ranks"
    ]
    print(lines[0], flush=True)
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory() as alone, tempfile.TemporaryDirectory() as shared:
            one = timed(1, blocks, args.scale, Path(alone))[0]["seconds"]
            cold = timed(args.ranks, blocks, args.scale, Path(shared))
            warm = timed(args.ranks, blocks, args.scale, Path(shared))
        first, again = (max(rank["seconds"] for rank in ranks) for ranks in (cold, warm))
        made, found = (int(sum(rank[kind] for rank in cold)) for kind in ("miss", "hit"))
        lines.append(
            f"{blocks:>6}{one:>15.1f}{first:>17.1f}{first / one:>9.2f}x{again:>9.1f}{again / one:>9.2f}x"
            f"  {made}, {found}"
        )
        print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
