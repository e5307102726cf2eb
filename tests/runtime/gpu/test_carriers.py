"""What carries chunks: asked for, or the first that starts, with reasons."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sfcompile.errors import PeerDiedError, StreamFusionError, UnsupportedError
from sfcompile.options import TRANSPORTS
from sfcompile.runtime.gpu.carriers import CARRIERS, choose_carrier


def starts(name: str) -> Callable[[], str]:
    return lambda: f"side of {name}"


def fails(what: str, everywhere: bool = True, kind: type[StreamFusionError] = UnsupportedError) -> Callable[[], str]:
    def attempt() -> str:
        error = kind(what, "", "")
        error.on_every_rank = everywhere
        raise error

    return attempt


def test_all_can_be_asked_for() -> None:
    assert set(CARRIERS) < set(TRANSPORTS)
    for name in CARRIERS:
        chosen = choose_carrier(name, {other: starts(other) for other in CARRIERS})
        assert chosen.side == f"side of {name}" and chosen.line.startswith(f"{name} (asked for)")
    with pytest.raises(UnsupportedError, match="no library"):
        choose_carrier("nvshmem", {"nvshmem": fails("no library"), "nccl": starts("nccl")})


def test_the_first_that_starts_is_taken_and_the_others_said() -> None:
    attempts = {"nvshmem": fails("no library"), "symm_mem": fails("no peer access"), "nccl": starts("nccl")}
    chosen = choose_carrier("auto", attempts)
    assert chosen.name == "nccl" and chosen.side == "side of nccl"
    assert chosen.line == "nccl: messages between all ranks; not nvshmem: no library; not symm_mem: no peer access"
    assert choose_carrier("auto", {**attempts, "nvshmem": starts("nvshmem")}).name == "nvshmem"
    assert choose_carrier("auto", {name: starts(name) for name in CARRIERS}).name == "nvshmem"


def test_nothing_is_tried_after_a_rank_has_gone() -> None:
    attempts = {"nvshmem": fails("rank 1 has gone", False, PeerDiedError), "nccl": starts("nccl")}
    with pytest.raises(PeerDiedError, match="rank 1 has gone"):
        choose_carrier("auto", attempts)


def test_nothing_starts() -> None:
    with pytest.raises(UnsupportedError, match="not nvshmem: no library; not nccl: two ranks on one GPU") as none:
        choose_carrier("auto", {"nvshmem": fails("no library"), "nccl": fails("two ranks on one GPU")})
    assert none.value.on_every_rank
