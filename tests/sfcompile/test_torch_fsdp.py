"""What fully_shard was asked for is read, and it comes off whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from sfcompile.torch_fsdp import fully_shard_asks, leave_fully_shard


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """As rank 0 of two, of which the other one does not exist."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_a_plain_model_has_nothing_to_leave() -> None:
    assert fully_shard_asks(nn.Linear(4, 4)) == "" and leave_fully_shard(nn.Linear(4, 4)) == 0


def test_it_comes_off_whole_and_parameters_stay_cut(two_ranks: None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mesh = dist.init_device_mesh("cpu", (2,))
    for module in (model[0], model):
        fully_shard(module, mesh=mesh)
    assert fully_shard_asks(model) == ""
    assert leave_fully_shard(model) == 2
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    assert {type(value).__name__ for value in model.parameters()} == {"DTensor"}
    assert not model._forward_pre_hooks and not model[0]._forward_hooks


def test_what_would_be_lost_is_named(two_ranks: None) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = fully_shard(nn.Linear(4, 4), mesh=dist.init_device_mesh("cpu", (2,)), mp_policy=policy)
    assert "mp_policy" in fully_shard_asks(model)
