"""A call knows its weights: other tensors, and the same ones with other values."""

from __future__ import annotations

import pytest
import torch

from sfcompile.runtime.rank import weights as module
from sfcompile.runtime.rank.calls import fingerprint
from sfcompile.runtime.rank.weights import Weights


def test_other_weights_and_written_ones_have_other_marks() -> None:
    first, second = ([torch.full((4, 4), float(i + offset)) for i in range(3)] for offset in (0, 10))
    weights = Weights()
    assert weights.mark(first) == fingerprint(first)
    assert weights.mark(second) == fingerprint(second) != fingerprint(first)
    assert weights.mark(first) == fingerprint(first)
    before = weights.mark(first)
    first[2][0, 0] = 7
    assert weights.mark(first) == fingerprint(first) != before
    assert weights.mark(first[:2]) == fingerprint(first[:2])


def test_values_are_read_only_when_they_may_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    def counting(tensors: object) -> int:
        reads.append(1)
        return 5

    monkeypatch.setattr(module, "fingerprint", counting)
    with torch.inference_mode():
        made_inside = torch.ones(3)
    weights, tensors = Weights(), [torch.ones(3), made_inside]
    assert [weights.mark(tensors) for _ in range(3)] == [5, 5, 5]
    assert len(reads) == 1
    weights.mark([torch.ones(3), tensors[1]])
    assert len(reads) == 2
