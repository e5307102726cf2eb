"""Predicted step time, exposed communication and efficiency of full-size models on 1 to 64 machines.

    python benchmarks/scaling.py [--out docs/scaling.md]

Nothing runs: models are traced on the meta device and planned for each topology (sfcompile/prediction/predict.py).
Takes some minutes, nearly all of it searching plans for hundreds of ranks.
"""

from __future__ import annotations

import argparse
import datetime
import warnings
from pathlib import Path

import torch

from sfcompile.commands.meta_model import build_meta_model
from sfcompile.prediction.predict import Prediction, simulate

MACHINES = (1, 2, 4, 8, 16, 32, 64)
# Name, tokens of the noisy input, samples (2: a guidance pair).
WORKLOADS = (("flux", 36864, 1), ("flux", 65536, 1), ("wan", 75600, 2))
HEAD = """# Predicted scaling, 1 to 64 machines

{date}, written by `python benchmarks/scaling.py`. **Predictions, not measurements**: no GPU was involved. Constants are
those of the preset `{preset}` (runtime/program/presets.py), 8 GPUs a machine, bf16, weights whole on every rank.

* *step*: predicted time of one transformer step; *exposed*: the part of it in which the most blocked rank waits.
* *limit*: the larger of compute alone and bytes over bandwidth; *efficiency*: limit over step.
* *speed-up*: over the same model on one machine. Beyond the point where heads and tokens run out it falls: the table
  says how far it pays to go.
"""


def predicted(name: str, tokens: int, batch: int, topology: str) -> Prediction:
    """One cell."""
    built = build_meta_model(name, tokens, batch)
    kwargs = {k: _half(v) for k, v in built.kwargs.items()}
    return simulate(torch.nn.Module.to(built.model, torch.bfloat16), topology=topology, name=built.class_name, **kwargs)


def _half(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return type(value)(_half(entry) for entry in value)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(torch.bfloat16)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--preset", default="a100-efa")
    parser.add_argument("--machines", type=int, nargs="+", default=list(MACHINES))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    lines = [HEAD.format(date=datetime.date.today().isoformat(), preset=args.preset)]
    for name, tokens, batch in WORKLOADS:
        first: float | None = None
        title = f"\n## {{}}, {tokens} tokens, batch {batch}\n"
        rows = []
        for machines in args.machines:
            found = predicted(name, tokens, batch, f"{machines}x8:{args.preset}")
            first = first or found.step_s * machines / args.machines[0]
            main_plan = found.choices.main
            assert main_plan is not None
            plan = f"batch {found.choices.batch} x {main_plan.best}" if found.choices.batch > 1 else str(main_plan.best)
            rows.append(
                f"| {machines} | {8 * machines} | {plan} | {found.step_s * 1e3:.1f} | {found.exposed_s * 1e3:.1f} "
                f"| {found.limit_s * 1e3:.1f} | {found.limit_s / found.step_s:.0%} | {first / found.step_s:.2f} |"
            )
            print(found.name, rows[-1], flush=True)
            title = title.replace("{}", found.name)
        lines += [
            title,
            "| machines | ranks | plan | step ms | exposed ms | limit ms | efficiency | speed-up |",
            "|---:|---:|---|---:|---:|---:|---:|---:|",
            *rows,
        ]
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
