"""Fit the constants of the preset ``a100-paper`` to the ablation table of the paper: one set for all rows.

    python benchmarks/fit_paper.py [--seconds 600] [--seed 0]

Differential evolution inside bounds of what such hardware does, then small steps on the largest error; prints the
constants and the table at the end. The result is entered in runtime/program/presets.py by hand (seed 41, 500 s).
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace

from sfcompile.commands.paper import PRESET, Row, format_table, predict_table
from sfcompile.runtime.program.topology import Topology

BOUNDS = {
    "flops_per_s": (1.0e14, 2.8e14),
    "attention_flops_per_s": (8e13, 2.3e14),
    "memory_bytes_per_s": (6e11, 1.5e12),
    "local_bytes_per_s": (5e10, 2.8e11),
    "network_bytes_per_s": (2e9, 1.25e10),
    "network_latency_s": (5e-6, 1e-4),
    "launch_s": (4e-6, 6e-5),
    "message_s": (5e-7, 1.2e-4),
    "pairing_s": (5e-6, 6e-4),
    "slowdown": (0.0, 0.5),
    "two_sided_rate": (0.4, 1.0),
    "attention_rows": (0.0, 3e4),
    "pair_bytes_per_s": (5e8, 2e10),
}


def loss(rows: list[Row]) -> float:
    """Mean tenth power of the errors in units of 15 %, cut off at 2: a cell that no set reaches does not rule."""
    errors = [min(abs(error) / 0.15, 2.0) for row in rows for error in row.errors]
    return sum(error**10 for error in errors) / len(errors)


def price(genes: list[float]) -> float:
    """Loss of constants given as positions inside their bounds."""
    return loss(predict_table(replace(Topology.parse(f"1x8:{PRESET}"), **constants(genes))))


def constants(genes: list[float]) -> dict[str, float]:
    """Runs in 0..1 to constants; rates and times are searched on a logarithmic scale."""
    found = {}
    for gene, (key, (low, high)) in zip(genes, BOUNDS.items(), strict=True):
        found[key] = low * (high / low) ** gene if low > 0 else low + gene * (high - low)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--population", type=int, default=36)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    herd = [[rng.random() for _ in BOUNDS] for _ in range(args.population)]
    prices = [price(genes) for genes in herd]
    end = time.monotonic() + args.seconds
    while time.monotonic() < end:  # differential evolution: Storn and Price 1997, rand-to-best/1/bin
        best = herd[prices.index(min(prices))]
        for i, genes in enumerate(herd):
            a, b = rng.sample(herd, 2)
            pull, spread = rng.uniform(0.2, 0.8), rng.uniform(0.3, 0.9)
            trial = list(genes)
            for j in range(len(trial)):
                if rng.random() < 0.7:
                    moved = genes[j] + pull * (best[j] - genes[j]) + spread * (a[j] - b[j])
                    trial[j] = moved if 0.0 <= moved <= 1.0 else rng.random()
            now = price(trial)
            if now <= prices[i]:
                herd[i], prices[i] = trial, now
        print(f"loss {min(prices):.4f}", flush=True)
    best = polish(constants(herd[prices.index(min(prices))]), args.seconds / 4, rng)
    print("\n".join(f"{key} = {value:.3g}" for key, value in best.items()))
    print(format_table(predict_table(with_constants(best))))


def with_constants(found: dict[str, float]) -> Topology:
    """The preset's machine with other constants, to the three digits that are printed."""
    return replace(Topology.parse(f"1x8:{PRESET}"), **{key: float(f"{value:.3g}") for key, value in found.items()})


def polish(best: dict[str, float], seconds: float, rng: random.Random) -> dict[str, float]:
    """Small random steps that shrink the largest error, and a little the mean."""

    def worst(found: dict[str, float]) -> float:
        errors = [abs(error) for row in predict_table(with_constants(found)) for error in row.errors]
        return max(errors) + 0.02 * sum(errors) / len(errors)

    least, width = worst(best), 0.1
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        trial = dict(best)
        for key in rng.sample(list(BOUNDS), rng.randint(1, 3)):
            low, high = BOUNDS[key]
            trial[key] = min(high, max(low, trial[key] * (1.0 + rng.gauss(0.0, width))))
        now = worst(trial)
        if now < least:
            best, least = trial, now
        width = max(0.01, width * 0.998)
    return best


if __name__ == "__main__":
    main()
