"""The tests in two runs of pytest: those that start no ranks, on every core; then those that do, two jobs at a time.

    python tests/support/run_tests.py [--all] [ARGUMENT OF PYTEST...]

Ranks use all cores and have time limits, so nothing else runs beside them. Without ``--all``, what is marked
``thorough`` is left out: cells of a matrix whose other rows and columns say the same. Ends with what both runs counted
together.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

WORKERS = 8  # at most: each imports everything, about 0.6 GB
LANES = 2  # jobs of ranks at a time, at most: much of their time is waiting
NOTHING_RAN = 5  # pytest's exit code when every test was deselected
INTERRUPTED = 2
COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed)\b")
COLOR = re.compile(r"\x1b\[[\d;]*m")
CLOSING = re.compile(r"^(=+ )?\d+ \w+.* in [\d.]+s")  # with -q it stands without its frame
PARALLEL, RANKS = "not ranks", "ranks"


def main(arguments: Sequence[str]) -> int:
    """Both runs; the exit code of the first that failed."""
    everything = "--all" in arguments
    rest = [argument for argument in arguments if argument != "--all"]
    began = time.monotonic()
    counts: Counter[str] = Counter()
    codes = []
    for group in (PARALLEL, RANKS):
        code, counted = run(group, everything, rest)
        codes.append(code)
        counts.update(counted)
        if code == INTERRUPTED:
            break
    failed = [code for code in codes if code not in (0, NOTHING_RAN)]
    print("\n".join(closing(counts, time.monotonic() - began)), flush=True)
    return failed[0] if failed else min(codes)


def run(group: str, everything: bool, arguments: Sequence[str]) -> tuple[int, Counter[str]]:
    """One run of pytest, shown as it goes: its exit code and what it counted."""
    marks = group if everything else f"{group} and not thorough"
    command = [sys.executable, "-m", "pytest", "-m", marks, *arguments]
    env = dict(os.environ) | {"SFCOMPILE_TESTS": "all" if everything else "quick", "SFCOMPILE_TEST_GROUP": group}
    if not any(Path(argument.split("::")[0]).exists() for argument in arguments):
        env["SFCOMPILE_TEST_FILES"] = group  # for conftest.py: no file was asked for, so some need not be imported
    # Every worker and every rank of a test imports the same files: compiled once, not some thousand times.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, WORKERS if group == PARALLEL else LANES)
    if workers > 1:
        command += ["-n", str(workers), "--dist", "worksteal"]
    if group == PARALLEL:
        env["OMP_NUM_THREADS"] = "1"
    if sys.stdout.isatty():
        command.append("--color=yes")
    print(f"-- pytest {' '.join(command[3:])}", flush=True)
    counted: Counter[str] = Counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace", env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            counted = counts_of(line) or counted
    if process.returncode not in (0, 1, INTERRUPTED, NOTHING_RAN):
        print(f"-- pytest ended with exit code {process.returncode}: tests that it had not run count as one failure")
        counted["failed"] += 1
    return process.returncode, counted


def counts_of(line: str) -> Counter[str]:
    """What pytest's closing line counts, errors as failures; nothing on any other line."""
    counted: Counter[str] = Counter()
    line = COLOR.sub("", line)
    for number, word in COUNT.findall(line) if CLOSING.match(line) else ():
        counted["failed" if word.startswith("error") else word] += int(number)
    return counted


def closing(counts: Counter[str], seconds: float) -> list[str]:
    """In plain words, and as pytest closes a run."""
    shown = [f"{counts[word]} {word}" for word in ("failed", "passed", "skipped", "xfailed", "xpassed") if counts[word]]
    whole = f"{seconds:.2f}s ({int(seconds) // 60} min {int(seconds) % 60} s)"
    return [
        f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped",
        f" {', '.join(shown) or 'no tests ran'} in {whole} ".center(100, "="),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
