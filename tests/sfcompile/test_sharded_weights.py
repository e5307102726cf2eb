"""What of a model is cut into shares, and what is refused. Between ranks: tests/e2e/test_sharded_weights.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import POLICIES, Gpu
from fake_ranks import largest, on_fake_gpus
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
    bring,
    cut_of,
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


def test_shares_are_for_ranks_that_share_no_memory() -> None:
    def session(topology: Topology, on_gpu: bool) -> Any:
        return SimpleNamespace(topology=topology, side=SimpleNamespace(on_gpu=on_gpu))

    one = Topology.grid(1, 2)
    assert cuts_weights(ASKED, session(TWO, False)) and not cuts_weights(ASKED, session(one, False))
    assert cuts_weights(ASKED, session(one, True))
    assert not cuts_weights(Options(), session(TWO, False)) and not cuts_weights(Options(), session(one, True))
    machines, four = Options(weights="sharded-by-machine"), Topology.grid(2, 2)
    assert not cuts_weights(machines, session(four, False)) and cuts_weights(machines, session(four, True))
    assert not cuts_weights(machines, session(TWO, True))  # a machine's only GPU has to hold all
    assert cut_of(machines, session(four, True)) == (0, 1, 0, 1)
    assert cut_of(machines, session(four, False)) == cut_of(ASKED, session(four, True)) == (0, 2, 1, 3)


def test_which_inputs_are_in_shares() -> None:
    small, large = nn.Parameter(torch.ones(4, 4)), torch.ones(512, 512)
    assert shares_of([small, sharded((8, 4), TWO), large, 3], (), (0, 1), True) == (1,)
    with pytest.raises(UnsupportedError, match="in 2 shares on 2 ranks, and 4 ranks compute the model with 4"):
        shares_of([sharded((8, 4), TWO)], (), (0, 2, 1, 3), True)
    with pytest.raises(UnsupportedError, match="writes to a sharded weight"):
        shares_of([small, sharded((8, 4), TWO)], (1,), (0, 1), True)


def test_a_model_that_was_loaded_whole_is_refused() -> None:
    whole = nn.Parameter(torch.ones(512, 512))
    with pytest.raises(OptionError, match=r"1 large weights \(1.0 MiB\) are whole.*sfcompile.shard_weights"):
        shares_of([whole], (), (0, 1), True)
    assert shares_of([whole], (), (0, 1), False) == ()
    assert shares_of([nn.Parameter(torch.ones(1, 1 << 18))], (), (0, 1), True) == ()  # it cannot be cut


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


def test_a_module_that_keeps_a_list_of_its_weights_hears_of_it() -> None:
    model = nn.LSTM(8, 8, bias=False)
    for old, places in standing_weights(model):
        put_weight(places, old.detach()[:16].clone(), WeightRows((32, 8), (0, 1)), 0, History(nobody, 0), False)
    assert all(isinstance(weight, ShardedWeight) for weight in model._flat_weights)


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
        weight = ShardedWeight(shard, cut, rank, History(gather_of(current_session(), ASKED), 0))
        return all(torch.equal(weight.whole(), whole) for _ in range(2))

    assert all(run_threads(3, work, (0, 1, 2)))


@pytest.mark.parametrize("stores", [False, True])
def test_gpu_ranks_gather_what_is_read(monkeypatch: pytest.MonkeyPatch, stores: bool) -> None:
    """On streams that run in any order, over NCCL or peers' stores, of a weight that is written to meanwhile."""
    cut = WeightRows((5, _PIECE // 8), (0, 1))
    whole = torch.arange(float(5 * _PIECE // 8)).view(cut.shape)

    def work(rank: int, gpu: Gpu) -> float:
        shard = whole[slice(*cut.rows(rank))].clone()
        weight = ShardedWeight(shard, cut, rank, History(gather_of(current_session(), ASKED), 0))
        reads = []
        for _ in range(2):
            reads.append(weight.whole())
            weight.shard.add_(1.0)
        gpu.synchronize()
        return largest(float((read - whole - i).abs().max()) for i, read in enumerate(reads))

    for seed, policy in enumerate(POLICIES):
        assert on_fake_gpus(monkeypatch, (0, 0), work, seed, policy, stores=stores) == 0.0


def test_all_of_a_model_goes_where_it_computes() -> None:
    """Here to the meta device, the only other one: what has values stays a weight in shares, or itself."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = model[0].weight
    bring(model, torch.device("cpu"))
    assert model[0].weight is before
    bring(model, torch.device("meta"))
    assert all(value.is_meta for value in (*model.parameters(), *model.buffers()))
    twins = nn.ModuleList([nn.Module(), nn.Module()])
    for twin, table in zip(twins, [torch.ones(3)] * 2, strict=True):
        twin.register_buffer("table", table)
    bring(twins, torch.device("meta"))
    assert twins[0].table is twins[1].table


def test_ranks_with_other_weights_hear_of_it() -> None:
    def work(rank: int) -> str:
        weight = torch.ones(300, 300)
        weight[7, 7] += rank == 2
        with pytest.raises(RankMismatchError, match="weights differ between rank 0 and rank 2") as caught:
            _agree(current_session(), [weight])
        return str(caught.value.on_every_rank)

    assert run_threads(3, work) == ["True"] * 3
