"""Look-ups and writes by index on shards."""

from __future__ import annotations

import pytest
import torch
from helpers import check_sharded
from hypothesis import given
from random_ops import Fn, few, rand, ranks, tokens
from torch.nn import functional as F


@few
@given(tokens, ranks)
def test_look_ups(n: int, p: int) -> None:
    index = torch.randint(0, 5, (2, n))
    check_sharded(lambda i, w: F.embedding(i, w), [index, rand(5, 3)], (0, 1), ranks=p, exact=True)
    check_sharded(lambda i, w: w[i], [index, rand(5, 3)], (0, 1), ranks=p, exact=True)
    check_sharded(lambda i, w: w.index_select(0, i), [index[0], rand(5, 3)], (0, 0), ranks=p, exact=True)
    check_sharded(lambda i: F.one_hot(i, 5).float(), [index], (0, 1), ranks=p, exact=True)
    x, pick = rand(2, n, 6), torch.randint(0, 6, (2, n, 3))
    check_sharded(lambda x, i: x.gather(2, i), [x, pick], (0, 1), ranks=p, exact=True)
    check_sharded(lambda x, i: x[:, :, i], [x, pick[0, 0]], (0, 1), ranks=p, exact=True)


def test_an_index_narrower_than_its_source_is_not_cut_on_one_side() -> None:
    x, pick = rand(2, 7, 6), torch.randint(0, 6, (2, 5, 3))
    check_sharded(lambda x, i: (x * 2).gather(2, i), [x, pick], (0, 1), whole=["gather"])


WRITES: dict[str, Fn] = {
    "select": lambda x, y: x.select_scatter(y[..., 0], 2, 1),
    "slice": lambda x, y: x.slice_scatter(y[..., :2], 2, 1, 5, 2),
    "scatter": lambda x, y: x.scatter(2, torch.zeros_like(x).long(), y),
    "scatter_number": lambda x, y: x.scatter(-1, (y > 0).long(), 2.0),
    "scatter_add": lambda x, y: x.scatter_add(2, (y > 0).long(), y),
    "scatter_reduce": lambda x, y: x.scatter_reduce(2, (y > 0).long(), y, "amax"),
    "index_add": lambda x, y: x.index_add(2, torch.tensor([0, 3, 0, 1, 2, 2]), y, alpha=2),
    "index_copy": lambda x, y: x.index_copy(2, torch.tensor([0, 3, 5, 1, 2, 4]), y),
    "index_fill": lambda x, y: x.index_fill(2, torch.tensor([0, 3]), 7.0),
    "mask_number": lambda x, y: x.index_put([x > 0], torch.tensor(3.0)),
    "mask_row": lambda x, y: x.index_put([x[..., 0] > 0], rand(1, 6)),
    "mask_rows_of_one": lambda x, y: x.index_put([x[..., 0] > 0], rand(6)),
}


@pytest.mark.parametrize("name", WRITES)
@few
@given(tokens, ranks)
def test_writes_beside_the_tokens(name: str, n: int, p: int) -> None:
    check_sharded(lambda x, y: WRITES[name](x * 2, y * 3) + 1, [rand(2, n, 6), rand(2, n, 6) + 1], (0, 1), (1, 1),
                  ranks=p, exact=True)  # fmt: skip


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (lambda x, y: x.scatter(1, torch.zeros(2, 7, 6).long(), y), "scatter"),
        (lambda x, y: x.scatter(2, torch.zeros(2, 3, 6).long(), y), "scatter"),
        (lambda x, y: x.index_add(1, torch.arange(7), y), "index_add"),
        (lambda x, y: x.index_put([torch.arange(2)], y), "index_put"),
    ],
)
def test_writes_across_tokens_are_computed_whole(fn: Fn, name: str) -> None:
    check_sharded(lambda x, y: fn(x * 2, y * 2), [rand(2, 7, 6), rand(2, 7, 6)], (0, 1), (1, 1), whole=[name])
