"""Ranks for tests: threads of one process that store into each other's memory, with injected delays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sfcompile.runtime.process_group import compare
from sfcompile.runtime.session import Session, use_session
from sfcompile.runtime.symmetric_heap import HeapSize, Segment, local_segment
from sfcompile.runtime.topology import Topology
from sfcompile.runtime.transport import Transport
from sfcompile.runtime.transport_direct import DirectTransport

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

    def agree(self, digest: str, description: dict[str, str]) -> None:
        """Compare through the shared table."""
        compare(self.rank, self._meeting.exchange(self.rank, self.topology.num_ranks, (digest, description)))

    def make_segments(self, size: HeapSize, generation: int) -> Sequence[Segment | None]:
        """Plain memory."""
        return self._meeting.exchange(self.rank, self.topology.num_ranks, local_segment(size))

    def make_transport(self, segments: Sequence[Segment | None]) -> Transport:
        """Direct stores."""
        return DirectTransport(self.rank, segments, self._meeting.timeout_s, None, self._delay)

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

    The first error of any rank is raised after all threads have ended.
    """
    topology = Topology(tuple(machine_of) if machine_of is not None else (0,) * num_ranks)
    meeting = _Meeting(num_ranks, timeout_s)
    results: list[Any] = [None] * num_ranks
    errors: list[tuple[float, BaseException]] = []

    def body(rank: int) -> None:
        session = Session(ThreadWorld(rank, topology, meeting, delay))
        try:
            with use_session(session), session.guard():
                results[rank] = work(rank)
        except BaseException as error:
            errors.append((isinstance(error, threading.BrokenBarrierError), error))
            meeting.barrier.abort()
        finally:
            session.close()

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors, key=lambda pair: pair[0])[1]
    return results
