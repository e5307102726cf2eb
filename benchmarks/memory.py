"""Peak memory of a rank and the step, with whole weights and with one copy for the ranks of a machine.

    python benchmarks/memory.py [--depth 8] [--width 768] [--steps 10] [--inner eager] [--out FILE]

Ranks fill the DiT of examples/hello.py from one safetensors file, compile it and run steps. A rank's memory is its
proportional set (Pss: pages that several processes map count by their share), looked at every few milliseconds by a
process beside the ranks, less what it was with everything imported and no model. Machines are numbers in the ranks'
environment on this one: each has a copy of its own.

    bound    what is promised: the peak with whole weights, less the weights, plus the weights over the
             ranks of a machine, plus those of two layers, and 5 % of all that
    step     with one copy over whole weights: both models in one job, steps in turns, the median of the ratios of
             neighbouring steps, of rank 0
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIDE = 32
EVERY_S = 0.005


def pss_bytes(pid: int) -> int:
    """The proportional set of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


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
def worker(kind: str, path: Path, width: int, depth: int, steps: int, inner: str) -> None:
    """One rank: prints a word when everything is imported, and the step ratio or the largest difference at the end."""
    import sfcompile
    from sfcompile import backend as _backend  # noqa: F401

    torch.set_num_threads(1)
    gen = torch.Generator().manual_seed(1)
    inputs = torch.randn(1, 4, SIDE, SIDE, generator=gen), torch.tensor([500.0])
    options: dict[str, Any] = {"placement": "shard", "inner": inner, "topology": "auto:assumed"}
    options |= {"timeout_s": 300.0}

    def filled(weights: str) -> Any:
        model = model_of(width, depth, "meta")
        if weights == "whole":
            read_whole(model, path)
        else:
            sfcompile.load_sharded(model, path, options={**options, "weights": weights})
        return torch.compile(model, backend="streamfusion", options={**options, "weights": weights})

    print("ready", flush=True)
    sys.stdin.readline()
    if kind != "steps":
        run = filled(kind)
        for _ in range(3):
            run(*inputs)
        print("done", flush=True)
        sys.stdin.readline()  # the other ranks measure too: nobody leaves
        return
    runs = [filled("whole"), filled("sharded-by-machine")]
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
    print(
        f"{statistics.median(ratios):.3f} ({spread}) {statistics.median(seconds) * 1e3:.0f} {difference:g}", flush=True
    )
    sys.stdin.readline()


def start(ranks: int, machines: int, argv: list[str]) -> list[subprocess.Popen[str]]:
    """The ranks of a job, each ready with everything imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        here = ranks // machines
        env = {
            "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here,
            "GROUP_RANK": rank // here, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SFCOMPILE_LOG": "error",
            "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        words = {name: str(value) for name, value in env.items()}
        command = [sys.executable, __file__, *argv]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=os.environ | words, text=True, bufsize=1, **pipes))
    for process in processes:
        heard(process)
    return processes


def heard(process: subprocess.Popen[str]) -> str:
    """A rank's next line.

    Raises:
        RuntimeError: it has ended instead.
    """
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise RuntimeError(f"a rank ended with code {process.wait()}")
    return line


def tell(processes: list[subprocess.Popen[str]]) -> None:
    """Let the ranks go on."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")


def peaks(ranks: int, machines: int, argv: list[str]) -> list[int]:
    """By rank: the largest proportional set while it loaded, compiled and ran, less what it was before."""
    processes = start(ranks, machines, argv)
    before = [pss_bytes(process.pid) for process in processes]
    most = list(before)
    tell(processes)
    readers = [process.stdout.fileno() for process in processes if process.stdout is not None]
    for reader in readers:
        os.set_blocking(reader, False)
    waiting = set(readers)
    while waiting:
        most = [max(known, pss_bytes(process.pid)) for known, process in zip(most, processes, strict=True)]
        for reader in list(waiting):
            try:
                if os.read(reader, 1 << 12):
                    waiting.remove(reader)
                else:
                    raise RuntimeError("a rank ended early")
            except BlockingIOError:
                pass
        time.sleep(EVERY_S)
    tell(processes)
    for process in processes:
        process.wait()
    return [high - low for high, low in zip(most, before, strict=True)]


def ratio(ranks: int, machines: int, argv: list[str]) -> str:
    """What rank 0 says of the steps."""
    processes = start(ranks, machines, argv)
    tell(processes)
    lines = [heard(process) for process in processes]
    tell(processes)
    for process in processes:
        process.wait()
    return lines[0]


def main() -> int:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8, help="blocks")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=10, help="pairs of steps for the ratio; 0: memory only")
    parser.add_argument("--cases", default="2x1 4x1 4x2 2x2", help="ranks x machines")
    parser.add_argument("--inner", default="eager", help="what runs the local graph: eager or inductor")
    parser.add_argument("--out", default="", help="a file for the result")
    parser.add_argument("--kind", default="", help=argparse.SUPPRESS)
    parser.add_argument("--file", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        worker(args.kind, Path(args.file), args.width, args.depth, args.steps, args.inner)
        return 0
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
            f"{'ranks':>5} {'machines':>8} {'whole':>8} {'once a machine':>14} {'bound':>8}  within  step: median of "
            "ratios (range), ms with whole weights, largest difference",
        ]
        fits = True
        for ranks, machines in (map(int, case.split("x")) for case in args.cases.split()):
            argv = [
                f"--{name}={value}"
                for name, value in vars(args).items()
                if name not in ("kind", "file", "out", "cases")
            ]
            argv += [f"--file={path}"]
            most = max(peaks(ranks, machines, [*argv, "--kind=whole"]))
            least = max(peaks(ranks, machines, [*argv, "--kind=sharded-by-machine"]))
            bound = 1.05 * (most - whole + whole / (ranks // machines) + 2 * layer)
            fits = fits and least <= bound
            said = ratio(ranks, machines, [*argv, "--kind=steps"]) if args.steps else "-"
            numbers = " ".join(f"{value / 2**20:{width}.0f}" for value, width in ((most, 8), (least, 14), (bound, 8)))
            lines.append(f"{ranks:>5} {machines:>8} {numbers}  {'yes' if least <= bound else 'NO':>6}  {said}")
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.out:
        Path(args.out).write_text(text, encoding="utf-8")
    return 0 if fits else 1


if __name__ == "__main__":
    raise SystemExit(main())
