"""Weights that the ranks of a machine hold once: the same values, private writes, and errors on every rank.

Ranks are threads here; between processes, with a compiled model: tests/e2e/test_sharded_weights.py."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from threads import run_threads
from torch import nn

from sfcompile.errors import RankMismatchError, WeightsError
from sfcompile.runtime.rank import shared_weights
from sfcompile.runtime.rank.calls import fingerprint
from sfcompile.runtime.rank.session import Session, current_session
from sfcompile.runtime.rank.shared_weights import SharedWeights, is_placed, obstacle_of

SIDE = 160
"""A square of fp32 of so many rows is large."""


def weights_of(seed: int = 0) -> list[torch.Tensor]:
    """Large ones of several dtypes and layouts, and a small one."""
    gen = torch.Generator().manual_seed(seed)
    square = torch.randn(SIDE, SIDE, generator=gen)
    return [
        nn.Parameter(square.clone(), requires_grad=False),
        square.to(torch.bfloat16).repeat(2, 2),
        nn.Parameter(torch.randn(4, 64, 16, 16, generator=gen).to(memory_format=torch.channels_last)),
        torch.full((SIDE, SIDE), torch.nan),
        torch.ones(8),
    ]


def on_ranks(work: Callable[[int, Session], Any], ranks: int = 2, machines: int = 1) -> list[Any]:
    """What ``work`` gives or raises, by rank."""

    def body(rank: int) -> Any:
        try:
            return work(rank, current_session())
        except (WeightsError, RankMismatchError) as error:
            return error

    return run_threads(ranks, body, [rank * machines // ranks for rank in range(ranks)], timeout_s=20.0)


def sharing(session: Session, weights: list[torch.Tensor]) -> SharedWeights:
    shared = SharedWeights(session, [f"weight {i}" for i in range(len(weights))])
    shared.share(weights)
    return shared


@pytest.mark.parametrize(("ranks", "machines"), [(1, 1), (3, 1), (4, 2)])
def test_values_stay_and_memory_is_the_machines(
    ranks: int, machines: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bundles of one weight and of two; tensors stay the same objects, laid out as before."""
    monkeypatch.setattr(shared_weights, "BUNDLE_BYTES", 300_000)
    monkeypatch.setattr(shared_weights, "_EVERY_S", -1.0)
    caplog.set_level("INFO", logger="sfcompile")

    def work(rank: int, session: Session) -> SharedWeights:
        weights = weights_of()
        before = [(weight.data_ptr(), weight.stride()) for weight in weights]
        shared = sharing(session, weights)
        for weight, wanted, (memory, strides) in zip(weights, weights_of(), before, strict=True):
            assert torch.equal(weight.nan_to_num(7.0), wanted.nan_to_num(7.0)) and weight.stride() == strides
            assert (weight.data_ptr() == memory) == (weight.numel() == 8)
            assert weight.requires_grad == wanted.requires_grad
            assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
        assert [is_placed(session, weight) for weight in weights] == [True] * 4 + [False]
        return shared

    for shared in on_ranks(work, ranks, machines):
        assert f"lie once for the {ranks // machines} ranks of a machine" in shared.line
        assert "1 (32 B) are each rank's own: below 64.0 KiB" in shared.line
    assert "weights: 100.0 KiB of 656.0 KiB lie once" in caplog.text
    assert "weights: 656.0 KiB of 656.0 KiB lie once" in caplog.text


def test_a_write_is_one_ranks_own() -> None:
    """Were the mapping shared, each rank's ``+=`` would reach all: the sum would hold every rank's."""

    def work(rank: int, session: Session) -> tuple[list[float], bool, bool]:
        weights = [torch.zeros(SIDE, SIDE)]
        shared = sharing(session, weights)
        memory = weights[0].data_ptr()
        session.exchange(None, "write")
        weights[0].data += rank + 1.0
        session.exchange(None, "read")
        seen = [float(weights[0].min()), float(weights[0].max())]
        session.exchange(None, "write the same")
        weights[0].fill_(5.0)
        there = is_placed(session, weights[0])
        shared.share_again(fingerprint(weights), weights)
        assert float(weights[0].mean()) == 5.0 and is_placed(session, weights[0])
        moved = weights[0].data_ptr()
        shared.share_again(fingerprint(weights), weights)
        return seen, there, memory != moved == weights[0].data_ptr()

    assert on_ranks(work, 3) == [([rank + 1.0] * 2, False, True) for rank in range(3)]


def test_what_other_tensors_lie_in_stays_whole() -> None:
    """They would keep the old memory and no longer be the weight. What one rank cannot share, none does."""

    def work(rank: int, session: Session) -> tuple[list[bool], str]:
        weights = [torch.zeros(SIDE, SIDE) for _ in range(3)]
        kept = weights[0].view(-1) if rank == 1 else None
        weights[1] = torch.zeros(2 * SIDE, SIDE)[:SIDE]
        shared = sharing(session, weights)
        assert kept is None or kept.data_ptr() == weights[0].data_ptr()
        return [is_placed(session, weight) for weight in weights], shared.line

    for placed, line in on_ranks(work):
        assert placed == [False, False, True] and "2 (200.0 KiB) are each rank's own: other tensors lie in" in line


def test_obstacles() -> None:
    assert obstacle_of(torch.zeros(SIDE, SIDE)) == ""
    assert "below" in obstacle_of(torch.zeros(8))
    assert "plain" in obstacle_of(torch.ones(SIDE, SIDE).to_sparse())
    assert "plain" in obstacle_of(torch.zeros(SIDE, SIDE, device="meta"))


def test_ranks_with_other_values_all_say_so() -> None:
    """One element, which no sample would show."""

    def work(rank: int, session: Session) -> None:
        weights = weights_of()
        if rank == 2:
            weights[1][7, 5] += 1.0
        sharing(session, weights)

    for error in on_ranks(work, 3):
        assert isinstance(error, RankMismatchError) and error.on_every_rank and error.peer == 2
        assert "weight 1 of rank 2" in str(error)


def test_ranks_with_other_weights_all_say_so() -> None:
    for error in on_ranks(lambda rank, session: sharing(session, weights_of()[: 4 - rank]), 2):
        assert isinstance(error, RankMismatchError) and error.on_every_rank


def test_no_room_is_an_error_on_all_ranks_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third bundle finds the disk full."""
    monkeypatch.setattr(shared_weights, "BUNDLE_BYTES", 1)
    reserve, calls = os.posix_fallocate, list[int]()

    def full(fd: int, offset: int, length: int) -> None:
        calls.append(length)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full)

    def work(rank: int, session: Session) -> tuple[WeightsError, bool]:
        weights = weights_of()
        with pytest.raises(WeightsError) as raised:
            sharing(session, weights)
        same = all(
            torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(weights, weights_of(), strict=True)
        )
        return raised.value, same

    for error, same in on_ranks(work):
        assert same and error.on_every_rank and "a weight of 256.0 KiB does not fit in /dev/shm" in str(error)


def test_memory_that_cannot_be_mapped_is_an_error_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shared_weights, "opened", unreachable)
    for error in on_ranks(lambda rank, session: sharing(session, weights_of())):
        assert isinstance(error, WeightsError) and error.on_every_rank
        assert "cannot be mapped" in error.what and "docker: --pid" in error.fix


def test_models_that_share_a_graph_take_turns_without_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one model, say: each is shared once. One that is written to and back is shared each time."""

    def work(rank: int, session: Session) -> list[list[int]]:
        models = [[torch.full((SIDE, SIDE), float(i))] for i in range(3)]
        shared = sharing(session, models[0])
        met, share = list[list[int]](), shared.share

        def counted(weights: Any, mark: int | None = None) -> int:
            met[-1].append(next(i for i, model in enumerate(models) if model is weights))
            return share(weights, mark)

        monkeypatch.setattr(shared, "share", counted)
        for value in (None, None, 7.0, None, 1.0, None):
            met.append([])
            if value is not None:
                models[1][0].fill_(value)
            for model in models:
                shared.share_again(fingerprint(model), model)
                assert is_placed(session, model[0])
        return met

    for met in on_ranks(work):
        assert met == [[1, 2], [], [1], [], [1], []]
