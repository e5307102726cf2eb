"""Reshard: every rank gets the part it wants, from those who hold it, and nobody else is talked to."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from random_sites import cut, even, rows
from threads import run_threads

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.reshard import build_reshard
from sfcompile.errors import ScheduleError
from sfcompile.runtime.program.sites import ReshardSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import current_session

sf = torch.ops.streamfusion


def halo_site(ranks: int, tokens: int = 12, reach: int = 1) -> ReshardSite:
    owned = even(tokens, ranks)
    wanted = []
    for ((first, length),) in owned:
        low, high = max(0, first - reach), min(tokens, first + length + reach)
        wanted.append(((low, high - low),))
    return ReshardSite("halo", (2, tokens, 3), torch.float32, 1, owned, 1, tuple(wanted))


def random_site(seed: int, ranks: int) -> ReshardSite:
    rng = random.Random(seed)
    a, b = rng.randint(1, 13), rng.randint(1, 9)
    into = rng.choice([1, 2])
    wanted = cut(a if into == 1 else b, ranks, rng)
    if into == 1 and rng.random() < 0.5:  # parts that several ranks want
        wanted = tuple(((0, rng.randint(0, a)),) for _ in range(ranks))
    return ReshardSite("move", (2, a, b), torch.float32, 1, cut(a, ranks, rng), into, wanted)


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_a_halo_talks_to_neighbours_only(ranks: int) -> None:
    schedule = build_reshard(halo_site(ranks, 3 * ranks), Mesh.of(Topology.grid(1, ranks), 1, ranks))
    assert {arrival.src for arrival in schedule.program(0).arrivals} == {1 % ranks, ranks - 1}
    check(schedule)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_gets_what_it_wants(seed: int, ranks: int) -> None:
    site = random_site(seed, ranks)
    schedule = build_reshard(site, Mesh.of(Topology.grid(1, ranks), 1, ranks))
    check(schedule)
    whole = torch.randn(site.shape)

    def work(rank: int) -> bool:
        current_session().load("r", [schedule])
        own = whole.index_select(site.dim, rows(site.owned[rank]))
        for _ in range(3):
            ticket = sf.gather_start(own, torch.zeros(1, dtype=torch.int64), "r", 0)
            out = sf.gather_finish(ticket, "r", 0, list(site.wanted_shape(rank)), torch.float32)[0]
        return torch.equal(out, whole.index_select(site.into, rows(site.wanted[rank])))

    assert all(run_threads(ranks, work))


def test_what_nobody_sends_is_missed_by_the_checker() -> None:
    schedule = build_reshard(halo_site(4), Mesh.of(Topology.grid(1, 4), 1, 4))
    wider = replace(schedule, site=halo_site(4, reach=4))
    with pytest.raises(ScheduleError, match="wants 7 positions of halo"):
        check(
            replace(
                wider, slots=tuple(replace(slot, nbytes=1 << 20, offset=i << 20) for i, slot in enumerate(wider.slots))
            )
        )
    twice = replace(halo_site(4), owned=(((0, 6),), ((3, 3),), ((6, 3),), ((9, 3),)))
    with pytest.raises(ScheduleError, match="wants"):
        check(build_reshard(twice, Mesh.of(Topology.grid(1, 4), 1, 4)))
