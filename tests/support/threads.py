"""Ranks for tests: threads of one process that store into each other's memory, with injected delays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from sfcompile.errors import PeerFailedError
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import Session, use_session
from sfcompile.runtime.rank.sides import Wires
from sfcompile.runtime.wires.direct import DirectTransport
from sfcompile.runtime.wires.symmetric_heap import HeapSize, Segment, local_segment
from sfcompile.runtime.wires.transport import Source

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


class DelayedStores(DirectTransport):
    """Direct stores whose rank may be slow: ``delay(rank)`` is called before every put and every wait."""

    def __init__(
        self, rank: int, segments: Sequence[Segment | None], timeout_s: float, delay: Callable[[int], None] | None
    ) -> None:
        super().__init__(rank, segments, timeout_s)
        self._delay = delay or (lambda rank: None)

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        self._delay(self._rank)
        super().put(dst, slot, offset, chunk, epoch, source)

    def wait(self, src: int, slot: int, epoch: int) -> None:
        self._delay(self._rank)
        super().wait(src, slot, epoch)


class ThreadWorld:
    """Ranks are threads; memory is shared because the process is one."""

    def __init__(
        self, rank: int, topology: Topology, meeting: _Meeting, delay: Callable[[int], None] | None = None
    ) -> None:
        self.rank = self.global_rank = rank
        self.topology = topology
        self._meeting = meeting
        self._delay = delay

    def reconfigure(self, transport: str, timeout_s: float) -> bool:
        """Threads have one kind of wire."""
        return False

    def exchange(self, value: Any, doing: str, patience: float = 1.0, afresh: bool = False) -> list[Any]:
        """Through the shared table."""
        return self._meeting.exchange(self.rank, self.topology.num_ranks, value)

    def announce(self, text: str) -> None:
        """Notices lie in the segments, which every rank reaches."""

    def trouble(self) -> str | None:
        """Threads do not die alone."""
        return None

    def tell_call(self, text: str, peer: int | None, limit_s: float) -> dict[int, str]:
        """Nobody reads it."""
        return {}

    life = 0
    group = ""

    def reset(self, life: int) -> None:
        """New segments carry no notice."""

    def make_segments(self, size: HeapSize) -> Sequence[Segment | None]:
        """Plain memory."""
        return self.exchange(local_segment(size), "make the heap")

    def make_wires(self, segments: Sequence[Segment | None]) -> Wires:
        """Direct stores."""
        stores = DelayedStores(self.rank, segments, self._meeting.timeout_s, self._delay)
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
        raise min(errors, key=is_echo)
    return results


def is_echo(error: BaseException | None) -> bool:
    """Whether an error only tells of another rank's failure."""
    return isinstance(error, (threading.BrokenBarrierError, PeerFailedError))
