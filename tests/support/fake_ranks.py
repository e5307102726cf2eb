"""Ranks on fake GPUs (fake_device.py): threads with sessions whose sites run over messages, or over stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import FakeMemory, FakeSide, FakeWords, Gpu, Machine, Nccl
from threads import run_threads

from sfcompile.runtime.gpu.message_side import MessageSide
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.gpu.symmetric_side import SymmetricSide
from sfcompile.runtime.rank.session import current_session
from sfcompile.runtime.wires import c10d
from sfcompile.runtime.wires.c10d import PairedTransport

CPU = torch.device("cpu")
Work = Callable[[int, Gpu], float]


def on_fake_gpus(
    monkeypatch: pytest.MonkeyPatch,
    machine_of: tuple[int, ...],
    work: Work,
    seed: int,
    policy: str = "any order",
    stores: bool = False,
    nccl: Nccl | None = None,
    side_after_current: bool = True,
    transport: type[PairedTransport] = PairedTransport,
    timeout_s: float = 20.0,
) -> float:
    """What ``work`` returns on every rank: the largest, NaN if any is.

    Args:
        seed, policy: of the order in which work of several streams runs.
        stores: inside machines ranks store into each other's memory; else all is messages.
        nccl, side_after_current, transport: mutants.
        timeout_s: how long waits for a word of a store last.
    """
    monkeypatch.setattr(c10d, "dist", nccl or Nccl())
    machine = Machine(seed, policy)
    gpus = [Gpu(machine, rank) for rank in range(len(machine_of))]
    groups: list[Any] = Nccl.groups(gpus)

    def on_rank(rank: int) -> float:
        session, gpu = current_session(), gpus[rank]
        status = DeviceStatus(rank, CPU, timeout_s)
        with gpu:
            pairs = transport(rank, groups[rank], 20.0, lambda: None, status.words)
            side = MessageSide(rank, session.topology, CPU, status, pairs, nothing_known)
            if stores:
                side = SymmetricSide(
                    rank, session.topology, CPU, status, pairs if len(set(machine_of)) > 1 else None,
                    lambda nbytes: FakeMemory(nbytes, gpu, machine_of, session.exchange), lambda: fake_words(gpu),
                    FakeSide(gpu, side_after_current), session.exchange, nothing_known,
                )  # fmt: skip
            session.use_side(side)
            result = work(rank, gpu)
            gpu.synchronize()
        error = status.error()  # where a GPU would stop at an assertion
        if error is not None:
            raise error
        return result

    return largest(run_threads(len(machine_of), on_rank, machine_of))


def fake_words(gpu: Gpu) -> tuple[Any, Any]:
    """What tells words, and what waits for them."""
    words = FakeWords(gpu)
    return SimpleNamespace(run=words.tell), SimpleNamespace(run=words.wait)


def nothing_known() -> None:
    """Of other ranks' failures."""


def largest(errors: Iterable[float]) -> float:
    """The largest, NaN above all."""
    return max(errors, key=lambda error: (error != error, error))
