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


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.complex128])
def test_writes_that_torch_does_not_count_are_seen_at_the_next_call(dtype: torch.dtype) -> None:
    tensors = [torch.ones(5, 7, dtype=dtype).t(), torch.ones(3, dtype=dtype), torch.ones(0, dtype=dtype)]
    weights, marks = Weights(), set()
    marks.add(weights.mark(tensors))
    versions = [tensor._version for tensor in tensors]
    tensors[0].data.zero_()
    marks.add(weights.mark(tensors))
    tensors[1].data.zero_()
    marks.add(weights.mark(tensors))
    assert versions == [tensor._version for tensor in tensors] and len(marks) == 3
    with torch.inference_mode():
        made_inside = torch.ones(4, 4).to(dtype)
    before = weights.mark([made_inside])
    with torch.inference_mode():
        made_inside.zero_()
    assert weights.mark([made_inside]) == fingerprint([made_inside]) != before


def test_memory_that_a_weight_had_is_not_read() -> None:
    """Its words lead to where it was: pages that the system takes back when they are freed."""
    weights, tensor = Weights(), torch.ones(1 << 22)
    before = weights.mark([tensor])
    tensor.data = torch.zeros(2)
    assert weights.mark([tensor]) != before
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        weights.mark([tensor])


def test_values_are_read_only_when_they_may_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    def counting(tensors: object) -> int:
        reads.append(1)
        return 5

    monkeypatch.setattr(module, "fingerprint", counting)
    monkeypatch.setattr(module, "_KEPT", 4)
    with torch.inference_mode():
        made_inside = torch.ones(3)
    weights, tensors = Weights(), [torch.ones(3), made_inside]
    assert [weights.mark(tensors) for _ in range(3)] == [5, 5, 5]
    assert len(reads) == 1
    second = [torch.ones(3), tensors[1]]
    for _ in range(3):  # two models take turns
        weights.mark(second)
        weights.mark(tensors)
    assert len(reads) == 2
    others = [[torch.ones(3)] for _ in range(5)]
    for other in others:
        weights.mark(other)
    weights.mark(others[-1])
    assert len(reads) == 7
    weights.mark(tensors)
    assert len(reads) == 8, "of the four asked for last it is kept"


def test_a_change_that_the_two_elements_miss_is_counted_by_torch_all_the_same() -> None:
    weights, tensor = Weights(), torch.zeros(1000)
    before = weights.mark([tensor])
    tensor[0] = 1.0
    assert weights.mark([tensor]) != before
