"""Starts the ranks of one program on this machine, as torchrun would but without its agent.

The ranks get torchrun's environment, so a program cannot tell the difference. With `machines` above 1 they are told
that they sit on so many machines: a rehearsal of a cluster on one box.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sfcompile.errors import LaunchError

POLL_S = 0.05
KILL_AFTER_S = 5.0
GRACE_S = 5.0
TAIL_LINES = 30
EXIT_TIMEOUT = 124
MOST_RANKS = 1024


def launch(
    argv: Sequence[str],
    ranks: int,
    machines: int = 1,
    env: Mapping[str, str] | None = None,
    log_dir: Path | None = None,
    timeout_s: float | None = None,
) -> int:
    """Run `python argv...` once per rank and wait for all of them.

    Rank 0 writes straight to our stdout and stderr, and reads our stdin if that is a terminal. Every other rank writes
    to `rank<r>.log` in `log_dir`; without one, logs go to a temporary directory that is removed when all ranks succeed.
    The first rank that fails takes the others down, and the end of its log is shown.

    Args:
        argv: what follows `python`: a script, or "-m" and a module, with its arguments.
        ranks: number of processes.
        machines: how many machines the ranks believe they sit on; must divide `ranks`.
        env: variables on top of ours; OMP_NUM_THREADS defaults to an equal share of the cores.
        timeout_s: longest run in seconds, None for no limit.

    Returns:
        0, or the exit code of the rank that failed first (128 + signal number if a signal ended it), or 124 after
        `timeout_s`.

    Raises:
        LaunchError: the numbers do not fit, or a process cannot be started.
    """
    check_places(ranks, machines)
    logs = Path(tempfile.mkdtemp(prefix="sfcompile-")) if log_dir is None else log_dir
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"The folder {logs} for the logs of ranks cannot be made: {error.strerror}",
            "No rank was started",
            "Name another one, or none",
        ) from error
    port = _free_port()
    keep = log_dir is not None
    try:
        with _ended_by_signals() as processes:
            for rank in range(ranks):
                rank_env = _rank_env(rank, ranks, machines, port) | dict(env or {})
                processes.append(_start(argv, rank, rank_env, _log_of(logs, rank)))
            code, rank = _wait(processes, timeout_s)
            if code and code != EXIT_TIMEOUT:
                _let_fail(processes)
        if code and rank:
            _show_tail(rank, code, _log_of(logs, rank))
        elif code:
            print(f"sfcompile: rank 0 ended with exit code {code}", file=sys.stderr)
        if code and ranks > 1:
            print(f"sfcompile: the logs of all ranks but 0 are in {logs}", file=sys.stderr)
            keep = True
        return code
    finally:
        if not keep:
            shutil.rmtree(logs, ignore_errors=True)


def check_places(ranks: int, machines: int) -> None:
    """That every machine gets as many ranks.

    Raises:
        LaunchError: it does not, or there are too many for any machine.
    """
    if ranks < 1 or machines < 1 or ranks % machines:
        raise LaunchError(
            f"Cannot place {ranks} ranks on {machines} machines",
            "Each machine gets the same number of ranks, at least 1",
            "Use a number of ranks that is a multiple of the number of machines",
        )
    if ranks > MOST_RANKS:
        raise LaunchError(
            f"{ranks} ranks are to be started on this machine, which has {num_cores()} cores",
            f"each is a process of its own; more than {MOST_RANKS} are taken for a slip",
            "Name fewer; plans for more are predicted by sfcompile simulate",
        )


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _rank_env(rank: int, ranks: int, machines: int, port: int) -> dict[str, str]:
    local = ranks // machines
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    inherited.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // ranks)))
    return inherited | {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank % local),
        "LOCAL_WORLD_SIZE": str(local),
        "GROUP_RANK": str(rank // local),
        "GROUP_WORLD_SIZE": str(machines),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }


def _start(argv: Sequence[str], rank: int, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, *argv]
    # A session of its own: its helpers (compile workers) end with it, and Ctrl-C reaches only us.
    try:
        if rank == 0:
            sys.stdout.flush()
            # A terminal is handed on: breakpoint() in rank 0's program can be answered.
            stdin = None if sys.stdin is not None and sys.stdin.isatty() else subprocess.DEVNULL
            return subprocess.Popen(command, env=env, stdin=stdin, start_new_session=True)
        with log.open("wb") as out:
            return subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
    except OSError as error:
        raise LaunchError(f"Cannot start rank {rank}: {error}", fix=f"Check that {command[0]} runs") from error


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float | None) -> tuple[int, int]:
    """(exit code, rank) of the first failure, or (0, 0) when all ranks succeeded."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return (code if code > 0 else 128 - code), rank
        if None not in codes:
            return 0, 0
        if deadline is not None and time.monotonic() > deadline:
            print(f"sfcompile: still running after {timeout_s:g} s, ending all ranks", file=sys.stderr)
            return EXIT_TIMEOUT, codes.index(None)
        time.sleep(POLL_S)


def _let_fail(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """One rank has failed; the others are being told and get a moment to say so in their own logs."""
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(POLL_S)


@contextmanager
def _ended_by_signals() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A list of processes, all of which are gone at the end of the block, also when a signal ends us."""
    processes: list[subprocess.Popen[bytes]] = []

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield processes
    finally:
        try:
            _end(processes)
        finally:  # a second Ctrl-C waits no longer
            for process in processes:
                if process.poll() is None:
                    _signal_group(process, signal.SIGKILL)
                    process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + KILL_AFTER_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass  # it ended by itself in the meantime


def _log_of(logs: Path, rank: int) -> Path:
    return logs / f"rank{rank}.log"


def _show_tail(rank: int, code: int, log: Path) -> None:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    print(f"sfcompile: rank {rank} ended with exit code {code}; the end of its log:", file=sys.stderr)
    for line in lines[-TAIL_LINES:]:
        print(f"  [rank {rank}] {line}", file=sys.stderr)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
