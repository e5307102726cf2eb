"""Ranks for tests: processes under torchrun's environment, forked from one that has imported everything.

A rank that starts as a program imports for seconds before it does anything. Here one server imports once for the whole
test run and is forked once per rank and case: every case has ranks of its own, which it may kill or leave in any state.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from threads import is_echo

from sfcompile.errors import RuntimeTimeoutError
from sfcompile.runtime.rank.session import close_session

TAIL_LINES = 30
# What the server imports before it is forked, and so what ranks need not.
_preloaded = ["processes", "sfcompile.runtime.rank.ops", "sfcompile.runtime.rank.process_group"]
IMPORTED_BY = os.getpid()
_starting = threading.Lock()


def preload(*modules: str) -> None:
    """Have the server import more: called by a test file while tests are collected, before the first rank starts."""
    _preloaded.extend(name for name in modules if name not in _preloaded)


@dataclass(frozen=True)
class Outcome:
    """How one rank process ended.

    Attributes:
        value: what the work returned.
        error: what it raised.
        exit_code: of the process; negative: the signal that ended it; None: it was still running at the time limit.
        seconds: from the start of all ranks to this rank's end.
        log: what it wrote to stdout and stderr, the traceback of `error` included.
    """

    rank: int
    value: Any
    error: BaseException | None
    exit_code: int | None
    seconds: float
    log: str


class RankError(Exception):
    """Stands for an error that cannot be pickled; its text is the error's."""


def run_processes(
    num_ranks: int,
    work: Callable[..., Any],
    args: Sequence[Any] = (),
    machine_of: Sequence[int] | None = None,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run ``work(rank, *args)`` in one process per rank under torchrun's environment; the results by rank.

    ``work`` must be importable by name, its results picklable. ``machine_of`` becomes GROUP_RANK.

    Raises:
        BaseException: the first error of any rank, with its rank and the end of its log in notes.
        RuntimeTimeoutError: a rank neither returned nor raised.
    """
    outcomes = run_outcomes(num_ranks, work, args, machine_of, timeout_s, env)
    failed = sorted((o for o in outcomes if o.error is not None), key=lambda o: (is_echo(o.error), o.seconds))
    for outcome in failed:
        assert outcome.error is not None
        outcome.error.add_note(f"on rank {outcome.rank} of {num_ranks}")
        outcome.error.add_note(_tail(outcome))
        raise outcome.error
    for outcome in outcomes:
        if outcome.exit_code != 0:
            raise RuntimeTimeoutError(
                f"rank {outcome.rank} of {num_ranks} ended with exit code {outcome.exit_code} (None: still running)",
                f"a rank has {timeout_s:g} s to return or raise\n{_tail(outcome)}",
                rank=outcome.rank,
            )
    return [outcome.value for outcome in outcomes]


def run_outcomes(
    num_ranks: int,
    work: Callable[..., Any],
    args: Sequence[Any] = (),
    machine_of: Sequence[int] | None = None,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """As :func:`run_processes`, for tests of failures: how each rank ended. No process is left behind."""
    context = fork_server()
    homes = tuple(machine_of) if machine_of is not None else (0,) * num_ranks
    common = {"MASTER_PORT": str(free_port())} | dict(env or {})
    start = time.monotonic()
    running: dict[Any, tuple[int, Any]] = {}  # our end of its pipe -> (rank, process)
    ended: dict[int, tuple[Any, BaseException | None, int | None, float]] = {}
    with tempfile.TemporaryDirectory(prefix="rank-logs-") as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(num_ranks)]
        try:
            for rank, log in enumerate(logs):
                receive, send = context.Pipe(duplex=False)
                told = (rank, rank_env(rank, homes) | common, str(log), send, work, tuple(args))
                process = context.Process(target=_rank_main, args=told, daemon=True)
                process.start()
                send.close()  # ours; the child's copy closes with it, which ends our receive
                running[receive] = (rank, process)
            while running and time.monotonic() - start < timeout_s:
                ready: Any
                for ready in multiprocessing.connection.wait(list(running), timeout=0.2):
                    rank, process = running.pop(ready)
                    try:
                        value, error = ready.recv()
                    except EOFError:
                        value, error = None, None
                    process.join(max(1.0, timeout_s - (time.monotonic() - start)))
                    ended[rank] = (value, error, process.exitcode, time.monotonic() - start)
        finally:
            for rank, process in running.values():
                process.kill()
                process.join()
                ended[rank] = (None, None, None, time.monotonic() - start)
        texts = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
        return [Outcome(rank, *ended[rank], log=texts[rank]) for rank in range(num_ranks)]


def fork_server() -> Any:
    """What starts processes by forking the server, which is started at the first call."""
    group = os.environ.get("SFCOMPILE_TEST_GROUP", "ranks")
    assert group == "ranks" or "PYTEST_XDIST_WORKER" not in os.environ, (
        "Ranks use every core and have time limits: mark this test with pytest.mark.ranks, so that it runs among those"
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_preloaded)
    with _starting:  # several jobs may ask at once
        path = os.environ.get("PYTHONPATH")
        # The server does not get ours, and passes over what it cannot import.
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            os.environ.pop("PYTHONPATH")
            os.environ |= {} if path is None else {"PYTHONPATH": path}
    return context


def free_port() -> int:
    """Of a TCP socket on this machine, a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def rank_env(rank: int, homes: tuple[int, ...]) -> dict[str, str]:
    """What torchrun would have set; ``homes``: the machine of every rank."""
    peers = [other for other, home in enumerate(homes) if home == homes[rank]]
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(homes)),
        "LOCAL_RANK": str(peers.index(rank)),
        "LOCAL_WORLD_SIZE": str(len(peers)),
        "GROUP_RANK": str(homes[rank]),
        "GROUP_WORLD_SIZE": str(len(set(homes))),
        "MASTER_ADDR": "127.0.0.1",
    }


def _rank_main(
    rank: int, env: dict[str, str], log: str, send: Any, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= env
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    value: Any = None
    failure: BaseException | None = None
    try:
        value = work(rank, *args)
    except BaseException as error:
        traceback.print_exc()
        failure = error
    sys.stdout.flush()
    sys.stderr.flush()
    send.send((value, _portable(failure)))
    close_session()  # a forked process runs no exit handlers
    send.close()


def _portable(error: BaseException | None) -> BaseException | None:
    """The error, or where pickle does not give it back, one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RankError(f"{type(error).__name__}: {error}")
    return error


def _tail(outcome: Outcome) -> str:
    lines = outcome.log.splitlines()[-TAIL_LINES:]
    return "\n".join([f"the end of rank {outcome.rank}'s log:", *(f"  {line}" for line in lines)])
