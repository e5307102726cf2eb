"""Whole diffusers pipelines: seconds and peak memory of each stage, in one process and on ranks.

    python benchmarks/pipeline_stages.py [--kinds image video audio] [--machines 1 2] [--rate 1gbit] [--out FILE]

Three pipelines of diffusers with random weights (tests/support/clients.py, --times as wide and as deep as tests have
them) are called twice as they are written and twice with every network compiled by ``sfcompile.compile_pipeline``; the
second call counts. One process has all cores of this machine; ranks have a thread each, and share the same cores. With
--machines 2 (root), ranks lie on two emulated machines of a core each whose links are shaped. A stage is all calls of
one network: its text encoders, its transformers, its VAE; "rest" is the pipeline's own Python.

    seconds  of rank 0, in all calls of the stage
    MiB      the most that a rank has resident in that stage above its imports, without files; of what the ranks of a
             machine share, its part. Of the rank that has most.
    limit    compute alone: the seconds of one process, for no core is left over that ranks could use beside it
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from emulated_machines import CannotEmulate, emulated_machines
from memory import EVERY_S, resident_bytes
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
SAID = "stages of a rank: "
METHODS = ("forward", "encode", "decode")
REST = "rest"


class Stages:
    """Seconds and peak memory of a process by stage; a thread looks at the memory every few milliseconds."""

    def __init__(self, ranks_here: int) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)
        self._here, self._now = ranks_here, REST
        self._before = resident_bytes(os.getpid(), ranks_here)
        threading.Thread(target=self._watch, daemon=True).start()

    def clear(self) -> None:
        """Forget all that was seen: the next call counts."""
        self.seconds.clear()
        self.bytes.clear()

    def around(self, stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, its calls a stage."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, self._now = self._now, stage
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.look()
                self.seconds[stage] += time.perf_counter() - start if outer == REST else 0.0
                self._now = outer

        return timed

    def look(self) -> None:
        """Note what is resident now."""
        resident = resident_bytes(os.getpid(), self._here) - self._before
        self.bytes[self._now] = max(self.bytes[self._now], resident)

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(EVERY_S)


def call_of(kind: str, pipe: Any) -> torch.Tensor:
    """What the pipeline draws, from the same seed each time."""
    seed = torch.Generator().manual_seed(0)
    if kind == "image":
        given = {"height": 128, "width": 128, "num_inference_steps": 4, "max_sequence_length": 24}
    elif kind == "video":
        given = {"height": 128, "width": 192, "num_frames": 9, "guidance_scale": 3.0, "num_inference_steps": 4}
        given |= {"max_sequence_length": 24}
    else:
        given = {"num_inference_steps": 4, "guidance_scale": 3.0}
    return torch.as_tensor(pipe("a photo of a cat in the rain", output_type="pt", generator=seed, **given)[0])


@torch.no_grad()
def one_job(kind: str, times: int, compiled: bool, options: dict[str, Any]) -> None:
    """One process, or one rank of a job: prints what it measured as a line."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import clients
    import diffusers  # noqa: F401 - what is resident before a pipeline is there
    import transformers  # noqa: F401

    import sfcompile

    rank, here = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    build = {"image": clients.image_pipeline, "video": clients.two_experts, "audio": clients.audio_pipeline}[kind]
    stages = Stages(here)
    pipe = build(times)
    pipe.set_progress_bar_config(disable=True)
    want = None
    if compiled:
        if rank == 0:
            want = call_of(kind, pipe)
        sfcompile.compile_pipeline(pipe, options=options)
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            for method in METHODS:
                if callable(getattr(component, method, None)):
                    setattr(component, method, stages.around(name, getattr(component, method)))
    call_of(kind, pipe)
    stages.clear()
    start = time.perf_counter()
    got = call_of(kind, pipe)
    whole = time.perf_counter() - start
    stages.seconds[REST] = whole - sum(stages.seconds.values())
    said = {"rank": rank, "seconds": dict(stages.seconds), "bytes": dict(stages.bytes), "whole": whole}
    if want is not None:
        said["difference"] = float((got - want).abs().max() / want.abs().max())
    os.write(1, f"\n{SAID}{json.dumps(said)}\n".encode())  # in one piece, whatever other ranks write


def ranks_of(lines: list[str]) -> list[dict[str, Any]]:
    """What the ranks of a job said, by rank.

    Raises:
        SystemExit: none said anything; the job's last lines are shown.
    """
    said = [json.loads(line.split(SAID, 1)[1]) for line in lines if SAID in line]
    if not said:
        raise SystemExit("\n".join([*lines[-30:], "The job ended without a result; its last lines are above."]))
    return sorted(said, key=lambda one: int(one["rank"]))


def run(args: argparse.Namespace, kind: str, machines: int) -> list[dict[str, Any]]:
    """A job of its own: one process (``machines`` 0), or ranks on so many machines."""
    script = [str(Path(__file__).resolve()), "--job", kind, "--times", str(args.times), "--inner", args.inner]
    env = {"SFCOMPILE_LOG": "error", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    if machines == 0:
        command, env = [sys.executable, *script], env | {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    elif machines == 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.ranks), *script]
        env = env | {"OMP_NUM_THREADS": "1"}
    else:
        with emulated_machines(machines, args.rate) as cluster:
            _, outputs = cluster.torchrun(args.ranks // machines, script, env)
        return ranks_of([line for output in outputs for line in output.splitlines()])
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
    return ranks_of((done.stdout + done.stderr).splitlines())


def table(kind: str, where: str, one: dict[str, Any], ranks: list[dict[str, Any]]) -> list[str]:
    """Rows of a kind: a stage each, then the whole call."""
    first, lines = ranks[0], list[str]()
    for stage in sorted(one["seconds"], key=lambda name: (name == REST, name)):
        most = max(rank["bytes"].get(stage, 0) for rank in ranks) / 2**20
        alone, together = one["seconds"][stage], first["seconds"].get(stage, 0.0)
        memory = f"{one['bytes'].get(stage, 0) / 2**20:>8.0f} {most:>8.0f}"
        lines.append(f"{kind:<6} {where:<6} {stage:<18} {alone:>8.2f} {together:>8.2f} {memory}")
    most = max(max(rank["bytes"].values()) for rank in ranks) / 2**20
    memory = f"{max(one['bytes'].values()) / 2**20:>8.0f} {most:>8.0f}"
    lines.append(
        f"{kind:<6} {where:<6} {'all':<18} {one['whole']:>8.2f} {first['whole']:>8.2f} {memory}  "
        f"difference {first['difference']:.1e} of the output's scale"
    )
    return lines


def main() -> int:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["image", "video", "audio"], choices=["image", "video", "audio"])
    parser.add_argument("--machines", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--ranks", type=int, default=4, help="of all machines together")
    parser.add_argument("--rate", default="1gbit", help="of each emulated machine's link, in tc's notation")
    parser.add_argument("--times", type=int, default=4, help="how much wider and deeper than the tests' networks")
    parser.add_argument("--inner", default="eager", help="what runs the local graph: eager or inductor")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="", help="a file for the result")
    args = parser.parse_args()
    if args.job:
        compiled = "WORLD_SIZE" in os.environ
        one_job(args.job, args.times, compiled, {"placement": "shard", "inner": args.inner, "timeout_s": 120.0})
        return 0
    lines = [
        f"python benchmarks/pipeline_stages.py --ranks {args.ranks} --rate {args.rate} --times {args.times} --inner "
        f"{args.inner}, {time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        f"{'':<6} {'':<6} {'':<18} {'seconds':>17} {'MiB':>17}",
        f"{'':<6} {'':<6} {'stage':<18} {'one':>8} {'ranks':>8} {'one':>8} {'ranks':>8}",
    ]
    print("\n".join(lines), flush=True)
    for kind in args.kinds:
        (one,) = run(args, kind, 0)
        for machines in args.machines:
            where = f"{machines}x{args.ranks // machines}"
            try:
                lines += (rows := table(kind, where, one, run(args, kind, machines)))
                print("\n".join(rows), flush=True)
            except CannotEmulate as error:
                print(f"{kind} on {machines} machines: {error}", flush=True)
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
