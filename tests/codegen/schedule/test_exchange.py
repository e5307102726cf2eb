"""Exchanges: every rank gets what it wants from those who hold it, and nobody else is talked to."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from random_sites import cut, even, gather_site, rows
from threads import run_threads

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.errors import ScheduleError
from sfcompile.runtime.program.instructions import Put, Wait
from sfcompile.runtime.program.sites import ExchangeSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import current_session

sf = torch.ops.streamfusion


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_shard_goes_everywhere(ranks: int) -> None:
    schedule = build_exchange(gather_site(ranks), Mesh.of(Topology.grid(1, ranks), 1, ranks))
    for rank in range(ranks):
        phases = schedule.program(rank).phases
        assert {step.dst for step in phases["exchange_start"] if isinstance(step, Put)} == set(range(ranks)) - {rank}
        assert {step.src for step in phases["exchange_finish"] if isinstance(step, Wait)} == set(range(ranks)) - {rank}


def test_no_rank_receives_from_two_at_a_stage() -> None:
    schedule = build_exchange(gather_site(5), Mesh.of(Topology.grid(1, 5), 1, 5))
    for stage in range(4):
        targets = [schedule.program(rank).phases["exchange_start"][stage].dst for rank in range(5)]  # type: ignore[union-attr]
        assert sorted(targets) == list(range(5))


def test_shards_may_be_uneven() -> None:
    schedule = build_exchange(gather_site(3, tokens=10), Mesh.of(Topology.grid(1, 3), 1, 3))
    arrivals = schedule.program(0).arrivals
    assert {arrival.src: schedule.shape(0, arrival) for arrival in arrivals} == {1: (2, 3, 3), 2: (2, 4, 3)}
    assert {slot.nbytes for slot in schedule.slots} == {2 * 4 * 3 * 4}


def halo_site(ranks: int, tokens: int = 12, reach: int = 1) -> ExchangeSite:
    owned = even(tokens, ranks)
    wanted = []
    for ((first, length),) in owned:
        low, high = max(0, first - reach), min(tokens, first + length + reach)
        wanted.append(((low, high - low),))
    return ExchangeSite("halo", (2, tokens, 3), torch.float32, 1, 1, 1, owned, 1, tuple(wanted))


def random_site(seed: int, ranks: int) -> ExchangeSite:
    rng = random.Random(seed)
    a, b = rng.randint(1, 13), rng.randint(1, 9)
    into = rng.choice([1, 2])
    wanted = cut(a if into == 1 else b, ranks, rng)
    if into == 1 and rng.random() < 0.5:  # parts that several ranks want
        wanted = tuple(((0, rng.randint(0, a)),) for _ in range(ranks))
    return ExchangeSite("move", (2, a, b), torch.float32, 1, 1, 1, cut(a, ranks, rng), into, wanted)


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_a_halo_talks_to_neighbours_only(ranks: int) -> None:
    schedule = build_exchange(halo_site(ranks, 3 * ranks), Mesh.of(Topology.grid(1, ranks), 1, ranks))
    assert {arrival.src for arrival in schedule.program(0).arrivals} == {1 % ranks, ranks - 1}
    check(schedule)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_gets_what_it_wants(seed: int, ranks: int) -> None:
    site = random_site(seed, ranks)
    schedule = build_exchange(site, Mesh.of(Topology.grid(1, ranks), 1, ranks))
    check(schedule)
    whole = torch.randn(site.shape)

    def work(rank: int) -> bool:
        current_session().load("r", [schedule])
        own = whole.index_select(site.dim, rows(site.owned[rank]))
        for _ in range(3):
            ticket = sf.exchange_start(own, torch.zeros(1, dtype=torch.int64), "r", 0)
            out = sf.exchange_finish(ticket, "r", 0, list(site.wanted_shape(rank)), torch.float32)[0]
        return torch.equal(out, whole.index_select(site.into, rows(site.wanted[rank])))

    assert all(run_threads(ranks, work))


def test_what_nobody_sends_is_missed_by_the_checker() -> None:
    schedule = build_exchange(halo_site(4), Mesh.of(Topology.grid(1, 4), 1, 4))
    wider = replace(schedule, site=halo_site(4, reach=4))
    with pytest.raises(ScheduleError, match="wants 7 positions of halo"):
        check(
            replace(
                wider, slots=tuple(replace(slot, nbytes=1 << 20, offset=i << 20) for i, slot in enumerate(wider.slots))
            )
        )
    twice = replace(halo_site(4), owned=(((0, 6),), ((3, 3),), ((6, 3),), ((9, 3),)))
    with pytest.raises(ScheduleError, match="wants"):
        check(build_exchange(twice, Mesh.of(Topology.grid(1, 4), 1, 4)))
