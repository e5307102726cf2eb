"""What the runtime reads of a schedule is what codegen's schedules have."""

from __future__ import annotations

import pytest
import torch
from random_sites import gather_site, random_case
from rank_workers import schedules_of

from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.weight_gather import build_assembled
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.weight_rows import WeightRows
from sfcompile.runtime.rank.site_call import (
    AssembledSchedule,
    AttentionSiteSchedule,
    SiteSchedule,
    is_assembled,
    is_attention,
)

GATHER = build_exchange(gather_site(2), Mesh.of(Topology.grid(1, 2), 1, 2))
ATTENTION = schedules_of(random_case(3, ranks=2))[0]
WEIGHTS = build_assembled("w", [WeightRows((6, 4), (0, 1))], torch.float32, (0, 1))
READ = {
    "exchange": (GATHER, SiteSchedule),
    "attention": (ATTENTION, AttentionSiteSchedule),
    "weights": (WEIGHTS, AssembledSchedule),
}
"""By kind a schedule and what is read of it."""


def public(protocol: type) -> set[str]:
    kinds = [kind for kind in protocol.__mro__ if kind.__module__ == protocol.__module__]
    return {name for kind in kinds for name in vars(kind) if not name.startswith("_")}


@pytest.mark.parametrize("kind", READ)
def test_schedules_have_what_is_read(kind: str) -> None:
    schedule, protocol = READ[kind]
    assert (is_attention(schedule), is_assembled(schedule)) == (kind == "attention", kind == "weights")
    of_all = {"site", "slots", "heap_bytes", "members", "program", "shape", "form", "assembled", "parts", "place"}
    assert of_all == public(SiteSchedule)
    for name in public(protocol):
        assert hasattr(schedule, name), name
    assert (hasattr(schedule, "kv_heads") or hasattr(schedule, "positions")) == (kind == "attention")
    assert (hasattr(schedule, "own_place") or hasattr(schedule, "whole")) == (kind == "weights")
