"""Look-ups, resampling on shards."""

from __future__ import annotations

import torch
from helpers import check_sharded
from hypothesis import given
from random_ops import few, rand, ranks, tokens
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
