"""A weight in shares is read as a whole one; a write is seen or refused, never lost."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sfcompile.errors import UnsupportedError, WeightsError
from sfcompile.runtime.program.weight_rows import WeightRows
from sfcompile.runtime.rank.sharded_weight import History, ShardedWeight, WeightView, marks_of, why_whole

RANKS = 3
WHOLE = torch.arange(35, dtype=torch.float32).view(7, 5)


def shares(whole: torch.Tensor) -> list[ShardedWeight]:
    """The weight on every rank; gathered it is what they hold now."""
    cut = WeightRows(tuple(whole.shape), tuple(range(RANKS)))
    weights = list[ShardedWeight]()

    def gather(weight: ShardedWeight) -> torch.Tensor:
        return torch.cat([other.shard for other in weights])

    for rank in range(RANKS):
        weights.append(ShardedWeight(whole[slice(*cut.rows(rank))].clone(), cut, rank, History(gather, 1)))
    return weights


def test_it_looks_whole_and_reads_whole() -> None:
    weight = shares(WHOLE)[1]
    assert tuple(weight.shape) == (7, 5) and weight.is_contiguous() and weight.dtype == torch.float32
    assert "rows 3 to 5 on rank 1" in repr(weight)
    assert torch.equal(weight.whole(), WHOLE)
    x = torch.randn(2, 5)
    assert torch.equal(nn.functional.linear(x, weight), nn.functional.linear(x, WHOLE))
    assert torch.equal(x @ weight.t(), x @ WHOLE.t())
    assert torch.equal(weight[2:4] + 0, WHOLE[2:4]) and float(weight.sum()) == float(WHOLE.sum())
    parameter = nn.Parameter(weight, requires_grad=False)
    assert isinstance(parameter, ShardedWeight) and isinstance(parameter, nn.Parameter)
    assert parameter.history is weight.history and parameter.shard is weight.shard


@pytest.mark.parametrize("loaded_inside", [False, True])
def test_views_of_it_are_read_in_inference_mode(loaded_inside: bool) -> None:
    with torch.inference_mode(loaded_inside):
        weight = nn.Parameter(shares(WHOLE)[1], requires_grad=False)
    with torch.inference_mode():
        assert torch.equal(weight[2:4].t() + 0, WHOLE[2:4].t()) and torch.equal(weight.t() + 0, WHOLE.t())
        assert torch.equal(nn.functional.linear(torch.ones(2, 5), weight[:3]), WHOLE[:3].sum(1).expand(2, 3))
    with torch.no_grad():
        assert torch.equal(weight[2:4].t() + 0, WHOLE[2:4].t())


WRITES: dict[str, Callable[[Any], Any]] = {
    "fused": lambda w: w.data.__iadd__(torch.full((7, 5), 0.25)),
    "a row for all": lambda w: w.add_(torch.arange(5.0), alpha=2),
    "a column for all": lambda w: w.mul_(torch.arange(7.0)[:, None]),
    "a number": lambda w: w.sub_(3),
    "a tensor without dims": lambda w: w.div_(torch.tensor(3.0, dtype=torch.float64)),
    "itself": lambda w: w.add_(w),
    "itself turned": lambda w: w.copy_(w.flip(0)),
    "zeros": lambda w: nn.init.zeros_(w),
    "what needs all": lambda w: w.clamp_(2.0, 9.0),
    "columns": lambda w: w.index_fill_(1, torch.tensor([1, 3]), 7.0),
    "data": lambda w: setattr(w, "data", torch.ones(7, 5)),
    "fused data": lambda w: setattr(w, "data", w.data + torch.ones(7, 5)),
    "of a view of another": lambda w: w.copy_((w.clone() * 2).data),
    "cast": lambda w: w.copy_(torch.ones(7, 5, dtype=torch.float64) / 3),
    "in a list": lambda w: torch._foreach_mul_([w, torch.ones(3)], 2.0),
    "as an output": lambda w: torch.add(torch.full((7, 5), 0.5), w, out=w),
    "drawn": lambda w: w.normal_(generator=torch.Generator().manual_seed(3)),  # each rank has another generator
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_one_to_every_ranks_rows(name: str) -> None:
    own = [nn.Parameter(weight, requires_grad=False) for weight in shares(WHOLE)]
    for weight in own:  # ranks write one after the other here: what they gather is as it was for all
        weight.history.gather = lambda weight: WHOLE.clone()  # type: ignore[attr-defined]
    want = WHOLE.clone()
    WRITES[name](want)
    for weight in own:
        WRITES[name](weight)
    assert torch.equal(torch.cat([weight.shard for weight in own]), want)  # type: ignore[attr-defined]
    marks = {weight.history.mark for weight in own}  # type: ignore[attr-defined]
    assert len(marks) == 1 and marks != {1}


def test_ranks_that_write_other_values_have_other_marks() -> None:
    a, b, c = shares(WHOLE)
    before = marks_of([a])
    assert before == marks_of([b]) == marks_of([c])
    a.add_(torch.full((7, 5), 0.5))
    b.add_(torch.full((7, 5), 0.25))
    c.add_(torch.full((7, 5), 0.5))
    assert marks_of([a]) == marks_of([c]) != marks_of([b]) and before not in (marks_of([a]), marks_of([b]))


def test_a_write_that_would_be_lost_is_refused() -> None:
    weight = shares(WHOLE)[0]
    lost: list[Callable[[], Any]] = [
        lambda: weight[0].zero_(),
        lambda: weight.t().mul_(2),
        lambda: weight.view(-1)[3:].fill_(1.0),
        lambda: torch._foreach_zero_([torch.ones(2), weight.t()]),
        lambda: torch.mul(WHOLE.t(), 2, out=weight.t()),
    ]
    for write in lost:
        with pytest.raises(UnsupportedError, match="a view of a sharded weight"):
            write()
    with pytest.raises(UnsupportedError, match=r"the shape \[5, 7\]"):
        weight.t_()
    with pytest.raises(UnsupportedError, match="is given data"):
        weight.data = torch.ones(7, 5, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="is given data"):
        weight.data = torch.ones(5, 7)
    assert torch.equal(weight.whole(), WHOLE)


def test_views_are_plain_to_who_reads_them() -> None:
    view = shares(WHOLE)[0].t()
    assert isinstance(view, WeightView) and type(view + 1) is torch.Tensor
    assert torch.equal(pickle.loads(pickle.dumps(view)), WHOLE.t())
    assert [type(part) for part in shares(WHOLE)[0].chunk(2)] == [WeightView, WeightView]
    out = torch.empty(7, 5)
    assert torch.equal(out.copy_(shares(WHOLE)[0]), WHOLE)


def test_copies_of_a_model_are_in_shares() -> None:
    weight = nn.Parameter(shares(WHOLE)[2], requires_grad=False)
    other = copy.deepcopy(weight)
    assert isinstance(other, nn.Parameter) and not other.requires_grad
    assert isinstance(other, ShardedWeight) and other.shard.data_ptr() != weight.shard.data_ptr()  # type: ignore[attr-defined]
    half = weight.to(torch.bfloat16)
    assert isinstance(half, ShardedWeight) and half.shard.dtype == torch.bfloat16
    assert torch.equal(half.shard, WHOLE[5:].bfloat16()) and half.history.mark != weight.history.mark  # type: ignore[attr-defined]


def test_it_is_not_saved_by_a_rank_alone() -> None:
    with pytest.raises(WeightsError, match=r"2 of its 7 rows.*value.whole\(\)"):
        pickle.dumps(shares(WHOLE)[2])


@pytest.mark.parametrize("name", ["data_ptr", "numpy", "tolist"])
def test_it_has_no_memory_of_its_own(name: str) -> None:
    """To read address zero would end the process."""
    weight = shares(WHOLE)[2]
    with pytest.raises(WeightsError, match=rf"{name}\(\) of a sharded weight \[7, 5\].*weight.whole\(\)"):
        getattr(weight, name)()
    assert weight.t().numpy().tolist() == weight.t().tolist() == WHOLE.t().tolist()


def test_who_reaches_past_it_gets_words_too() -> None:
    weight = nn.Parameter(shares(WHOLE)[2], requires_grad=False)
    for reach in (
        lambda: weight.untyped_storage().copy_(torch.UntypedStorage(140)),
        lambda: weight.detach().untyped_storage().resize_(8),
        lambda: torch.Tensor.untyped_storage(weight)[0],
        lambda: weight.share_memory_(),
    ):
        with pytest.raises(WeightsError, match=r"of a sharded weight \[7, 5\].*weight.whole\(\)"):
            reach()
    view = weight.t()
    with pytest.raises(WeightsError, match=r"of a view \[5, 7\] of a sharded weight.*view.clone\(\)"):
        view.untyped_storage().fill_(0)
    with pytest.raises(ValueError, match="read-only"):
        view.numpy()[0] = 1.0
    assert torch.equal(weight.whole(), WHOLE)


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (torch.zeros(256, 256), ""),
        (torch.zeros(2, 1 << 16), "fewer rows"),
        (torch.zeros(256, 256).t(), "another order"),
        (torch.zeros(256, 128).t(), "another order"),
        (torch.zeros(8, 8), "below"),
        (torch.zeros(512, 256)[:256], "other tensors"),
    ],
)
def test_what_stays_whole(weight: torch.Tensor, text: str) -> None:
    why = why_whole(weight, RANKS)
    assert text in why if text else why == ""
