"""Values that cross a graph break in shards: one site, no gather, and the same values for whoever reads them."""

from __future__ import annotations

import boundary_cases
import pytest
import torch
from fake_device import POLICIES, Gpu
from fake_ranks import on_fake_gpus
from processes import preload, run_processes

from sfcompile.boundary import Boundary, gather_of
from sfcompile.errors import OptionError
from sfcompile.options import Options
from sfcompile.runtime.program.value_rows import ValueRows
from sfcompile.runtime.rank.session import current_session

preload("boundary_cases", "model_cases", "sfcompile.backend")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("case", "homes"),
    [
        ("split", [0, 0]),
        ("read", [0, 1]),
        ("another_write", [0, 0]),
        ("one_memory", [0, 1]),
        ("uneven", [0, 0, 1]),
        ("returned", [0, 0]),
        ("written_through_a_view", [0, 0]),
    ],
)
def test_values_cross_a_break(case: str, homes: list[int]) -> None:
    run_processes(len(homes), boundary_cases.run, (case,), homes, timeout_s=120.0)


@pytest.mark.parametrize("stores", [False, True])
def test_gpu_ranks_gather_what_is_read(monkeypatch: pytest.MonkeyPatch, stores: bool) -> None:
    """On streams that run in any order, over NCCL or peers' stores: what is read is whole, whoever wrote last."""
    cut = ValueRows((2, 7, 3), 1, (((0, 2), (6, 1)), ((2, 4),)))
    wholes = [torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def work(rank: int, gpu: Gpu) -> float:
        off, session = 0.0, current_session()
        left = Boundary(outputs={0: cut}, gather=gather_of(session, Options()))
        for number, whole in enumerate(wholes):
            rows = torch.cat([whole[:, first : first + n] for first, n in cut.owned[rank]], 1)
            (value,) = left.leave([rows], rank, f"call {number}")
            read = value.whole() * 2
            gpu.synchronize()
            off = max(off, float((read - 2 * whole).abs().max()))
        return off

    for seed, policy in enumerate(POLICIES):
        assert on_fake_gpus(monkeypatch, (0, 0), work, seed, policy, stores=stores) == 0.0


def test_shards_are_alike_for_dynamo_whatever_they_are_views_of() -> None:
    """Of one sample the stride between samples says nothing, and a guard on it would compile the next graph twice."""
    cut = ValueRows((1, 6, 3), 1, (((0, 4),), ((4, 2),)))
    left = Boundary(outputs={0: cut}, gather=lambda value: value.shard)
    (value,) = left.leave([torch.zeros(1, 9, 3)[:, 2:6]], 0, "call")
    assert value.shard.stride() == (12, 3, 1) and value.stride() == (18, 3, 1)


def test_the_option_is_checked() -> None:
    assert Options.from_dict({}).boundaries == "whole"
    with pytest.raises(OptionError, match="'whole', 'shards', 'regions'"):
        Options.from_dict({"boundaries": "half"})
    with pytest.raises(OptionError, match="together with inputs='rank0'"):
        Options.from_dict({"boundaries": "shards", "inputs": "rank0"})
