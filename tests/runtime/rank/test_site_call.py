"""What the runtime reads of a schedule is what codegen's schedules have."""

from __future__ import annotations

import pytest
from random_sites import gather_site, random_case
from rank_workers import schedules_of

from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.site_call import AttentionSiteSchedule, SiteSchedule, is_attention

GATHER = build_exchange(gather_site(2), Mesh.of(Topology.grid(1, 2), 1, 2))
ATTENTION = schedules_of(random_case(3, ranks=2))[0]


def public(protocol: type) -> set[str]:
    kinds = [kind for kind in protocol.__mro__ if kind.__module__ == protocol.__module__]
    return {name for kind in kinds for name in vars(kind) if not name.startswith("_")}


@pytest.mark.parametrize("schedule", [GATHER, ATTENTION], ids=["exchange", "attention"])
def test_schedules_have_what_is_read(schedule: Schedule) -> None:
    attends = schedule is ATTENTION
    assert is_attention(schedule) == attends
    assert {"site", "slots", "heap_bytes", "members", "program", "shape", "form"} == public(SiteSchedule)
    for name in public(AttentionSiteSchedule if attends else SiteSchedule):
        assert hasattr(schedule, name), name
    assert (hasattr(schedule, "kv_heads") or hasattr(schedule, "positions")) == attends
