"""Weights in shares come together: exact on every rank, each row once over the network where machines are alike."""

from __future__ import annotations

import pytest
import torch
from threads import run_threads

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.weight_gather import build_weight_gather
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.weight_rows import WeightRows, places_of
from sfcompile.runtime.rank.session import current_session

sf = torch.ops.streamfusion
FLAT, TWICE, INSIDE = "all ranks", "machines first", "each machine holds all"


@pytest.mark.parametrize(
    ("machine_of", "rows", "stages"),
    [
        ((0, 1), 6, FLAT),
        ((0, 1), 7, FLAT),
        ((0, 0), 8, FLAT),
        ((0, 0, 1, 1), 8, TWICE),
        ((0, 0, 1, 1), 9, FLAT),
        ((1, 0, 1, 0, 1, 0), 12, TWICE),
        ((0, 0, 1), 9, FLAT),
        ((0, 0, 1, 1), 7, INSIDE),
        ((1, 0, 1, 0, 1, 0), 12, INSIDE),
    ],
)
def test_every_rank_gets_all(machine_of: tuple[int, ...], rows: int, stages: str) -> None:
    cut, whole = WeightRows((rows, 5), places_of(machine_of, stages == INSIDE)), torch.randn(rows, 5)
    schedules = build_weight_gather("w", cut, torch.float32, machine_of)
    assert len(schedules) == (2 if stages == TWICE else 1)
    for schedule in schedules:
        check(schedule)
    across = sum(schedule.bytes_by_link(Topology(machine_of))[1] for schedule in schedules)
    machines = len(set(machine_of))
    if stages == INSIDE:
        assert across == 0
    elif stages == TWICE:  # what a machine lacks comes to it once
        assert across == (machines - 1) * whole.numel() * 4

    def work(rank: int) -> bool:
        current_session().load("w", schedules)
        start, stop = cut.rows(rank)
        for _ in range(3):
            value, ticket = whole[start:stop].clone(), torch.zeros(1, dtype=torch.int64)
            for site, schedule in enumerate(schedules):
                shape = list(schedule.site.wanted_shape(schedule.members(rank)[0]))  # type: ignore[union-attr]
                ticket = sf.exchange_start(value, ticket, "w", site)
                value, ticket = sf.exchange_finish(ticket, "w", site, shape, torch.float32)
        return torch.equal(value, whole)

    assert all(run_threads(len(machine_of), work, machine_of))
