"""Peak memory of a rank and the step, with whole weights and with those that ranks hold together.

    python benchmarks/memory.py [--depth 8] [--width 512] [--steps 6] [--inner eager] [--out FILE]

Ranks fill the DiT of examples/hello.py from one safetensors file, compile it and run steps. Machines are numbers in
the ranks' environment on this one: with one, its ranks hold the large weights once; with several, each rank holds a
share of them and gathers the rest while it computes (docs/weights.md). A rank's memory is what it has resident that
belongs to no file: its own pages, and of pages that the ranks of a machine share its part. A process beside the ranks
looks at it every few milliseconds; what it was with everything imported and no model is taken off.

    bound    what is promised: the peak with whole weights, less the weights, plus the weights over the ranks that hold
             them together, plus those of two layers, and 5 % of all that
    step     with weights held together over whole ones: both models in one job, steps in turns, the median of the
             ratios of neighbouring steps, of rank 0
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIDE = 32
EVERY_S = 0.005
_RESIDENT = ("RssAnon", "RssShmem")


class Job(NamedTuple):
    """What every rank of a job is told."""

    path: Path
    width: int
    depth: int
    steps: int
    inner: str


def resident_bytes(pid: int, ranks_here: int) -> int:
    """What a process has resident, without files; of what is shared one of ``ranks_here`` parts. 0 if it has ended.

    Not its proportional set: to read that takes 30 ms and holds up the process, for the system walks all its pages.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    sizes = {name: int(line.split()[1]) << 10 for line in lines if (name := line.split(":")[0]) in _RESIDENT}
    return sizes["RssAnon"] + sizes["RssShmem"] // ranks_here if len(sizes) == len(_RESIDENT) else 0


def model_of(width: int, depth: int, device: str) -> nn.Module:
    """The example's DiT."""
    sys.path.insert(0, str(EXAMPLES))
    from hello import DiT

    torch.manual_seed(0)
    with torch.device(device):
        return DiT(width=width, depth=depth, side=SIDE).eval().requires_grad_(False)


def read_whole(model: nn.Module, path: Path) -> None:
    """Every weight into this process's own memory, without a mapping of the file."""
    from sfcompile.package.tensors import find_tensors, map_open

    model.to_empty(device="cpu")
    with path.open("rb") as file:
        entries = find_tensors(map_open(file, path), 0, path.stat().st_size, str(path))
        for name, tensor in model.state_dict().items():
            file.seek(entries[name].start)
            file.readinto(tensor.view(-1).view(torch.uint8).numpy().data)


@torch.no_grad()
def worker(words: Connection, env: dict[str, str], job: Job, kind: str) -> None:
    """One rank: waits for a word, runs, says what it has to say, and waits for the others to be done."""
    import sfcompile
    from sfcompile.runtime.rank.session import close_session

    os.environ.update(env)
    torch.set_num_threads(1)
    gen = torch.Generator().manual_seed(1)
    inputs = torch.randn(1, 4, SIDE, SIDE, generator=gen), torch.tensor([500.0])
    options: dict[str, Any] = {"placement": "shard", "inner": job.inner, "topology": "auto:assumed"}
    options |= {"timeout_s": 300.0}

    def filled(weights: str) -> Any:
        model = model_of(job.width, job.depth, "meta")
        if weights == "whole":
            read_whole(model, job.path)
        else:
            sfcompile.load_sharded(model, job.path, options={**options, "weights": weights})
        return torch.compile(model, backend="streamfusion", options={**options, "weights": weights})

    words.recv()
    if kind == "steps":
        words.send(steps_of([filled("whole"), filled("sharded")], inputs, job.steps))
    else:
        run = filled(kind)
        for _ in range(3):
            run(*inputs)
        words.send("done")
    words.recv()  # the other ranks measure too: nobody leaves
    close_session()
    os._exit(0)


def steps_of(runs: list[Any], inputs: tuple[torch.Tensor, ...], steps: int) -> str:
    """The ratios of two models' steps, the median and the range; the second's seconds; their largest difference."""
    difference = max(float((runs[0](*inputs) - runs[1](*inputs)).abs().max()) for _ in range(3))
    ratios, seconds = list[float](), list[float]()
    for step in range(steps):
        took = [0.0, 0.0]
        for which in (0, 1) if step % 2 else (1, 0):
            start = time.perf_counter()
            runs[which](*inputs)
            took[which] = time.perf_counter() - start
        ratios.append(took[1] / took[0])
        seconds.append(took[0])
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    return f"{statistics.median(ratios):.3f} ({spread}) {statistics.median(seconds) * 1e3:.0f} {difference:g}"


class Ranks:
    """The ranks of a job, forked from this process, which has everything imported."""

    def __init__(self, ranks: int, machines: int, job: Job, kind: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context, self.here = get_context("fork"), ranks // machines
        self.words, self.processes = [], []
        for rank in range(ranks):
            env = {
                "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % self.here, "LOCAL_WORLD_SIZE": self.here,
                "GROUP_RANK": rank // self.here, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            mine, its = context.Pipe()
            work = (its, {name: str(value) for name, value in env.items()}, job, kind)
            process = context.Process(target=worker, args=work)
            process.start()
            its.close()
            self.words.append(mine)
            self.processes.append(process)

    def tell(self) -> None:
        """Let the ranks go on."""
        for words in self.words:
            words.send("")

    def end(self) -> None:
        """Let them end, and wait for it."""
        self.tell()
        for process in self.processes:
            process.join()

    def resident(self) -> list[int]:
        """Bytes by rank."""
        return [resident_bytes(process.pid or 0, self.here) for process in self.processes]


def peaks(ranks: int, machines: int, job: Job, kind: str) -> list[int]:
    """By rank: the most memory while it loaded, compiled and ran, less what it was before."""
    group = Ranks(ranks, machines, job, kind)
    before = most = group.resident()
    group.tell()
    waiting = list(group.words)
    while waiting:
        most = [max(known, now) for known, now in zip(most, group.resident(), strict=True)]
        for words in wait(waiting, EVERY_S):
            assert isinstance(words, Connection)
            words.recv()  # EOFError: that rank has ended early
            waiting.remove(words)
    group.end()
    return [high - low for high, low in zip(most, before, strict=True)]


def ratio(ranks: int, machines: int, job: Job) -> str:
    """What rank 0 says of the steps."""
    group = Ranks(ranks, machines, job, "steps")
    group.tell()
    lines = [str(words.recv()) for words in group.words]
    group.end()
    return lines[0]


def main() -> int:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8, help="blocks")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6, help="pairs of steps for the ratio; 0: memory only")
    parser.add_argument("--cases", default="2x1 4x1 4x2 2x2", help="ranks x machines")
    parser.add_argument("--inner", default="eager", help="what runs the local graph: eager or inductor")
    parser.add_argument("--out", default="", help="a file for the result")
    args = parser.parse_args()
    os.environ |= {"SFCOMPILE_LOG": "error", "OMP_NUM_THREADS": "1"}
    for module in ("torch._dynamo", "sfcompile.backend", "sfcompile.package.weight_files"):
        import_module(module)
    from sfcompile.package.tensors import write_tensors

    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        path = Path(folder) / "model.safetensors"
        model = model_of(args.width, args.depth, "cpu")
        with path.open("wb") as file:
            write_tensors(file, model.state_dict())
        layer = sum(weight.numel() * 4 for weight in model.blocks[0].parameters())  # type: ignore[index]
        whole = sum(weight.numel() * 4 for weight in model.parameters())
        del model
        lines = [
            f"python benchmarks/memory.py --depth {args.depth} --width {args.width} --inner {args.inner}: weights "
            f"{whole / 2**20:.0f} MiB, a layer {layer / 2**20:.0f} MiB, load {os.getloadavg()[0]:.1f} on "
            f"{os.cpu_count()} cores; MiB of the largest rank above its imports",
            f"{'ranks':>5} {'machines':>8} {'weights':>14} {'whole':>8} {'together':>8} {'bound':>8}  within  step: "
            "median of ratios (range), ms with whole weights, largest difference",
        ]
        fits, job = True, Job(path, args.width, args.depth, args.steps, args.inner)
        for ranks, machines in (map(int, case.split("x")) for case in args.cases.split()):
            most = max(peaks(ranks, machines, job, "whole"))
            least = max(peaks(ranks, machines, job, "sharded"))
            bound = 1.05 * (most - whole + whole / ranks + 2 * layer)
            fits = fits and least <= bound
            said = ratio(ranks, machines, job) if args.steps else "-"
            held = "once a machine" if machines == 1 else "in shares"
            numbers = " ".join(f"{value / 2**20:8.0f}" for value in (most, least, bound))
            within = "yes" if least <= bound else "NO"
            lines.append(f"{ranks:>5} {machines:>8} {held:>14} {numbers}  {within:>6}  {said}")
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.out:
        Path(args.out).write_text(text, encoding="utf-8")
    return 0 if fits else 1


if __name__ == "__main__":
    raise SystemExit(main())
