"""What of a model is cut into shares, and what is refused. Between ranks: tests/e2e/test_sharded_weights.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from threads import run_threads
from torch import nn

from sfcompile.errors import OptionError, RankMismatchError, UnsupportedError
from sfcompile.options import Options
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.weight_rows import WeightRows, places_of
from sfcompile.runtime.rank.session import current_session
from sfcompile.runtime.rank.sharded_weight import History, ShardedWeight
from sfcompile.sharded_weights import (
    _PIECE,
    _agree,
    cuts_weights,
    gather_of,
    put_weight,
    refuse_shares,
    shard_weights,
    shares_of,
    standing_weights,
)

ASKED, TWO = Options(weights="sharded"), Topology.grid(2, 1)


def nobody(weight: ShardedWeight) -> torch.Tensor:
    raise AssertionError("it is not read")


def sharded(shape: tuple[int, ...], topology: Topology) -> Any:
    cut = WeightRows(shape, places_of(topology.machine_of))
    return nn.Parameter(ShardedWeight(torch.zeros(cut.local_shape(0)), cut, 0, History(nobody, 0)), requires_grad=False)


def test_shares_are_for_several_machines() -> None:
    assert cuts_weights(ASKED, TWO) and not cuts_weights(ASKED, Topology.grid(1, 2))
    assert not cuts_weights(Options(weights="sharded-by-machine"), TWO) and not cuts_weights(Options(), TWO)


def test_which_inputs_are_in_shares() -> None:
    small, large = nn.Parameter(torch.ones(4, 4)), torch.ones(512, 512)
    assert shares_of([small, sharded((8, 4), TWO), large, 3], (), TWO, ASKED) == (1,)
    with pytest.raises(UnsupportedError, match="in 2 shares, and 4 ranks"):
        shares_of([sharded((8, 4), TWO)], (), Topology.grid(2, 2), ASKED)
    with pytest.raises(UnsupportedError, match="writes to a sharded weight"):
        shares_of([small, sharded((8, 4), TWO)], (1,), TWO, ASKED)


def test_a_model_that_was_loaded_whole_is_refused() -> None:
    whole = nn.Parameter(torch.ones(512, 512))
    with pytest.raises(OptionError, match=r"1 large weights \(1.0 MiB\) are whole.*sfcompile.shard_weights"):
        shares_of([whole], (), TWO, ASKED)
    assert shares_of([whole], (), TWO, Options(weights="sharded-by-machine")) == ()
    assert shares_of([nn.Parameter(torch.ones(1, 1 << 18))], (), TWO, ASKED) == ()  # it cannot be cut


def test_tied_weights_stay_one() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    ((old, places),) = standing_weights(model)
    assert len(places) == 2
    cut = WeightRows((8, 8), (0, 1))
    put_weight(places, old.detach()[:4].clone(), cut, 0, History(nobody, 0), True)
    assert model[0].weight is model[1].weight and isinstance(model[0].weight, ShardedWeight)
    assert model[0].weight.requires_grad
    with pytest.raises(UnsupportedError, match=r"1 weights of the model lie in shares .*0.weight"):
        refuse_shares(model)


def test_one_rank_keeps_all() -> None:
    model = nn.Linear(512, 512)
    weight = model.weight
    assert shard_weights(model) is model and model.weight is weight


@pytest.mark.parametrize("rows", [3, 700])
def test_a_weight_is_gathered_in_pieces(rows: int) -> None:
    """Larger than a piece, and rows of unequal numbers."""
    columns = 2 * _PIECE // 4 // 256 + 3
    whole = torch.randn(rows, columns if rows > 3 else 5)
    cut = WeightRows(tuple(whole.shape), places_of((0, 1, 2)))

    def work(rank: int) -> bool:
        shard = whole[slice(*cut.rows(rank))].clone()
        weight = ShardedWeight(shard, cut, rank, History(gather_of(current_session()), 0))
        return all(torch.equal(weight.whole(), whole) for _ in range(2))

    assert all(run_threads(3, work, (0, 1, 2)))


def test_ranks_with_other_weights_hear_of_it() -> None:
    def work(rank: int) -> str:
        weight = torch.ones(300, 300)
        weight[7, 7] += rank == 2
        with pytest.raises(RankMismatchError, match="weights differ between rank 0 and rank 2") as caught:
            _agree(current_session(), [weight])
        return str(caught.value.on_every_rank)

    assert run_threads(3, work) == ["True"] * 3
