"""A value in shards is read as a whole one, and what is written to it is what later readers see."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.program.value_rows import ValueRows
from sfcompile.runtime.rank.sharded_value import Held, ShardedValue, marks_of
from sfcompile.torch_private import FakeTensorMode

WHOLE = torch.arange(30, dtype=torch.float32).view(2, 5, 3)
CUT = ValueRows((2, 5, 3), 1, (((0, 1), (4, 1)), ((1, 3),)))


def value(rank: int = 0) -> tuple[ShardedValue, list[int]]:
    """A value, and the ranks that gathered it."""
    gathered: list[int] = []

    def gather(value: ShardedValue) -> torch.Tensor:
        gathered.append(value.rank)
        return WHOLE.clone()

    rows = torch.cat([WHOLE[:, first : first + n] for first, n in CUT.owned[rank]], 1)
    return ShardedValue(rows, CUT, rank, Held(gather, 7)), gathered


def test_it_looks_whole_and_is_gathered_once() -> None:
    x, gathered = value()
    assert x.shape == WHOLE.shape and x.is_contiguous() and "cut along dim 1" in repr(x)
    alias = x.detach()
    assert isinstance(alias, ShardedValue) and not gathered
    assert torch.equal(x + 1, WHOLE + 1) and torch.equal(alias[:, 2], WHOLE[:, 2]) and gathered == [0]
    for read in (lambda t: t.tolist(), lambda t: t.numpy().sum(), lambda t: float(t.max())):
        fresh, gathered = value()
        assert read(fresh) == read(WHOLE) and gathered == [0]  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_are_those_that_were_written(rank: int) -> None:
    x, gathered = value(rank)
    assert x.rows() is x.shard and not gathered
    x[:, 3:].zero_()
    x.detach().add_(1.0)
    want = WHOLE.clone()
    want[:, 3:] = 0.0
    want += 1
    assert torch.equal(x.whole(), want) and x.data_ptr() == x.whole().data_ptr()
    assert torch.equal(x.rows(), torch.cat([want[:, first : first + n] for first, n in CUT.owned[rank]], 1))


def test_it_keeps_its_shape_and_its_memory() -> None:
    x, gathered = value()
    with pytest.raises(UnsupportedError, match=r"fill_\(\) of a value \[2, 5, 3\].*value.whole\(\)"):
        x.untyped_storage().fill_(0)
    with pytest.raises(UnsupportedError, match=r"\.data = gives a value"):
        x.data = WHOLE * 2
    for change in (lambda: x.transpose_(1, 2), lambda: x.unsqueeze_(0), lambda: x.set_(WHOLE.clone())):
        with pytest.raises((UnsupportedError, RuntimeError)):
            change()  # type: ignore[no-untyped-call]
    assert not gathered and x.shape == WHOLE.shape and torch.equal(x.data, WHOLE)


@pytest.mark.parametrize("inside", [False, True])
def test_copies_are_whole(inside: bool) -> None:
    with torch.inference_mode(inside):
        x, _ = value()
        for copied in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), x.clone(), x.to(torch.float64).float()):
            assert type(copied) is torch.Tensor and torch.equal(copied, WHOLE)


def test_a_compiler_sees_its_shape_and_nobody_computes_with_parts_of_it() -> None:
    mode = FakeTensorMode()
    with mode:
        fake = ShardedValue.__tensor_unflatten__({"shard": torch.empty(2, 2, 3)}, (CUT, 0), None, None)
        assert tuple((fake * 2).shape) == (2, 5, 3)
    names, facts = value()[0].__tensor_flatten__()
    rebuilt = ShardedValue.__tensor_unflatten__({name: value()[0].shard for name in names}, facts, None, None)
    with pytest.raises(UnsupportedError, match="read in a graph of another compiler"):
        rebuilt + 1


def test_marks_tell_values_apart() -> None:
    (x, _), (y, _) = value(), value()
    y.held.mark = 8
    assert marks_of([x]) != marks_of([y]) and marks_of([x, y]) != marks_of([y, x])
