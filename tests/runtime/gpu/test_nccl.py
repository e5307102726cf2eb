"""The group for NCCL's messages: what is in the way is said on every rank."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfcompile.errors import HeapError, UnsupportedError
from sfcompile.runtime.gpu import nccl

CPU = torch.device("cpu")


def alone(value: Any, doing: str) -> list[Any]:
    return [value]


class Distributed:
    """What connect() uses of torch.distributed; sums ``total`` over so many ranks."""

    def __init__(self, total: float = 1.0, is_there: bool = True, slow_s: float = 0.0, error: str = "") -> None:
        self.total, self.is_there, self.slow_s, self.error = total, is_there, slow_s, error
        self.asked: dict[str, Any] = {}

    def is_nccl_available(self) -> bool:
        return self.is_there

    def new_group(self, ranks: list[int], **asked: Any) -> Any:
        time.sleep(self.slow_s)
        if self.error:
            raise RuntimeError(self.error)
        self.asked = {"ranks": ranks, **asked}
        return SimpleNamespace(name="group")

    def all_reduce(self, tensor: torch.Tensor, group: Any) -> None:
        tensor.fill_(self.total)


def connected(monkeypatch: pytest.MonkeyPatch, distributed: Distributed, share: Any = alone) -> Any:
    monkeypatch.setattr(nccl, "dist", distributed)
    return nccl.connect(0, [3], CPU, 0.5, share)


def test_a_group_that_sums_right(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = Distributed()
    assert connected(monkeypatch, distributed).name == "group"
    assert distributed.asked["ranks"] == [3] and distributed.asked["backend"] == "nccl"
    assert distributed.asked["timeout"].total_seconds() == 0.5


@pytest.mark.parametrize(
    ("distributed", "said"),
    [
        (Distributed(total=2.0), "first sum of a one from each of 1 ranks is 2"),
        (
            Distributed(error="unhandled system error\nmore"),
            "does not start on rank 0: unhandled system error",
        ),
        (Distributed(slow_s=2.0), "does not start on rank 0: no answer within 0.5 s"),
    ],
)
def test_a_group_that_does_not_start(monkeypatch: pytest.MonkeyPatch, distributed: Distributed, said: str) -> None:
    with pytest.raises(HeapError, match=said) as failed:
        connected(monkeypatch, distributed)
    assert failed.value.on_every_rank


def test_what_is_missing_is_said_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = Distributed(is_there=False)
    with pytest.raises(UnsupportedError, match="built without NCCL"):
        connected(monkeypatch, distributed)
    distributed = Distributed()
    with pytest.raises(UnsupportedError, match="rank 1: this torch was built without NCCL"):
        connected(monkeypatch, distributed, lambda value, doing: [value, ("this torch was built without NCCL", "", "")])
    assert distributed.asked == {}


def test_two_ranks_on_one_gpu() -> None:
    nccl.refuse_shared_gpus(["", ""])
    nccl.refuse_shared_gpus(["a", "b"])
    with pytest.raises(UnsupportedError, match="ranks 1 and 2 are on one GPU"):
        nccl.refuse_shared_gpus(["a", "b", "b"])
