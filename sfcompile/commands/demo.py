"""`sfcompile demo`: one model in one process, then on several ranks, and how far apart the two are.

This file starts the processes and prints what they found; `demo_worker` is what runs in each of them. The reference
runs first and alone, with all cores; then the ranks share the same cores.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from sfcompile.commands.launch import check_places, launch, num_cores
from sfcompile.errors import LaunchError

# The numerics contract in fp32: largest difference over the largest magnitude of the one-process output.
TOLERANCE = 1e-5
# Signs that something else used the cores: slowest over fastest step, and the part of its threads' time that one
# process got. The latter says nothing about steps too short to keep the threads busy.
NOISE = 1.5
MIN_CPU_SHARE = 0.75
MIN_STEP_S = 0.5
SHARED_CORES = (
    "Ranks share cores here, so no speed-up from parallelism can show; the ratio is",
    "the sum of what compilation saves and what sharding and sharing cost.",
)
SAME_CORES = (
    "Both runs use the same cores, so the ratio shows no speed-up from more hardware,",
    "only what compilation saves and what sharding costs.",
)


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo.

    Attributes:
        ranks, machines: how many processes, and on how many machines they believe they sit.
        tokens, text: image and text tokens.
        layers, single_layers: blocks with separate and with joint weights for text and image.
        heads, head_dim: attention heads and their size.
        steps: denoising steps that are timed.
        inner: the backend's option of that name.
    """

    ranks: int = 4
    machines: int = 1
    tokens: int = 4096
    text: int = 512
    layers: int = 2
    single_layers: int = 4
    heads: int = 8
    head_dim: int = 64
    steps: int = 4
    inner: str = "auto"


@dataclass(frozen=True)
class Result:
    """What one process measured.

    Attributes:
        threads: compute threads of the process.
        first_s: seconds of the first call, compilation included.
        step_s: seconds of each timed step.
        cpu_s: processor seconds of all threads over the timed steps.
        difference: largest absolute difference from the reference over all steps; 0 for the reference.
        scale: largest magnitude of the reference's output.
    """

    threads: int
    first_s: float
    step_s: list[float]
    cpu_s: float
    difference: float
    scale: float


def run_demo(config: DemoConfig) -> int:
    """Run the demo and print it.

    Returns:
        0, or 1 if the outputs differ by more than the contract allows, or a failed process's exit code.

    Raises:
        LaunchError: the sizes do not fit, or diffusers is missing.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise LaunchError(
            "The demo needs diffusers, which is not installed",
            "Its model is one of that library, unchanged",
            'Run pip install "sfcompile[diffusers]"',
        )
    check_places(config.ranks, config.machines)
    if config.head_dim % 8:
        raise LaunchError(f"--head-dim {config.head_dim} is no multiple of 8", "The model rotates heads in such steps")
    folder = Path(tempfile.mkdtemp(prefix="sfcompile-demo-"))
    try:
        (folder / "config.json").write_text(json.dumps(asdict(config)), encoding="utf-8")
        return _run_in(folder, config)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_in(folder: Path, config: DemoConfig) -> int:
    cores = num_cores()
    worker = ["-m", "sfcompile.commands.demo_worker"]
    print(f"[1/2] one process, eager, {cores} threads", flush=True)
    code = launch([*worker, "reference", str(folder)], 1, env={"OMP_NUM_THREADS": str(cores)})
    if code:
        return code
    threads = max(1, cores // config.ranks)
    print(f'[2/2] {_ranks(config.ranks)}, torch.compile(model, backend="streamfusion"), {threads} threads each')
    # Set here, not left to launch(): a value in the user's shell would make the two timings use different cores.
    code = launch([*worker, "rank", str(folder)], config.ranks, config.machines, env={"OMP_NUM_THREADS": str(threads)})
    if code:
        return code
    reference = read_result(folder, "reference")
    ranks = [read_result(folder, f"rank{rank}") for rank in range(config.ranks)]
    print(summary(reference, ranks, cores))
    return 0 if agrees(ranks) else 1


def agrees(ranks: list[Result]) -> bool:
    """Whether every rank's output is as close to the reference as the contract demands; a NaN is not."""
    return all(result.difference <= TOLERANCE * result.scale for result in ranks)


def summary(reference: Result, ranks: list[Result], cores: int) -> str:
    """The table at the end: the difference, the latencies, and what this machine can show."""
    # A step is over when the slowest rank is done; max() would hide a NaN, so the worst rank is the first that fails.
    steps = [max(times) for times in zip(*(result.step_s for result in ranks), strict=True)]
    worst = next((result for result in ranks if not agrees([result])), max(ranks, key=lambda r: r.difference))
    one, many = statistics.median(reference.step_s), statistics.median(steps)
    used = sum(result.threads for result in ranks)
    verdict = "OK" if agrees(ranks) else "FAILED"
    lines = [
        "",
        "Result",
        f"  difference   {worst.difference:.2e} absolute, {worst.difference / worst.scale:.2e} of the output's scale "
        f"({worst.scale:.3g}); allowed {TOLERANCE:.0e}: {verdict}",
        f"  one process  {one:8.3f} s per step {_spread(reference.step_s)}, eager, {reference.threads} threads",
        f"  {_ranks(len(ranks)):<11}  {many:8.3f} s per step {_spread(steps)}, sharded, "
        f"{len(ranks)} x {ranks[0].threads} threads; first call {max(r.first_s for r in ranks):.1f} s with compilation",
        f"  ratio        {one / many:8.2f} x",
        f"  cores        {cores} on this machine, {used} threads over all ranks.",
    ]
    lines += [f"{'':15}{line}" for line in (SHARED_CORES if used > cores else SAME_CORES)]
    share = reference.cpu_s / (reference.threads * sum(reference.step_s))
    starved = one >= MIN_STEP_S and share < MIN_CPU_SHARE
    if starved or any(max(times) > NOISE * min(times) for times in (reference.step_s, steps)):
        lines.append(f"  warning      something else used the cores (one process got {share:.0%} of its threads' time,")
        lines.append(f"{'':15}or its steps differ a lot): do not trust latencies and ratio, run again")
    return "\n".join(lines)


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _spread(times: list[float]) -> str:
    return f"(median of {len(times)}, {min(times):.3f} to {max(times):.3f})"


def write_result(folder: Path, name: str, result: Result) -> None:
    """Leave a process's result for the process that started it."""
    (folder / f"{name}.json").write_text(json.dumps(asdict(result)), encoding="utf-8")


def read_result(folder: Path, name: str) -> Result:
    """What `write_result` left."""
    return Result(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def read_config(folder: Path) -> DemoConfig:
    """The sizes that the process that started us chose."""
    return DemoConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))


class Progress:
    """A bar on a terminal, one line per step anywhere else."""

    WIDTH = 28

    def __init__(self, title: str, total: int, shown: bool) -> None:
        self._title = title
        self._total = total
        self._shown = shown
        self._redraws = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def update(self, done: int, note: str) -> None:
        """Draw the state after `done` steps, with a note such as the last step's time."""
        if not self._shown:
            return
        filled = self.WIDTH * done // self._total
        bar = "#" * filled + "." * (self.WIDTH - filled)
        line = f"  {self._title} [{bar}] {done}/{self._total}  {note}"
        ends = "" if self._redraws and done < self._total else "\n"
        print(("\r\x1b[2K" if self._redraws else "") + line, end=ends, flush=True)
