"""Stores inside a machine and messages between machines, on fake GPUs: exact in every order, mutants seen."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import POLICIES, RANK_0_LATE, Gpu
from fake_ranks import CPU, largest, on_fake_gpus
from random_sites import random_case, rows
from rank_workers import attend_and_gather, schedules_of

from sfcompile.errors import PeerFailedError, RankMismatchError, RuntimeTimeoutError, UnsupportedError
from sfcompile.runtime.gpu import symmetric_side
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.gpu.stores import StoreTransport
from sfcompile.runtime.gpu.streams import CudaSideStream
from sfcompile.runtime.gpu.symmetric_side import SymmetricSide
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import current_session
from sfcompile.runtime.wires.transport import TAG_BITS

sf = torch.ops.streamfusion


def run(
    monkeypatch: pytest.MonkeyPatch, machine_of: tuple[int, ...], seeds: tuple[int, ...], policy: str,
    after_current: bool = True,
) -> float:  # fmt: skip
    """Attention and gather of random cases, twice each, on heaps that grow; the largest error."""
    cases = [random_case(seed, ranks=len(machine_of)) for seed in seeds]

    def work(rank: int, gpu: Gpu) -> float:
        session, errors = current_session(), []
        for i, case in enumerate(cases):
            gpu.synchronize()  # as CUDA's synchronize, before a heap is left
            session.load(f"p{i}", schedules_of(case))
            for _ in range(2):
                with session.call("model", []):
                    out = attend_and_gather(case, rank, torch.zeros(1, dtype=torch.int64), f"p{i}")[0]
                gpu.synchronize()
                errors.append(float((out.double() - case.expected).abs().max() / case.expected.abs().max()))
        return largest(errors)

    return on_fake_gpus(monkeypatch, machine_of, work, seeds[0], policy, stores=True, side_after_current=after_current)


def run_overlapped(monkeypatch: pytest.MonkeyPatch, policy: str) -> float:
    """Two attentions in turn, each put before the other one is attended: ranks run a bank ahead of each other.

    On a ring of two: a rank is done with an epoch as soon as it has the other's keys, whether or not that one has read.
    """
    cases = [case for case in (random_case(seed, ranks=2) for seed in range(60)) if case.mesh.ring == 2][:2]

    def work(rank: int, gpu: Gpu) -> float:
        session = current_session()
        session.load("p", [schedules_of(case)[0] for case in cases])
        ticket, outs = torch.zeros(1, dtype=torch.int64), []

        def puts(call: int, ticket: torch.Tensor) -> torch.Tensor:
            """Values of each call are its own: what a later call writes over an earlier one is seen."""
            site = call % 2
            q, k, v = cases[site].shard(rank)
            for op, tensor in ((sf.put_v, v * (call + 1)), (sf.put_q, q), (sf.put_k, k)):
                ticket = op(tensor, ticket, "p", site)
            return ticket

        ticket = puts(0, ticket)
        for call in range(6):
            case, site = cases[call % 2], call % 2
            ticket = puts(call + 1, ticket)
            ticket = sf.attend(ticket, case.mask, "p", site)
            own = case.expected[:, :, rows(case.site.q_positions[rank])]
            out, ticket = sf.collect(ticket, "p", site, list(own.shape), torch.float32)
            outs.append((out, own * (call + 1)))
        gpu.synchronize()
        return largest(float((out.double() - own).abs().max()) if own.numel() else 0.0 for out, own in outs)

    return on_fake_gpus(monkeypatch, (0, 0), work, 1, policy, stores=True)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("machine_of", [(0, 0), (0, 0, 0, 0), (0, 0, 1, 1)], ids=str)
def test_attention_and_gather_over_stores(
    monkeypatch: pytest.MonkeyPatch, machine_of: tuple[int, ...], policy: str
) -> None:
    assert run(monkeypatch, machine_of, (5, 6), policy) < 1e-5


class EarlyReader(StoreTransport):
    """Reads without waiting."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._words._waits = SimpleNamespace(run=lambda *args: None)


class Forgetful(StoreTransport):
    """Lets go of packed chunks while the side stream still stores them."""

    def put(self, *args: Any, **kwargs: Any) -> None:
        super().put(*args, **kwargs)
        self._kept.clear()


class HastySignal(StoreTransport):
    """Raises a chunk's signal before the chunk is stored."""

    def put(self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, *more: Any) -> None:
        if chunk.numel():
            with self._stream.after_current():
                self._tell(dst, self._size.signal_at(epoch % 2, slot), epoch, TAG_BITS, self._tags[epoch % 2])
        super().put(dst, slot, offset, chunk, epoch, *more)


class WithoutCredit(StoreTransport):
    """Overwrites a bank that others may still read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._peers = []


@pytest.mark.parametrize("mutant", [EarlyReader, Forgetful, HastySignal, "starts before its data"])
def test_mutants_are_seen(monkeypatch: pytest.MonkeyPatch, mutant: Any) -> None:
    """Each gives a wrong value, or a chunk that is not this call's, in some order of the streams."""
    if isinstance(mutant, type):
        monkeypatch.setattr(symmetric_side, "StoreTransport", mutant)
    seen = []
    for policy in POLICIES:
        try:
            error = run(monkeypatch, (0, 0), (5,), policy, after_current=isinstance(mutant, type))
        except RankMismatchError:
            return
        seen.append(error)
        if not error < 1e-5:
            return
    raise AssertionError(f"no order of the streams showed it: {seen}")


@pytest.mark.parametrize("policy", [*POLICIES, RANK_0_LATE])
def test_ranks_that_run_a_bank_ahead(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    assert run_overlapped(monkeypatch, policy) < 1e-5


def test_a_bank_without_credit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric_side, "StoreTransport", WithoutCredit)
    with suppress(RankMismatchError):  # a later word in the slot, or its values
        assert not run_overlapped(monkeypatch, RANK_0_LATE) < 1e-5


@pytest.mark.parametrize("told", [False, True])
def test_a_rank_that_stays_away_is_named(monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    """After one call, by the limit or because the host has heard of it: the error says who, which slot and epoch."""
    case = random_case(5, ranks=2)

    def work(rank: int, gpu: Gpu) -> float:
        session = current_session()
        session.load("p", schedules_of(case))
        for call in range(2 - rank):
            if call == 1 and told:
                threading.Timer(0.2, session.side.abort, ("rank 1: its process has gone",)).start()
            with session.call("model", []):
                attend_and_gather(case, rank, torch.zeros(1, dtype=torch.int64))
            gpu.synchronize()
        return 0.0

    kind, said = (PeerFailedError, "rank 1: its process has gone") if told else (RuntimeTimeoutError, "from rank 1")
    with pytest.raises(kind, match=said) as caught:
        on_fake_gpus(monkeypatch, (0, 0), work, 5, stores=True, timeout_s=60.0 if told else 0.5)
    error = caught.value
    assert (error.rank, error.peer, error.epoch) == (0, 1, 3) and error.slot is not None and error.fix


def test_a_machine_that_cannot_leaves_no_thread() -> None:
    def refuses(nbytes: int) -> Any:
        raise UnsupportedError("no peer access", "", "")

    def words() -> Any:
        return None, None

    before, status = set(threading.enumerate()), DeviceStatus(0, CPU, 1.0)
    with pytest.raises(UnsupportedError, match="no peer access"):
        SymmetricSide(
            0, Topology((0,)), CPU, status, None, refuses, words, CudaSideStream(CPU), lambda value, doing: [value],
            lambda: None,
        )  # fmt: skip
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(5.0)
    assert not any(thread.is_alive() for thread in left)
