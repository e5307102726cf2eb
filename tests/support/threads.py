"""Ranks for tests: threads of one process that store into each other's memory, with injected delays; or processes."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sfcompile.errors import PeerFailedError, RuntimeTimeoutError
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import Session, close_session, use_session
from sfcompile.runtime.rank.sides import Wires
from sfcompile.runtime.wires.direct import DirectTransport
from sfcompile.runtime.wires.symmetric_heap import HeapSize, Segment, local_segment

T = TypeVar("T")


class _Meeting:
    """What rank threads share: a barrier and a table."""

    def __init__(self, num_ranks: int, timeout_s: float) -> None:
        self.barrier = threading.Barrier(num_ranks)
        self.table: dict[int, Any] = {}
        self.timeout_s = timeout_s

    def exchange(self, rank: int, num_ranks: int, value: Any) -> list[Any]:
        """All-gather of Python values."""
        self.table[rank] = value
        self.barrier.wait(self.timeout_s)
        everyone = [self.table[r] for r in range(num_ranks)]
        self.barrier.wait(self.timeout_s)
        return everyone


class ThreadWorld:
    """Ranks are threads; memory is shared because the process is one."""

    def __init__(
        self, rank: int, topology: Topology, meeting: _Meeting, delay: Callable[[int], None] | None = None
    ) -> None:
        self.rank = rank
        self.topology = topology
        self._meeting = meeting
        self._delay = delay

    def reconfigure(self, transport: str, timeout_s: float) -> bool:
        """Threads have one kind of wire."""
        return False

    def exchange(self, value: Any, doing: str, patience: float = 1.0) -> list[Any]:
        """Through the shared table."""
        return self._meeting.exchange(self.rank, self.topology.num_ranks, value)

    def announce(self, text: str) -> None:
        """Notices lie in the segments, which every rank reaches."""

    def reset(self) -> None:
        """New segments carry no notice."""

    def make_segments(self, size: HeapSize, generation: int) -> Sequence[Segment | None]:
        """Plain memory."""
        return self.exchange(local_segment(size), "make the heap")

    def make_wires(self, segments: Sequence[Segment | None]) -> Wires:
        """Direct stores."""
        stores = DirectTransport(self.rank, segments, self._meeting.timeout_s, None, self._delay)
        return Wires(stores, stores)

    def close(self) -> None:
        """Nothing to release."""


def run_threads(
    num_ranks: int,
    work: Callable[[int], T],
    machine_of: Sequence[int] | None = None,
    delay: Callable[[int], None] | None = None,
    timeout_s: float = 30.0,
) -> list[T]:
    """Run ``work(rank)`` on one thread per rank, each with its own session; the results by rank.

    The first error is raised after all threads have ended; one that only reports another rank's failure comes last.
    """
    topology = Topology(tuple(machine_of) if machine_of is not None else (0,) * num_ranks)
    meeting = _Meeting(num_ranks, timeout_s)
    results: list[Any] = [None] * num_ranks
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        session = Session(ThreadWorld(rank, topology, meeting, delay))
        try:
            with use_session(session), session.guard():
                results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()
        finally:
            session.close()

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors, key=_is_echo)
    return results


def _is_echo(error: BaseException | None) -> bool:
    return isinstance(error, (threading.BrokenBarrierError, PeerFailedError))


# ---------------------------------------------------------------------- ranks as processes


@dataclass(frozen=True)
class Outcome:
    """How one rank process ended.

    Attributes:
        value: what the work returned.
        error: what it raised.
        exit_code: of the process; negative: the signal that ended it; None: it was still running at the time limit.
        seconds: from the start of all ranks to this rank's end.
    """

    rank: int
    value: Any
    error: BaseException | None
    exit_code: int | None
    seconds: float


def run_processes(
    num_ranks: int,
    work: Callable[..., Any],
    args: Sequence[Any] = (),
    machine_of: Sequence[int] | None = None,
    timeout_s: float = 120.0,
) -> list[Any]:
    """Run ``work(rank, *args)`` in one process per rank under torchrun's environment; the results by rank.

    ``work`` must be importable by name, its results picklable. ``machine_of`` becomes GROUP_RANK.

    Raises:
        BaseException: the first error of any rank, with its rank in a note (as in :func:`run_threads`).
        RuntimeTimeoutError: a rank neither returned nor raised.
    """
    outcomes = run_outcomes(num_ranks, work, args, machine_of, timeout_s)
    failed = sorted((o for o in outcomes if o.error is not None), key=lambda o: (_is_echo(o.error), o.seconds))
    for outcome in failed:
        assert outcome.error is not None
        outcome.error.add_note(f"on rank {outcome.rank} of {num_ranks}")
        raise outcome.error
    for outcome in outcomes:
        if outcome.exit_code != 0:
            raise RuntimeTimeoutError(
                f"rank {outcome.rank} of {num_ranks} ended with exit code {outcome.exit_code} (None: still running)",
                f"a rank has {timeout_s:g} s to return or raise",
                rank=outcome.rank,
            )
    return [outcome.value for outcome in outcomes]


def run_outcomes(
    num_ranks: int,
    work: Callable[..., Any],
    args: Sequence[Any] = (),
    machine_of: Sequence[int] | None = None,
    timeout_s: float = 120.0,
) -> list[Outcome]:
    """As :func:`run_processes`, for tests of failures: how each rank ended. No process is left behind."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "sfcompile.runtime.rank.ops", "sfcompile.runtime.rank.process_group"])
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    homes = tuple(machine_of) if machine_of is not None else (0,) * num_ranks
    start = time.monotonic()
    running: dict[Any, tuple[int, Any]] = {}  # our end of its pipe -> (rank, process)
    outcomes: dict[int, Outcome] = {}
    try:
        for rank in range(num_ranks):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, args=(rank, homes, port, send, work, tuple(args)), daemon=True)
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
                outcomes[rank] = Outcome(rank, value, error, process.exitcode, time.monotonic() - start)
    finally:
        for rank, process in running.values():
            process.kill()
            process.join()
            outcomes[rank] = Outcome(rank, None, None, None, time.monotonic() - start)
    return [outcomes[rank] for rank in range(num_ranks)]


def _rank_main(
    rank: int, homes: tuple[int, ...], port: int, send: Any, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    peers = [other for other, home in enumerate(homes) if home == homes[rank]]
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(homes)),
        "LOCAL_RANK": str(peers.index(rank)),
        "LOCAL_WORLD_SIZE": str(len(peers)),
        "GROUP_RANK": str(homes[rank]),
        "GROUP_WORLD_SIZE": str(len(set(homes))),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    value: Any = None
    failure: BaseException | None = None
    try:
        value = work(rank, *args)
    except BaseException as error:
        failure = error
    send.send((value, failure))
    close_session()  # a forked process runs no exit handlers
    send.close()
