"""One GPU, one command, under ten minutes: whether the generated kernels are right on real hardware, and how fast.

    make gpu-check [PYTHON=python3] [WHEELS=folder] [GPU_ARGS="--only speed puts"]

It runs from the source tree with the Python at hand (torch and Triton must be there), needs no network, and installs
nothing but the wheels of a folder, into build/. Sections run in processes of their own with a time limit: a kernel that
hangs costs its section and no more. What cannot run is named, with the reason. The report goes to
benchmarks/results/DATE-gpu-check-GPU.txt.

Exit code 0: every check that ran passed (a goal of speed that is missed is told and is no failure); 1: a check failed
or a section did not end; 2: there is no GPU, nothing was run (make itself says 2 for both;
the last line of the report tells them apart). ``--dry-run`` runs what a CPU can, tiny, in Triton's
interpreter, and writes no file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEELS_AT = ROOT / "build" / "gpu-check-wheels"
TOTAL_S = 570.0
PACKAGES = ("torch", "triton", "nvidia-nvshmem-cu13", "nvshmem4py-cu13", "diffusers", "numpy")


@dataclass(frozen=True)
class Section:
    """A function ``name`` of module ``module``; ``parts`` processes share its cases.

    ``decides``: what follows from it. ``alone``: timed, so nothing else runs meanwhile. ``limit_s``: of each process.
    """

    name: str
    module: str
    what: str
    limit_s: float
    parts: int = 1
    alone: bool = False
    decides: str = ""


SECTIONS = (
    Section(
        "numerics", "gpu_check_kernels", "every kernel variant against fp64", 200, 8,
        decides="whether generated kernels may be used on this GPU at all",
    ),
    Section(
        "virtual", "gpu_check_kernels", "all ranks of every schedule in one launch", 200, 4,
        decides="whether puts, signals and waits are ordered here as the PTX machine has them",
    ),
    Section(
        "apart", "gpu_check_kernels", "ranks as launches of their own, side by side", 150,
        decides="whether Hopper's kernel, whose tiles a warp of its own fetches, may be used here, also with masks",
    ),
    Section(
        "bounded", "gpu_check_kernels", "waits give up and say what they waited for", 100,
        decides="whether a rank that waits in vain comes to an end",
    ),
    Section("nvshmem", "gpu_check_runtime", "NVSHMEM with one PE", 150, decides="whether transport='nvshmem' can work"),
    Section(
        "graph", "gpu_check_runtime", "CUDA graph of puts, attention, collects and credits", 100,
        decides="whether mode='reduce-overhead' may capture calls of sites",
    ),
    Section(
        "order", "gpu_check_jobs", "calls open side by side, of which the younger ends first", 100,
        decides="whether sites of a graph may end in any order",
    ),
    Section(
        "lost", "gpu_check_jobs", "a peer that never comes", 100,
        decides="whether a dead rank is an error on the others, and not a result",
    ),
    Section(
        "tiles", "gpu_check_speed", "tile sizes that speed will try, compiled", 200, 3,
        decides="nothing; it saves speed its compilations",
    ),
    Section(
        "sanitizer", "gpu_check_kernels", "kernels under Triton's concurrency sanitizer", 200,
        decides="whether copies into shared memory are waited for before they are read, and read before the next",
    ),
    Section(
        "speed", "gpu_check_speed", "attention beside cuDNN and flash", 150, alone=True,
        decides="the tile of plain attentions on this GPU (result file)",
    ),
    Section(
        "library", "gpu_check_jobs", "the library's calls beside the generated kernel", 100, alone=True,
        decides="attention='auto' where a compile cannot time it (result file)",
    ),
    Section(
        "puts", "gpu_check_speed", "cost of interleaved pushes", 60, alone=True,
        decides="whether outputs are better sent by a kernel of their own",
    ),
    Section(
        "model", "gpu_check_speed", "whole models through the backend, one rank", 200, alone=True,
        decides="whether the backend costs a model anything before it is sharded",
    ),
    # Last: a dry run forks its ranks when all that they need has been imported.
    Section(
        "inductor", "gpu_check_ranks", "a model compiled for ranks that are processes of this GPU", 200, 2,
        decides="whether what Inductor makes of a rank's graph keeps the order of puts, waits and credits",
    ),
    Section(
        "replayed", "gpu_check_ranks", "the same model in CUDA graphs, on two ranks", 200,
        decides="whether mode='reduce-overhead' may be used on several ranks",
    ),
)  # fmt: skip


@dataclass
class Task:
    """A process that runs parts of sections ("name:part/parts")."""

    parts: list[str]
    limit_s: float
    lines: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    took_s: float = 0.0
    failure: str = ""


@dataclass
class Found:
    """A section's results."""

    section: Section
    tasks: list[Task] = field(default_factory=list)
    results: list[dict[str, str]] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in Triton's interpreter, tiny")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS], help="these sections")
    parser.add_argument("--wheels", type=Path, help="install this folder's wheels (into build/) first")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the report")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        run_child(args.child, args.lines, args.dry_run)
        return 0
    missing = no_gpu()
    if missing and not args.dry_run:
        print(f"gpu-check: {missing}; nothing was run (--dry-run runs what a CPU can)")
        return 2
    began = time.monotonic()
    installed = install(args.wheels) if args.wheels else ""
    chosen = [section for section in SECTIONS if not args.only or section.name in args.only]
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(chosen, Path(folder), args.dry_run, began + TOTAL_S)
    text, failed = report(found, installed, time.monotonic() - began, args.dry_run)
    print(text)
    if not args.dry_run:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"{datetime.now(UTC):%Y-%m-%d}-gpu-check-{_slug(gpu_name())}.txt"
        path.write_text(text, encoding="utf-8")
        print(f"written to {path}")
        keep_figures(found, args.out)
    return int(failed)


def no_gpu() -> str:
    """Why nothing can run on a GPU here; "" if it can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU on this machine"


def install(wheels: Path) -> str:
    """Install a folder's wheels where the sections' processes look first; a line for the report."""
    files = sorted(wheels.glob("*.whl"))
    if not files:
        return f"no wheels in {wheels}"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--upgrade", "--target"]
    done = subprocess.run([*command, str(WHEELS_AT), *map(str, files)], capture_output=True, text=True, check=False)
    names = ", ".join(path.name for path in files)
    if done.returncode:
        return f"wheels could not be installed ({names}): {' '.join(done.stderr.split())[-300:]}"
    return f"installed for this run: {names}"


# ---------------------------------------------------------------------- processes


def run_child(parts: Sequence[str], lines: Path, dry: bool) -> None:
    """In a section's process: run parts of sections."""
    from gpu_check_report import Bench

    from sfcompile.codegen.toolchain.interpreter import interpreting

    if dry:
        sys.path.insert(0, str(ROOT / "tests" / "support"))  # what stands in for a GPU stands in for it in tests too
        from deadline import Deadline
    modules = {section.name: section.module for section in SECTIONS}
    for entry in parts:
        name, _, share = entry.partition(":")
        part, _, count = share.partition("/")
        bench = Bench(lines, name, dry, int(part), int(count))
        with bench.case(name), interpreting(Deadline(20.0)) if dry else nullcontext():
            function: Any = getattr(importlib.import_module(modules[name]), name)
            function(bench)


def run_all(sections: Sequence[Section], folder: Path, dry: bool, deadline: float) -> list[Found]:
    """All sections: first those that may share the GPU, then one after the other those that are timed."""
    found = [Found(section) for section in sections]
    if dry:  # one process: importing torch nine times would take longer than the checks
        parts = [f"{section.name}:0/1" for section in sections]
        task = Task(parts, TOTAL_S, folder / "lines", folder / "log")
        _together([task], 1, dry, deadline)
        for entry in found:
            entry.tasks.append(task)
    else:
        for entry in found:
            section = entry.section
            for part in range(section.parts):
                names = [f"{section.name}:{part}/{section.parts}"]
                at = f"{section.name}-{part}"
                entry.tasks.append(Task(names, section.limit_s, folder / f"{at}.lines", folder / f"{at}.log"))
        shared = [task for entry in found if not entry.section.alone for task in entry.tasks]
        _together(shared, max(1, min(14, (os.cpu_count() or 2) - 2)), dry, deadline)
        for entry in found:
            if entry.section.alone:
                _together(entry.tasks, 1, dry, deadline)
    for entry in found:
        for path in dict.fromkeys(task.lines for task in entry.tasks):
            entry.results += [line for line in _read(path) if line["section"] == entry.section.name]
    return found


def _together(tasks: Sequence[Task], most: int, dry: bool, deadline: float) -> None:
    """Run processes, some at a time, each within its limit and the whole before the deadline."""
    waiting, running = list(tasks), list[Task]()
    try:
        while waiting or running:
            while waiting and len(running) < most:
                task = waiting.pop(0)
                if time.monotonic() > deadline:
                    task.failure = "not started: the time for the whole check is up"
                    continue
                _start(task, dry)
                running.append(task)
            time.sleep(0.05)
            for task in list(running):
                if _ended(task, deadline):
                    running.remove(task)
    finally:
        for task in running:
            _kill(task)


def _start(task: Task, dry: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    given = environment.get("PYTHONPATH")
    paths = [str(path) for path in (WHEELS_AT, ROOT, ROOT / "benchmarks") if path.is_dir()]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *([given] if given else [])])
    command = [sys.executable, str(Path(__file__).resolve()), "--lines", str(task.lines)]
    command += (["--dry-run"] if dry else []) + ["--child", *task.parts]
    with task.log.open("wb") as log:
        # A group of its own: Inductor's compile workers end with it.
        task.process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    task.began = time.monotonic()


def _ended(task: Task, deadline: float) -> bool:
    assert task.process is not None
    code, now = task.process.poll(), time.monotonic()
    task.took_s = now - task.began
    if code is None and task.took_s < task.limit_s and now < deadline:
        return False
    if code is None:
        _kill(task)
        task.failure = f"did not end within {task.took_s:.0f} s and was killed"
    elif code:
        task.failure = f"ended with code {code}"
    if task.failure:
        said = task.log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        task.failure += "".join(f"\n       | {line[:200]}" for line in said)
    return True


def _kill(task: Task) -> None:
    assert task.process is not None
    try:
        os.killpg(task.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    task.process.wait()


def _read(path: Path) -> list[dict[str, str]]:
    """What sections told; a process that was killed may have left half a line."""
    results: list[dict[str, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            results.append(json.loads(line))
    return results


# ---------------------------------------------------------------------- report


def figures(found: Sequence[Found]) -> dict[str, dict[int, dict[str, Any]]]:
    """What sections found for the result file: entries of GpuResult, by head size."""
    named: dict[str, dict[int, dict[str, Any]]] = {"rates": {}, "tiles": {}}
    for entry in found:
        for result in entry.results:
            if "figure" in result:
                name, head_dim, value = json.loads(result["figure"])
                named[name][int(head_dim)] = value
    return named


def keep_figures(found: Sequence[Found], out: Path) -> None:
    """Write the file that defaults are read from: among the results, to be committed, and where this machine looks.

    A section that was left out (--only), or failed, keeps what an older file says of it.
    """
    from sfcompile.codegen.toolchain.gpu_results import GpuResult, folders, result_of, write_result

    gpu, named = gpu_name(), figures(found)
    failed = any(task.failure for entry in found for task in entry.tasks)
    failed |= any(result["kind"] == "FAIL" for entry in found for result in entry.results)
    if failed or not any(named.values()):
        print("no result file: something failed, or nothing that decides a default was run")
        return
    before = result_of(gpu) or GpuResult(gpu, "")
    rates, tiles = {**before.rates, **named["rates"]}, {**before.tiles, **named["tiles"]}
    made = GpuResult(gpu, f"{datetime.now(UTC):%Y-%m-%d}", rates, tiles)
    for folder in dict.fromkeys((out, folders()[0])):
        print(f"defaults are read from {write_result(made, folder)}")


def report(found: Sequence[Found], installed: str, took_s: float, dry: bool) -> tuple[str, bool]:
    """The whole report, and whether something failed."""
    lines = header(dry) + ([f"wheels     {installed}"] if installed else [])
    failed = "could not be installed" in installed
    totals = dict.fromkeys(("ok", "FAIL", "skip", "MISS"), 0)
    for entry in found:
        results = list(entry.results)
        for task in {id(task): task for task in entry.tasks}.values():
            if task.failure:
                results.append({"kind": "FAIL", "text": f"process {' '.join(task.parts)} {task.failure}"})
        if not results:
            results.append({"kind": "FAIL", "text": "gave no result"} if entry.section.name != "tiles" else {})
        results = [result for result in results if result]
        counts = {kind: sum(result["kind"] == kind for result in results) for kind in totals}
        totals = {kind: totals[kind] + counts[kind] for kind in totals}
        seconds = "" if dry else f", {max((task.took_s for task in entry.tasks), default=0.0):.0f} s"
        seconds += f" in {len(entry.tasks)} processes" if len(entry.tasks) > 1 else ""
        said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "done"
        lines += ["", f"== {entry.section.name}: {entry.section.what} ({said}{seconds})"]
        lines += [f"     decides {entry.section.decides}"] if entry.section.decides else []
        lines += [f"{result['kind']:<5}{result['text']}" for result in results]
    failed |= totals["FAIL"] > 0
    end = f"{totals['ok']} passed, {totals['FAIL']} failed, {totals['skip']} skipped, {totals['MISS']} goals missed"
    return "\n".join([*lines, "", f"{'FAILED' if failed else 'PASSED'}: {end}; {took_s:.0f} s"]) + "\n", failed


def header(dry: bool) -> list[str]:
    """Where and with what the check ran."""
    where = "none: dry run on the CPU, in Triton's interpreter" if dry else gpu_name()
    lines = [f"gpu-check  {datetime.now(UTC):%Y-%m-%d %H:%M} UTC", f"GPU        {where}"]
    if not dry:
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,power.limit,clocks.max.sm",
            "--format=csv,noheader",
            "-i",
            "0",
        ]
        lines.append(f"driver     {_output(query) or 'nvidia-smi does not answer'}")
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    lines.append(f"versions   Python {sys.version.split()[0]}, {versions}")
    dirty = "-dirty" if _output(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"]) else ""
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    return [*lines, f"commit     {commit + dirty if commit else 'unknown: not a git checkout'}"]


def gpu_name() -> str:
    """Of the first GPU."""
    import torch

    return torch.cuda.get_device_name(0)


def _version(package: str) -> str:
    if WHEELS_AT.is_dir() and str(WHEELS_AT) not in sys.path:
        sys.path.insert(0, str(WHEELS_AT))
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
