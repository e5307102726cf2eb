"""No bound is above the price: what is turned down unsimulated could not have been among the best."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_sites import attention_site

from sfcompile.codegen.plan.bounds import bounds, more_waits
from sfcompile.codegen.plan.choose_plan import candidates
from sfcompile.codegen.plan.step import price
from sfcompile.options import AS_IT_IS, Wire
from sfcompile.runtime.program.topology import Topology


@pytest.mark.parametrize("shape", ["1x4", "2x2", "3x2", "4x1:a100-efa", "4x4:a100-paper", "2x4:a10-ethernet"])
@pytest.mark.parametrize("cut", [(1, 1), (1, 2), (3, 2)])
def test_no_bound_is_above_its_price(shape: str, cut: tuple[int, int]) -> None:
    topology = Topology.parse(shape)
    here = replace(attention_site(topology.num_ranks, 6, 1021, 64), kv_heads=2, dtype=torch.bfloat16)
    fp8 = Wire(*["fp8"] * 4)
    for causal, wire in ((False, AS_IT_IS), (True, AS_IT_IS), (False, fp8)):
        for candidate in candidates(topology):
            if candidate.kind != "allgather" and candidate.ulysses > 6:
                continue
            whole = candidate.schedule(replace(here, causal=causal, wire=wire), topology)
            q_parts, kv_parts = cut if candidate.kind != "allgather" else (1, cut[1])
            parted = replace(candidate, q_parts=q_parts, kv_parts=kv_parts).schedule(whole.site, topology)
            seconds = price(parted, topology, 0.0).seconds
            assert bounds(parted, topology).least_s <= seconds * (1 + 1e-9), str(candidate)
            before_it_is_built = bounds(whole, topology).work_s
            before_it_is_built += more_waits(whole, q_parts, kv_parts) * topology.wait_s
            assert before_it_is_built <= seconds * (1 + 1e-9), str(candidate)


def test_where_messages_are_small_the_work_is_the_closer_bound() -> None:
    """A ring of many ranks with few tokens each: waits and calls, hardly any bytes."""
    topology = Topology.parse("4x8:a100-efa")
    here = replace(attention_site(32, 8, 512, 64), dtype=torch.bfloat16)
    ring = next(c for c in candidates(topology) if c.kind == "ring").schedule(here, topology)
    found = bounds(ring, topology)
    assert found.work_s > 3 * found.traffic_s
    assert found.work_s > 0.5 * price(ring, topology, 0.0).seconds
