"""Ordered messages over TCP: order across peers, credit, failures; and whole attentions between processes."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
import rank_workers
import tcp_ranks
import torch
from processes import run_outcomes, run_processes

from sfcompile.errors import PeerDiedError, PeerFailedError, RankMismatchError, RuntimeTimeoutError
from sfcompile.runtime.program.instructions import Arrival, Chunk
from sfcompile.runtime.wires.tcp import TcpTransport
from sfcompile.runtime.wires.transport import Source

pytestmark = pytest.mark.ranks


@contextlib.contextmanager
def ranks(count: int, timeout_s: float = 10.0) -> Iterator[list[TcpTransport]]:
    transports = tcp_ranks.transports(count, timeout_s)
    try:
        yield transports
    finally:
        for transport in transports:
            transport.disconnect()


def arrival(slot: int, src: int) -> Arrival:
    return Arrival(slot, src, "x", Chunk(src))


def test_chunks_arrive_whole_and_the_callers_memory_is_free_at_once() -> None:
    with ranks(2) as (a, b):
        for epoch in range(1, 30):
            size = random.Random(epoch).choice([1, 1000, 300_000])
            views = [torch.zeros(size), torch.zeros(7, dtype=torch.bfloat16)]
            b.open(epoch, [(arrival(0, 0), views[0]), (arrival(1, 0), views[1]), (arrival(2, 0), torch.empty(0))])
            large, small = torch.randn(size), torch.randn(7).bfloat16()
            want = large.clone()
            a.put(1, 0, 0, large, epoch)
            large.zero_()
            a.put(1, 1, 0, small, epoch)
            a.put(1, 2, 0, torch.empty(0), epoch)
            for slot in (1, 0, 2):
                b.wait(0, slot, epoch)
            assert torch.equal(views[0], want) and torch.equal(views[1], small)


@pytest.mark.parametrize("opened_first", [True, False])
def test_a_chunk_of_another_call_is_an_error(opened_first: bool) -> None:
    with ranks(2) as (a, b):
        place = torch.zeros(3)
        a.open(1, [], tag=4)
        if opened_first:
            b.open(1, [(arrival(0, 0), place)], tag=6)
        a.put(1, 0, 0, torch.ones(3), 1)
        if not opened_first:
            time.sleep(0.05)
            b.open(1, [(arrival(0, 0), place)], tag=6)
        with pytest.raises(RankMismatchError, match="rank 0 sent a chunk of another call than rank 1 is in"):
            b.wait(0, 0, 1)
        assert not place.any()


def test_a_chunk_of_an_epoch_that_is_over_is_an_error() -> None:
    with ranks(2) as (a, b):
        b.open(1, [])
        b.open(2, [(arrival(1, 0), torch.zeros(3))])
        a.open(1, [])
        a.put(1, 0, 0, torch.ones(3), 1)
        with pytest.raises(RankMismatchError):
            b.wait(0, 1, 2)


def test_a_chunk_waits_in_the_connection_until_its_epoch_is_open() -> None:
    """The credit: without it the chunk of epoch 3 would overwrite the bank of epoch 1, which is still being read."""
    with ranks(2) as (a, b):
        first, third = torch.zeros(50_000), torch.zeros(50_000)
        b.open(1, [(arrival(0, 0), first)])
        a.put(1, 0, 0, torch.ones(50_000), 1)
        a.put(1, 0, 0, torch.full((50_000,), 3.0), 3)
        b.wait(0, 0, 1)
        time.sleep(0.1)
        assert float(first.min()) == float(first.max()) == 1.0 and float(third.max()) == 0.0
        b.open(3, [(arrival(0, 0), third)])
        b.wait(0, 0, 3)
        assert float(third.min()) == 3.0


def test_what_is_put_first_leaves_first_whoever_it_is_for() -> None:
    """A peer that does not read holds back the chunks behind its own, all but a few."""
    with ranks(3) as (a, b, c):
        big = 16 * 2**20  # more than the kernel's buffers hold
        slots = [torch.zeros(big // 4) for _ in range(2)]
        c.open(1, [(arrival(slot, 0), slots[slot]) for slot in range(2)])
        a.put(1, 0, 0, torch.ones(big), 1)  # 64 MiB that rank 1 does not read yet
        a.put(2, 0, 0, torch.ones(big // 4), 1)
        a.put(2, 1, 0, torch.ones(big // 4), 1)
        time.sleep(0.5)
        assert float(slots[0].max()) == float(slots[1].max()) == 0.0
        place = torch.zeros(big)
        b.open(1, [(arrival(0, 0), place)])
        b.wait(0, 0, 1)
        c.wait(0, 0, 1)
        c.wait(0, 1, 1)
        assert float(place.min()) == float(slots[0].min()) == float(slots[1].min()) == 1.0


def test_finish_waits_for_what_lies_in_the_bank_only() -> None:
    with ranks(2, timeout_s=0.3) as (a, b):
        a.put(1, 0, 0, torch.ones(16 * 2**20), 1, Source.KEPT)
        a.finish(1)
        a.put(1, 1, 0, torch.ones(8), 1, Source.BANK)
        with pytest.raises(RuntimeTimeoutError, match="to send a chunk on to rank 1"):
            a.finish(1)
        places = [torch.zeros(16 * 2**20), torch.zeros(8)]
        b.open(1, [(arrival(slot, 0), place) for slot, place in enumerate(places)])
        a.timeout_s = b.timeout_s = 10.0
        a.finish(1)
        b.wait(0, 1, 1)


def test_what_lasts_for_a_call_is_sent_from_its_own_memory_and_may_change_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies: list[int] = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: copies.append(tensor.nbytes) or clone(tensor))
    size = 4_000_000  # more than a connection takes while nobody reads
    with ranks(2) as (a, b):
        share = torch.randn(size)
        want, place = clone(share), torch.zeros(size)
        a.put(1, 0, 0, share, 1, Source.CALL)
        assert not copies
        a.settle()
        share.zero_()  # between two calls, as load_state_dict does
        b.open(1, [(arrival(0, 0), place)])
        b.wait(0, 0, 1)
        assert torch.equal(place, want)
        a.put(1, 0, 0, share, 2)  # what may change at once is copied
        assert copies == [share.nbytes]


def test_a_chunk_of_another_size_ends_the_connection() -> None:
    with ranks(2) as (a, b):
        b.open(1, [(arrival(4, 0), torch.zeros(10))])
        a.put(1, 4, 0, torch.ones(11), 1)
        with pytest.raises(PeerDiedError, match="sent 44 bytes into slot 4 of 40 bytes"):
            b.wait(0, 4, 1)


def test_a_slow_peer_is_a_timeout_and_a_closed_connection_is_not() -> None:
    with ranks(2, timeout_s=0.2) as (a, b):
        a.open(1, [(arrival(0, 1), torch.zeros(3))])
        with pytest.raises(RuntimeTimeoutError, match=r"waited 0.2 s for its message from rank 1"):
            a.wait(1, 0, 1)
        a.timeout_s = 10.0
        threading.Timer(0.1, b.abort, ("why",)).start()
        start = time.monotonic()
        with pytest.raises(PeerDiedError, match="lost its connection"):
            a.wait(1, 0, 1)
        assert time.monotonic() - start < 5


def test_what_was_put_last_still_arrives_when_its_sender_leaves() -> None:
    a, b = tcp_ranks.transports(2)
    place = torch.zeros(2**20)
    a.put(1, 0, 0, torch.ones(2**20), 1)
    leaving = threading.Thread(target=a.disconnect)
    leaving.start()
    b.open(1, [(arrival(0, 0), place)])
    b.wait(0, 0, 1)
    leaving.join()
    assert float(place.min()) == 1.0
    b.disconnect()


def test_who_leaves_says_how_behind_all_that_it_put() -> None:
    a, b = tcp_ranks.transports(2)
    places = torch.zeros(3), torch.zeros(3)
    b.open(1, [(arrival(slot, 0), place) for slot, place in enumerate(places)])
    a.put(1, 0, 0, torch.ones(3), 1)
    a.disconnect("its script ended with ValueError: no such prompt")
    b.wait(0, 0, 1)
    assert float(places[0].min()) == 1.0
    with pytest.raises(PeerDiedError, match="rank 0 has left the job .* ValueError: no such prompt") as caught:
        b.wait(0, 1, 1)
    assert "killed" not in str(caught.value)
    assert "rank 0 has left the job" in (b.notice() or "")
    b.disconnect("it ended, too")  # nobody hears it


def test_a_connection_that_was_reset_while_its_chunk_waited_is_left_alone() -> None:
    """Nobody looks at it again, or its end would wake the thread for ever; and nothing more is kept for that rank."""
    a, b = tcp_ranks.transports(2)
    a.put(1, 0, 0, torch.ones(3), 1)  # waits in the connection: rank 1 has not opened the epoch
    link = a._links[1].socket
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed, it is reset
    a.disconnect()
    while not b.notice():
        b.put(0, 0, 0, torch.ones(100_000), 1)
    b.put(0, 1, 0, torch.ones(3), 1, Source.BANK)
    b.finish(1)
    b.open(1, [(arrival(0, 0), torch.zeros(3))])
    with pytest.raises(PeerDiedError):
        b.wait(0, 0, 1)
    b._ring()
    time.sleep(0.05)
    assert len(b._selector.get_map()) == 1 and not b._queue
    b.disconnect()


@pytest.mark.parametrize("machine_of", [(0, 1), (0, 0, 1, 1), (0, 1, 2)])
@pytest.mark.parametrize("seed", [11, 12])
def test_attention_between_machines(machine_of: tuple[int, ...], seed: int) -> None:
    results = run_processes(len(machine_of), rank_workers.attention, (seed, "auto", 4), machine_of)
    for result in results:
        assert result["error"] < 1e-5 and result["same"] and result["machines"] == machine_of


def test_every_schedule_with_random_delays() -> None:
    for errors in run_processes(4, rank_workers.every_schedule, ("auto", True), (0, 0, 1, 1)):
        assert errors and max(errors.values()) < 1e-5


def test_a_killed_rank_closes_its_connections() -> None:
    outcomes = run_outcomes(3, rank_workers.one_dies, ("auto", 2, "kill"), (0, 0, 1))
    assert outcomes[2].exit_code == -9
    for outcome in outcomes[:2]:
        assert isinstance(outcome.error, PeerDiedError | PeerFailedError) and "rank 2" in str(outcome.error)
        assert outcome.seconds < outcomes[2].seconds + 5


def test_a_failure_reaches_other_machines_with_its_first_words() -> None:
    outcomes = run_outcomes(3, rank_workers.one_dies, ("auto", 0, "raise"), (0, 1, 1))
    assert isinstance(outcomes[0].error, ValueError)
    for outcome in outcomes[1:]:
        assert isinstance(outcome.error, PeerFailedError)
        assert "failed first: rank 0: ValueError: the victim's own mistake" in str(outcome.error)


def test_a_rank_that_fails_and_lives_on_keeps_nobody_waiting() -> None:
    outcomes = run_outcomes(2, rank_workers.fails_and_lingers, (), (0, 1))
    assert isinstance(outcomes[0].error, PeerFailedError)
    assert outcomes[0].seconds < outcomes[1].seconds - 1
