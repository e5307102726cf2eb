"""A graph takes the shard of what comes in shards if it reads nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import captured

from sfcompile.lowering.arrivals import take_shards, takes_shard
from sfcompile.runtime.program.value_rows import ValueRows

CUT = ValueRows((8, 6), 0, (((0, 2), (6, 1)), ((2, 4), (7, 1))))
X = torch.arange(48.0).view(8, 6)

Model = Callable[[torch.Tensor], torch.Tensor]
TAKEN: list[Model] = [
    lambda x: torch.cat([x[2:6], x[7:8]]) * 2,
    lambda x: x[3:5].t().contiguous().view(-1) + x[7:8].sum(),
    lambda x: x[2:6].reshape(2, 12).transpose(0, 1).exp(),
]
NOT_TAKEN: list[Model] = [lambda x: x.sum(0), lambda x: x[1:3] * 2, lambda x: x[:, 2:6] + 1, lambda x: x[2:6:2] + 1]


@pytest.mark.parametrize("model", TAKEN)
def test_slices_of_the_shard_are_those_of_the_whole(model: Model) -> None:
    got = captured(model, X)
    assert takes_shard(got.gm, 0, CUT, 1)
    gm = take_shards(got.gm, got.mode, {0: CUT}, 1)
    shard = torch.cat([X[first : first + n] for first, n in CUT.owned[1]])
    (result,) = gm(shard)
    assert torch.equal(result, model(X))
    for node in gm.graph.nodes:  # what Inductor is told is what comes
        if node.op == "call_function" and node.name in {user.name for user in node.graph.nodes}:
            assert isinstance(node.meta["val"], torch.Tensor)
    assert tuple(next(iter(gm.graph.nodes)).meta["val"].shape) == (5, 6)


@pytest.mark.parametrize("model", NOT_TAKEN)
def test_what_is_read_whole_or_elsewhere_is_not_taken(model: Model) -> None:
    assert not takes_shard(captured(model, X).gm, 0, CUT, 1)


def test_a_rank_that_holds_everything_takes_it() -> None:
    alone = ValueRows((8, 6), 0, (((0, 8),), ()))
    got = captured(NOT_TAKEN[0], X)
    assert takes_shard(got.gm, 0, alone, 0)
    assert torch.equal(take_shards(got.gm, got.mode, {0: alone}, 0)(X)[0], X.sum(0))
