"""Weights in shares come together: exact on every rank, each row once over the network where machines are alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from symbolic_run import run_explicitly
from threads import run_threads
from torch.nn.functional import linear

import sfcompile.runtime.rank.ops  # noqa: F401  (registers torch.ops.streamfusion)
from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.weight_gather import Assembled, build_assembled, build_weight_gather
from sfcompile.errors import ScheduleError
from sfcompile.runtime.program.phases import EXCHANGE_FINISH
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.weight_rows import WeightRows, places_of
from sfcompile.runtime.rank.executor import SiteRun
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


WIDTHS = (5, 3)
"""Of two weights that one exchange gathers."""


def assembled(machine_of: tuple[int, ...], rows: int) -> Assembled:
    """The schedule of CPU ranks for weights [rows, 5] and [rows + 1, 3]."""
    cut = places_of(machine_of)
    weights = [WeightRows((rows + part, width), cut) for part, width in enumerate(WIDTHS)]
    return build_assembled("w", weights, torch.float32, machine_of)


def random_delay(seed: int) -> Callable[[int], None]:
    draw = random.Random(seed)
    return lambda rank: time.sleep(draw.choice((0.0, 0.0, 0.0, 1e-3)))


def products(schedule: Assembled, rank: int, epochs: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a rank makes of weights that are others in each epoch, and of the whole ones. An exchange is on its way
    while the weights of the one before it are read."""
    current_session().load("w", [schedule] * epochs)
    make = torch.Generator().manual_seed(0)
    wholes = [[torch.randn(cut.shape, generator=make) for cut in schedule.weights] for _ in range(epochs)]
    ticket, bias = torch.zeros(1, dtype=torch.int64), torch.randn(len(wholes[0][1]))
    pairs = []

    def start(epoch: int) -> None:
        for part, (cut, whole) in enumerate(zip(schedule.weights, wholes[epoch], strict=True)):
            first, stop = cut.rows(rank)
            sf.exchange_start(whole[first:stop].clone(), ticket, "w", epoch, part)

    start(0)
    for epoch in range(epochs):
        if epoch + 1 < epochs:
            start(epoch + 1)
        for part, (width, whole) in enumerate(zip(WIDTHS, wholes[epoch], strict=True)):
            x, plus = torch.randn(2, 3, width), bias if part else None
            got, _ = sf.exchange_linear(x, plus, ticket, "w", epoch, len(whole), part)
            pairs.append((got, linear(x, whole, plus)))
    return pairs


@pytest.mark.parametrize(
    ("machine_of", "rows"),
    [((0, 1), 7), ((0, 0, 1, 1), 8), ((0, 0, 1, 1), 9), ((1, 0, 1, 0, 1, 0), 13), ((0, 0, 1), 9), ((0, 1, 2) * 2, 20)],
)
def test_weights_come_together_in_the_bank(machine_of: tuple[int, ...], rows: int) -> None:
    """Proved, and run by ranks that are slow here and there; each row once to each machine where these are alike."""
    schedule = assembled(machine_of, rows)
    check(schedule)
    run_explicitly(schedule)
    machines = len(set(machine_of))
    if len({machine_of.count(machine) for machine in machine_of}) == 1:
        assert schedule.bytes_by_link(Topology(machine_of))[1] == (machines - 1) * schedule.heap_bytes
    runs = run_threads(len(machine_of), lambda rank: products(schedule, rank), machine_of, random_delay(rows))
    assert all(torch.equal(*pair) for pairs in runs for pair in pairs)


def test_one_weight_is_copied_out_of_the_bank() -> None:
    machine_of, whole = (0, 0, 1, 1), torch.randn(9, 5)
    cut = WeightRows((9, 5), places_of(machine_of))
    schedule = build_assembled("w", [cut], torch.float32, machine_of)
    check(schedule)

    def work(rank: int) -> bool:
        current_session().load("w", [schedule])
        first, stop = cut.rows(rank)
        for _ in range(3):
            ticket = sf.exchange_start(whole[first:stop].clone(), torch.zeros(1, dtype=torch.int64), "w", 0)
            value, _ = sf.exchange_finish(ticket, "w", 0, [9, 5], torch.float32)
        return torch.equal(value, whole)

    assert all(run_threads(4, work, machine_of))


def test_a_site_that_ends_before_its_weights_are_read_reads_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the order that products keep: what they read lies in a bank, which others write to anew."""

    def too_early(self: SiteRun, part: int, reader: Callable[[torch.Tensor], Any]) -> tuple[Any, bool]:
        weight = self._assemble(part)
        if part == len(WIDTHS) - 1:
            self.finish(self.epoch)
            if self._rank == 0:
                time.sleep(0.05)
        return reader(weight), part == len(WIDTHS) - 1

    monkeypatch.setattr(SiteRun, "read", too_early)
    runs = run_threads(4, lambda rank: products(assembled((0, 0, 1, 1), 8), rank), (0, 0, 1, 1))
    assert not all(torch.equal(*pair) for pair in runs[0])


def test_rows_are_given_on_when_they_have_come_and_lie_apart() -> None:
    schedule = assembled((0, 0, 1, 1), 8)
    phases = dict(schedule.origin.phases)
    wait, forward, *rest = phases[EXCHANGE_FINISH]
    phases[EXCHANGE_FINISH] = (forward, wait, *rest)
    with pytest.raises(ScheduleError, match="without having waited for it"):
        check(replace(schedule, origin=replace(schedule.origin, phases=phases)))
    owned = (*schedule.site.owned[:-1], schedule.site.owned[0])
    with pytest.raises(ScheduleError, match="of the bank"):
        check(replace(schedule, site=replace(schedule.site, owned=owned)))
    first, second, *others = schedule.site.owned  # apart and without gaps, but the rows of two ranks change places
    with pytest.raises(ScheduleError, match="of weight 0"):
        check(replace(schedule, site=replace(schedule.site, owned=(second, first, *others))))


def test_the_proof_reads_one_program_however_many_ranks() -> None:
    schedule = assembled(tuple(rank // 8 for rank in range(256)), 512)
    check(schedule)
    assert set(schedule._programs) == {0}
    assert schedule.place(255, 0) == schedule.own_place(schedule.program(255).arrivals[0].chunk.src, 0)
