"""The table of faults, run: ``python tests/support/run_torture.py [--only TEXT...] [--kills N] [--seed N]``.

Every fault is a job of real ranks (tests/support/torture/). Root gives each a /dev/shm that nobody else uses, and runs
the faults of networks and disks too. Ends with 1 if a fault does not pass.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

# What multiprocessing and the store of torch say about processes that we kill.
os.environ |= {"PYTHONWARNINGS": "ignore::UserWarning", "TORCH_CPP_LOG_LEVEL": "FATAL"}
os.environ["SFCOMPILE_PLANS"] = "off"  # faults in captures and passes need some to be in
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2] / "benchmarks")]

from torture.job import JobRecord, run_fault  # noqa: E402
from torture.judge import Verdict, judge  # noqa: E402
from torture.kill_points import kill_points, life  # noqa: E402
from torture.table import Fault, all_faults  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 5


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="faults whose name or kind contains one of these texts")
    parser.add_argument("--kills", type=int, default=100, help="random kill points after the table")
    parser.add_argument("--seed", type=int, default=None, help="of the kill points; printed")
    parser.add_argument("--out", type=Path, default=None, help="where the result is written")
    parser.add_argument("--list", action="store_true", help="print the table's names")
    parser.add_argument("--logs", action="store_true", help="print the ranks' logs of what fails")
    parser.add_argument("--repeat", type=int, default=1, help="each fault so many times")
    parser.add_argument("--lanes", type=int, default=3, help="so many faults at once")
    args = parser.parse_args(arguments)
    faults = [fault for fault in all_faults() if chosen(fault, args.only)]
    if args.list:
        print("\n".join(f"{f.kind:12} {f.name:50} {f.expected}" for f in faults))
        return 0
    args.seed = random.randrange(10**6) if args.seed is None else args.seed
    began, commit = time.monotonic(), head_commit()
    root = os.geteuid() == 0
    wanted = [fault for fault in faults if root or not fault.needs_root]
    verdicts = run_all(wanted * args.repeat, args)
    kills = run_kills(args, root, not faults) if args.kills else []
    text = result(verdicts, kills, skipped(faults, root), heading(commit, args.seed, time.monotonic() - began))
    print(text)
    out = args.out or (ROOT / f"benchmarks/results/{date.today()}-torture.txt" if not args.only else None)
    if out is not None:
        out.write_text(text)
        print(f"written to {out}")
    return int(not verdicts and not kills) or int(any(not verdict.passes for verdict in (*verdicts, *kills)))


def run_kills(args: argparse.Namespace, root: bool, only: bool) -> list[Verdict]:
    """Some whole lives, to see how long they last, and the random kill points.

    Args:
        only: ``--only`` names kill points.
    """
    rng = random.Random(args.seed)
    jobs = {False: [life(number, False, rng) for number in range(args.lanes)], True: [life(args.lanes, True, rng)]}
    lives = {programs: run_all(some, args) for programs, some in jobs.items()}
    lives_s = {programs: max(verdict.whole_s for verdict in verdicts) for programs, verdicts in lives.items()}
    print(f"seed {args.seed}: a forked job lives {lives_s[False]:.1f} s, one of programs {lives_s[True]:.1f} s")
    points = [fault for fault in kill_points(args.kills, args.seed, lives_s) if root or not fault.needs_root]
    points = [fault for fault in points if not only or chosen(fault, args.only)]
    return [*lives[False], *lives[True], *run_all(points, args)]


def chosen(fault: Fault, texts: Sequence[str]) -> bool:
    """Whether ``--only`` asks for it."""
    return not texts or any(text in fault.name or text == fault.kind for text in texts)


def skipped(faults: Sequence[Fault], root: bool) -> list[str]:
    """The faults that only root can run."""
    return [] if root else [fault.name for fault in faults if fault.needs_root]


def run_all(faults: Sequence[Fault], args: argparse.Namespace) -> list[Verdict]:
    """Run faults, several at once, for most of the time is waiting, and say how each went."""
    count = itertools.count(1)
    talking = threading.Lock()

    def run(fault: Fault) -> Verdict:
        job = run_fault(fault)
        verdict = judge(job)
        with talking:
            word = "passes" if verdict.passes else "FAILS "
            print(f"[{next(count):3}/{len(faults)}] {word} {verdict.whole_s:5.1f} s {verdict.kind} {fault.name}")
            print("".join(problem_lines(verdict)), end="", flush=True)
            if args.logs and not verdict.passes:
                show_logs(job)
        return verdict

    with ThreadPoolExecutor(args.lanes) as pool:
        return list(pool.map(run, faults))


def show_logs(job: JobRecord) -> None:
    """The end of every rank's log, and what it wrote down."""
    for record in job.ranks:
        print(f"------ rank {record.number}, exit code {record.exit_code}")
        for line in record.lines:
            said = {key: value for key, value in line.items() if key not in ("at", "must")}
            print(f"   {line['at'] - job.began_at:7.2f} {said}")
        print("\n".join(f"   | {line}" for line in record.log.splitlines()[-60:]))
    if job.outside_error:
        print(job.outside_error)


def head_commit() -> str:
    """The commit that is checked out, with ``-dirty`` where files differ from it; asked before the faults run."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def heading(commit: str, seed: int, seconds: float) -> str:
    """What was run, when and for how long."""
    return (
        f"Faults thrown at running jobs, {date.today()}, commit {commit}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, seed {seed}, {seconds / 60:.1f} min"
    )


def result(verdicts: Sequence[Verdict], kills: Sequence[Verdict], left_out: Sequence[str], head: str) -> str:
    """The dated result: the table, the kill points, and what they add up to."""
    lines = [
        head,
        "seconds: from the fault (or the last rank's arrival) to the last rank's error; whole: of the job",
        "",
    ]
    lines += [row("fault", "expected", "seen", "seconds", "whole", "leftovers", "verdict")]
    for verdict in verdicts:
        lines.append(of_verdict(verdict))
    passed = sum(verdict.passes for verdict in verdicts)
    lines += ["", f"{passed} of {len(verdicts)} faults pass, {counted(verdicts)}"]
    if left_out:
        lines.append(f"not run, for want of root: {', '.join(left_out)}")
    if kills:
        passed = sum(verdict.passes for verdict in kills)
        lines += [
            "",
            f"Random kill points, from process start to exit: {passed} of {len(kills)} pass, {counted(kills)}",
        ]
        lines += [of_verdict(verdict) for verdict in kills]
    return "\n".join(lines) + "\n"


def counted(verdicts: Sequence[Verdict]) -> str:
    """How many of each bad thing."""
    words = ("SILENT WRONG", "HANG", "LATE", "RAW ERROR", "NO ERROR", "NOT EXACT", "LEFTOVERS", "CRASH", "BROKEN")
    said = []
    for word in words:
        bad = sum(any(problem.startswith(word) for problem in verdict.problems) for verdict in verdicts)
        said.append(f"{bad} {word.lower()}")
    return ", ".join(said)


def of_verdict(verdict: Verdict) -> str:
    """A row, and under it what is wrong."""
    word = "passes" if verdict.passes else "FAILS"
    left = ", ".join(verdict.left[:3]) or "none"
    seconds = f"{verdict.seconds:.1f}"
    first = row(verdict.name, verdict.expected, verdict.seen, seconds, f"{verdict.whole_s:.1f}", left, word)
    return "\n".join([first, *(line.rstrip() for line in problem_lines(verdict))])


def problem_lines(verdict: Verdict) -> list[str]:
    """What is wrong, a line each, the first few."""
    more = len(verdict.problems) - SHOWN
    lines = [f"      {problem}\n" for problem in verdict.problems[:SHOWN]]
    return lines + ([f"      and {more} more\n"] if more > 0 else [])


def row(*cells: str) -> str:
    """One line of the table."""
    return " | ".join(cells)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
