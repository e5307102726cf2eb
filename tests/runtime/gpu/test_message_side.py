"""GPU ranks without NVSHMEM, on fake GPUs (tests/support/fake_device.py): streams, memory and messages as CUDA's."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from fake_device import POLICIES, Gpu, Nccl
from fake_ranks import CPU, largest, on_fake_gpus
from random_sites import random_case
from rank_workers import attend_and_gather, schedules_of

from sfcompile.errors import RankMismatchError
from sfcompile.runtime.gpu.message_side import MessageSide
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import current_session
from sfcompile.runtime.wires.c10d import PairedTransport

CALLS = 3


def run(
    monkeypatch: pytest.MonkeyPatch, machine_of: tuple[int, ...], policy: str, nccl: Nccl | None = None,
    transport: type[PairedTransport] = PairedTransport,
) -> float:  # fmt: skip
    """Attention and gather of a random case, several times on every rank; the largest error."""
    case = random_case(5, ranks=len(machine_of))

    def work(rank: int, gpu: Gpu) -> float:
        session, outs = current_session(), []
        session.load("p", schedules_of(case))
        for _ in range(CALLS):
            with session.call("model", []):
                outs.append(attend_and_gather(case, rank, torch.zeros(1, dtype=torch.int64))[0])
        gpu.synchronize()
        return largest(float((out.double() - case.expected).abs().max() / case.expected.abs().max()) for out in outs)

    return on_fake_gpus(monkeypatch, machine_of, work, 5, policy, nccl=nccl, transport=transport)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("machine_of", [(0, 0), (0, 1), (0, 0, 0, 0), (0, 0, 1, 1)], ids=str)
def test_attention_and_gather_over_messages(
    monkeypatch: pytest.MonkeyPatch, machine_of: tuple[int, ...], policy: str
) -> None:
    assert run(monkeypatch, machine_of, policy) < 1e-5


@pytest.mark.parametrize("stores", [False, True])
def test_what_was_made_in_inference_mode_serves_calls_outside_of_it(
    monkeypatch: pytest.MonkeyPatch, stores: bool
) -> None:
    """A model is compiled at its first call; the next one may come in torch.no_grad()."""
    case = random_case(5, ranks=2)

    def work(rank: int, gpu: Gpu) -> float:
        session, outs = current_session(), []
        with torch.inference_mode():
            session.load("p", schedules_of(case))
        for _ in range(CALLS):
            with torch.no_grad(), session.call("model", []):
                outs.append(attend_and_gather(case, rank, torch.zeros(1, dtype=torch.int64))[0])
        gpu.synchronize()
        return largest(float((out.double() - case.expected).abs().max() / case.expected.abs().max()) for out in outs)

    assert on_fake_gpus(monkeypatch, (0, 0), work, 5, stores=stores) < 1e-5


class EarlyReader(PairedTransport):
    """Does not wait for what it reads."""

    def _join(self, work: Any) -> None:
        """Go on at once."""


class Forgetful(PairedTransport):
    """Lets go of what it sends while it is under way."""

    def put(self, *args: Any, **kwargs: Any) -> None:
        super().put(*args, **kwargs)
        self._sends.clear()


class OutOfOrder(PairedTransport):
    """Rank 1 posts its first two groups the other way round."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._first: list[tuple[Any, ...]] = []

    def _exchange(self, *args: Any) -> Any:
        if self._rank != 1 or len(self._first) == 2:
            return super()._exchange(*args)
        self._first.append(args)
        if len(self._first) == 2:
            super()._exchange(*self._first[1])
            return super()._exchange(*self._first[0])
        return []


@pytest.mark.parametrize("mutant", [EarlyReader, Forgetful, OutOfOrder, "starts before its data"])
def test_a_wait_or_a_memory_too_little_is_seen(monkeypatch: pytest.MonkeyPatch, mutant: Any) -> None:
    """In some order of the streams what comes is not this call's, and the call says so: no wrong value passes."""
    nccl = Nccl(after_current=isinstance(mutant, type))
    transport = mutant if isinstance(mutant, type) else PairedTransport
    for policy in POLICIES:
        try:
            error = run(monkeypatch, (0, 0), policy, nccl, transport)
        except RankMismatchError as told:
            assert "got a chunk of another call" in told.what
            return
        except AssertionError as told:
            assert mutant is OutOfOrder and "messages of different sizes met" in str(told)
            return
        assert error < 1e-5, "a wrong value, and nobody said so"
    raise AssertionError("no order of the streams showed it")


def test_messages_are_ended_when_another_rank_has_gone() -> None:
    """Nothing on the stream would: and who finds them ended finds the reason too."""
    ended: list[tuple[str, str | None]] = []
    status, done = DeviceStatus(0, CPU, 2.0), threading.Event()

    class Messages:
        timeout_s = 2.0

        def abort(self, notice: str) -> None:
            ended.append((notice, status.notice()))
            done.set()

        def close(self) -> None:
            """Nothing."""

    messages: Any = Messages()
    side = MessageSide(0, Topology((0, 1)), CPU, status, messages, lambda: "rank 1: gone")
    assert done.wait(20.0)
    assert ended[0] == ("rank 1: gone", "rank 1: gone") == (ended[0][0], side.notice())
    side.rewire(5.0)
    assert messages.timeout_s == status.limit_s == 5.0
    side.close(True)
