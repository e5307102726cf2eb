"""Routing by rank, and failure notices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfcompile.errors import PeerFailedError, RankMismatchError, RuntimeTimeoutError
from sfcompile.runtime.program.instructions import Arrival, Chunk
from sfcompile.runtime.wires.transport import (
    GroupTransport,
    RoutedTransport,
    Source,
    notice_of,
    out_of_step,
    peer_failed,
    with_calls,
)


class Recorder:
    """A transport that writes down what it is asked."""

    def __init__(self, name: str, calls: list[tuple[object, ...]]) -> None:
        self.name = name
        self.calls = calls

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        self.calls.append((self.name, "open", [arrival.src for arrival, _ in arrivals], tag))

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        self.calls.append((self.name, "put", dst))

    def wait(self, src: int, slot: int, epoch: int) -> None:
        self.calls.append((self.name, "wait", src))

    def finish(self, epoch: int) -> None:
        self.calls.append((self.name, "finish", epoch))

    def notice(self) -> str | None:
        return None

    def abort(self, text: str) -> None:
        self.calls.append((self.name, "abort", text))

    def close(self) -> None:
        self.calls.append((self.name, "close"))


def test_each_rank_has_its_way() -> None:
    calls: list[tuple[object, ...]] = []
    routed = RoutedTransport(Recorder("direct", calls), Recorder("messages", calls), [True, True, False])
    chunk = torch.zeros(1)
    routed.open(1, [(Arrival(0, 1, "x", Chunk(1)), chunk), (Arrival(1, 2, "x", Chunk(2)), chunk)], tag=5)
    routed.put(1, 0, 0, chunk, 1)
    routed.put(2, 0, 0, chunk, 1)
    routed.wait(2, 1, 1)
    routed.wait(1, 0, 1)
    # Messages first: a slot that is still being sent on must not be declared free to direct writers.
    routed.finish(1)
    assert calls == [
        ("messages", "open", [2], 5),
        ("direct", "open", [1], 5),
        ("direct", "put", 1),
        ("messages", "put", 2),
        ("messages", "wait", 2),
        ("direct", "wait", 1),
        ("messages", "finish", 1),
        ("direct", "finish", 1),
    ]


def test_one_way_is_enough() -> None:
    calls: list[tuple[object, ...]] = []
    routed = RoutedTransport(None, Recorder("messages", calls), [False, False])
    routed.put(1, 0, 0, torch.zeros(1), 1)
    routed.abort("rank 0: x")
    routed.close()
    assert calls == [("messages", "put", 1), ("messages", "abort", "rank 0: x"), ("messages", "close")]


def test_a_notice_names_the_first_rank_however_far_it_travels() -> None:
    first = notice_of(2, ValueError("no such file\nsecond line"))
    assert first == "rank 2: ValueError: no such file"
    second = peer_failed(0, first, peer=2)
    assert isinstance(second, PeerFailedError) and "another rank failed first: rank 2: ValueError" in str(second)
    assert notice_of(0, second) == first
    assert notice_of(1, RuntimeTimeoutError("waited 3 s for rank 0", "why", "fix")) == "rank 1: waited 3 s for rank 0"


def test_a_group_numbers_its_own_ranks() -> None:
    calls: list[tuple[object, ...]] = []
    group = GroupTransport(Recorder("all", calls), (4, 2, 7))
    chunk = torch.zeros(1)
    group.open(3, [(Arrival(0, 1, "x", Chunk(1)), chunk), (Arrival(1, 2, "x", Chunk(2)), chunk)], tag=5)
    group.put(0, 0, 0, chunk, 3)
    group.wait(2, 1, 3)
    group.finish(3)
    group.abort("why")
    group.close()
    assert calls == [
        ("all", "open", [2, 7], 5),
        ("all", "put", 4),
        ("all", "wait", 7),
        ("all", "finish", 3),
        ("all", "abort", "why"),
        ("all", "close"),
    ]


def test_calls_are_named_in_errors_of_ranks_out_of_step_only() -> None:
    error = out_of_step("rank 1 sent a chunk of another call", 0, 1, 4, 7)
    named = with_calls(error, {1: "call 2 of b", 0: "call 3 of a"})
    assert named is not None and "another call (rank 0 is in call 3 of a; rank 1 is in call 2 of b)" in str(named)
    assert (named.rank, named.peer, named.slot, named.epoch) == (0, 1, 4, 7)
    assert with_calls(PeerFailedError("x"), {}) is None and with_calls(RankMismatchError("other graphs"), {}) is None
