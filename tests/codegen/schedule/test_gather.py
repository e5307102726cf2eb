"""All-gather: everyone gets everyone's shard once, in a rotation."""

from __future__ import annotations

import pytest
from random_sites import gather_site

from sfcompile.codegen.schedule.gather import build_gather
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.runtime.program.instructions import Put, Wait
from sfcompile.runtime.program.topology import Topology


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_shard_goes_everywhere(ranks: int) -> None:
    schedule = build_gather(gather_site(ranks), Mesh.of(Topology.grid(1, ranks), 1, ranks))
    for rank in range(ranks):
        phases = schedule.program(rank).phases
        assert {step.dst for step in phases["gather_start"] if isinstance(step, Put)} == set(range(ranks)) - {rank}
        assert {step.src for step in phases["gather_finish"] if isinstance(step, Wait)} == set(range(ranks)) - {rank}


def test_no_rank_receives_from_two_at_a_stage() -> None:
    schedule = build_gather(gather_site(5), Mesh.of(Topology.grid(1, 5), 1, 5))
    for stage in range(4):
        targets = [schedule.program(rank).phases["gather_start"][stage].dst for rank in range(5)]  # type: ignore[union-attr]
        assert sorted(targets) == list(range(5))


def test_shards_may_be_uneven() -> None:
    schedule = build_gather(gather_site(3, tokens=10), Mesh.of(Topology.grid(1, 3), 1, 3))
    arrivals = schedule.program(0).arrivals
    assert {arrival.src: schedule.shape(0, arrival) for arrival in arrivals} == {1: (2, 3, 3), 2: (2, 4, 3)}
    assert {slot.nbytes for slot in schedule.slots} == {2 * 4 * 3 * 4}
