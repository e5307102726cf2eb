"""What encoding and decoding a chunk takes on a CPU, in copies of the chunk: the planner's CODED_AS_BYTES.

    python benchmarks/coding_cost.py [--rounds 15] [--out FILE]

A chunk [1, heads, tokens, width] is copied, encoded and decoded by one thread in turns (A B C A B C); a ratio is that
of the medians. The planner takes the mean of both ways, for a rank encodes about as much as it decodes, the median over
the shapes, and counts in bytes of an element: 4 bytes x 1.0 for bf16; for fp8 4 x 6.4 of a model in fp32, 2 x 13.9 of
one in bf16 (codegen/plan/simulator.py; benchmarks/results/2026-11-29-coding-cost.txt).
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sfcompile.runtime.program.formats import BF16, FP8, decode, encode

SHAPES = ((1, 12, 1024, 64), (1, 24, 512, 128), (1, 6, 4096, 64), (1, 3, 512, 128))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds(work: Callable[[], object]) -> float:
    """CPU time of one call: what other processes take does not count."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def passes(shape: tuple[int, ...], dtype: torch.dtype, written: str, rounds: int) -> tuple[float, float]:
    """Copies that encoding a chunk takes, and decoding it."""
    chunk = torch.randn(shape).to(dtype)
    packed = encode(chunk, written)
    ways: tuple[Callable[[], object], ...] = (
        chunk.clone, lambda: encode(chunk, written), lambda: decode(packed, written, shape, dtype)
    )  # fmt: skip
    taken: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 2):
        for way, times in zip(ways, taken, strict=True):
            spent_s = seconds(way)
            if turn > 1:  # warm
                times.append(spent_s)
    copy_s, encode_s, decode_s = map(statistics.median, taken)
    return encode_s / copy_s, decode_s / copy_s


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"python benchmarks/coding_cost.py --rounds {args.rounds}, {datetime.date.today().isoformat()}, "
        f"{platform.machine()}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, torch {torch.__version__}",
        f"{'dtype':<7}{'wire':<7}{'chunk':<22}{'encode':>8}{'decode':>8}{'mean':>8}   copies of the chunk",
    ]
    for name, dtype in DTYPES.items():
        for written in (BF16, FP8):
            if written == BF16 and dtype == torch.bfloat16:
                continue  # nothing is made smaller
            means = []
            for shape in SHAPES:
                one_way = passes(shape, dtype, written, args.rounds)
                means.append(statistics.mean(one_way))
                lines.append(
                    f"{name:<7}{written:<7}{' x '.join(map(str, shape)):<22}{one_way[0]:>8.2f}{one_way[1]:>8.2f}"
                    f"{means[-1]:>8.2f}"
                )
            lines.append(f"{name:<7}{written:<7}{'median':<22}{'':>16}{statistics.median(means):>8.2f}")
    text = "\n".join(lines)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
