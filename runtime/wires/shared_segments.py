"""Segments that the ranks of a machine share: each a file without a name (shared_files.py), mapped by all of them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from sfcompile.errors import HeapError
from sfcompile.runtime.wires.shared_files import Place, failures, in_words, no_room, opened, shared_file
from sfcompile.runtime.wires.symmetric_heap import HeapSize, Segment

_WHY = "every rank keeps two banks of chunk buffers in memory that it shares with the ranks of its machine"
_NO_ROOM = "enlarge /dev/shm (docker: --shm-size), use fewer tokens per call, or transport='c10d'"
_NOT_SHARED = (
    "run the ranks of a machine as one user, in one container or in containers that share their process ids (docker: "
    "--pid), or use transport='c10d'"
)


@contextmanager
def shared_segment(size: HeapSize) -> Iterator[tuple[Segment, Place]]:
    """A new segment of this process, and where peers find it until the body ends. The memory stays as long as anybody
    maps it.

    Raises:
        HeapError: there is no room, or no shared memory.
    """
    with ExitStack() as held:
        try:
            place = held.enter_context(shared_file(size.segment_bytes))
            memory = mmap.mmap(place.fd, size.segment_bytes)
        except (OSError, OverflowError) as error:
            problem = no_room(f"a symmetric heap of {in_words(size.segment_bytes)} per rank", error)
            raise HeapError(problem, _WHY, _NO_ROOM) from error
        yield Segment(memory, size), place


def map_shared(place: Place, size: HeapSize) -> Segment:
    """Map a peer's segment, which its owner holds.

    Raises:
        HeapError: this process cannot reach it.
    """
    try:
        with opened(place, os.O_RDWR) as fd:
            return Segment(mmap.mmap(fd, size.segment_bytes), size)
    except OSError as error:
        raise HeapError(
            f"the memory of process {place.pid} on this machine cannot be mapped ({error})", _WHY, _NOT_SHARED
        ) from error


def share(
    rank: int, neighbours: Sequence[int], size: HeapSize, exchange: Callable[[Any, str], list[Any]]
) -> dict[int, Segment]:
    """Collective: a new segment on every rank; by rank this one's and those of its neighbours.

    Args:
        neighbours: the other ranks of this machine.
        exchange: collective over all ranks of the job: every rank's value, by rank.

    Raises:
        HeapError: some rank cannot make its segment, or cannot map another; on every rank.
    """
    segments: dict[int, Segment] = {}
    place, problem = Place(0, 0, 0, 0), ""
    with ExitStack() as held:
        try:
            segments[rank], place = held.enter_context(shared_segment(size))
        except HeapError as error:
            problem = error.what
        everyone = exchange((problem, tuple(place)), "make the heap")
        _refuse(rank, [text for text, _ in everyone], _NO_ROOM)
        try:
            for peer in neighbours:
                segments[peer] = map_shared(Place(*everyone[peer][1]), size)
        except HeapError as error:
            problem = error.what
        _refuse(rank, exchange(problem, "map the heap"), _NOT_SHARED)  # everyone has mapped everything
    return segments


def _refuse(rank: int, problems: Sequence[str], fix: str) -> None:
    failed = failures(problems)
    if failed:
        error = HeapError(failed, _WHY, fix, rank=rank)
        error.on_every_rank = True
        raise error
