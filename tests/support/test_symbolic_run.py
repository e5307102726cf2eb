"""The explicit run of every rank: right schedules pass, every way we know of breaking one rank's program is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from by_hand import by_hand
from random_sites import attention_site, gather_site, random_case
from symbolic_run import SymbolicRun, check_calls, check_layout, in_turn, overlapped, run_explicitly

from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.schedule.torus import build_torus
from sfcompile.errors import ScheduleError
from sfcompile.runtime.program.instructions import Attend, Chunk, Forward, Instruction, Push, Put, RankProgram, Wait
from sfcompile.runtime.program.topology import Topology

Edit = Callable[[tuple[Instruction, ...]], tuple[Instruction, ...]]


def torus(ulysses: int = 2, ring: int = 2) -> Schedule:
    ranks = ulysses * ring
    return build_torus(attention_site(ranks), Mesh.of(Topology.grid(ulysses, ring), ulysses, ring))


def mutant(schedule: Schedule, rank: int, phase: str, edit: Edit) -> Schedule:
    """The same schedule, one phase of one rank changed."""

    def program(which: int) -> RankProgram:
        right = schedule.program(which)
        if which != rank:
            return right
        return replace(right, phases={**right.phases, phase: edit(right.phases[phase])})

    return by_hand(schedule, program)


def without(kind: type, nth: int = 0) -> Edit:
    def edit(steps: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
        gone = [i for i, step in enumerate(steps) if isinstance(step, kind)][nth]
        return steps[:gone] + steps[gone + 1 :]

    return edit


def twice(kind: type) -> Edit:
    def edit(steps: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
        first = next(i for i, step in enumerate(steps) if isinstance(step, kind))
        return steps[: first + 1] + steps[first:]

    return edit


def changed(kind: type, **fields: Any) -> Edit:
    def edit(steps: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
        first = next(i for i, step in enumerate(steps) if isinstance(step, kind))
        return (*steps[:first], replace(steps[first], **fields), *steps[first + 1 :])

    return edit


def push_early(steps: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    at = next(i for i, step in enumerate(steps) if isinstance(step, Push))
    return (*steps[: at - 1], steps[at], steps[at - 1], *steps[at + 1 :])


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (2, 1), (1, 3), (2, 2), (4, 1), (3, 2), (2, 4)])
def test_torus_is_right(ulysses: int, ring: int) -> None:
    ranks = ulysses * ring
    proof = run_explicitly(torus(ulysses, ring))
    assert proof.pairs == proof.epochs * ranks * ranks * ulysses
    assert proof.puts == proof.waits


@pytest.mark.parametrize("kind", ["torus", "usp", "allgather"])
@pytest.mark.parametrize("seed", range(10))
def test_uneven_sites_and_pieces_are_right(seed: int, kind: str) -> None:
    case = random_case(seed)
    run_explicitly(build(kind, case.site, case.mesh, *case.parts), epochs=3)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_gather_is_right(ranks: int) -> None:
    proof = run_explicitly(build_exchange(gather_site(ranks), Mesh.of(Topology.grid(1, ranks), 1, ranks)))
    assert proof.puts == proof.epochs * ranks * (ranks - 1)


def test_mixed_sites_share_the_banks() -> None:
    attention = torus()
    gather = build_exchange(gather_site(4), attention.mesh)
    sites = [attention, gather, gather, attention, attention, gather]
    for calls in (in_turn(sites), overlapped(sites)):
        for direct in (True, False):
            check_calls(sites, calls, direct)


@pytest.mark.parametrize(
    ("phase", "edit", "message"),
    [
        ("put_q", without(Put), "expects rank"),
        ("put_k", without(Put), "expects rank"),
        ("put_k", twice(Put), "is put by ranks"),
        ("put_v", changed(Put, slot=0), "expects rank|fits|is put by"),
        ("attend", without(Forward), "expects rank"),
        ("attend", without(Push), "expects rank"),
        ("attend", without(Attend), "without, or not once with"),
        ("attend", without(Attend, -1), "without, or not once with"),
        ("attend", twice(Attend), "without, or not once with"),
        ("attend", without(Wait), "without having waited"),
        ("attend", without(Wait, -1), "without having waited|waited for"),
        ("attend", changed(Wait, src=3), "expects"),
        ("attend", changed(Attend, kv=(Chunk(2),)), "holds|own|not"),
        ("attend", push_early, "without, or not once with"),
        ("collect", without(Wait), "without having waited"),
    ],
)
def test_mutants_of_one_rank_are_caught(phase: str, edit: Edit, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        run_explicitly(mutant(torus(), 0, phase, edit))


def test_a_missing_put_is_a_deadlock() -> None:
    broken = mutant(torus(), 0, "put_q", without(Put))
    with pytest.raises(ScheduleError, match="deadlock: rank"):
        check_calls([broken], in_turn([broken]))


def test_waits_in_a_circle_are_a_deadlock() -> None:
    good = torus(1, 2)
    slots = {rank: good.program(rank).arrivals[0].slot for rank in range(2)}

    def waiting(rank: int) -> RankProgram:
        program = good.program(rank)
        waits = tuple(Wait(arrival.slot, arrival.src) for arrival in program.arrivals if arrival.slot == slots[rank])
        rest = tuple(step for step in program.phases["attend"] if step not in waits)
        return replace(program, phases={**program.phases, "put_q": waits, "attend": rest})

    broken = by_hand(good, waiting)
    with pytest.raises(ScheduleError, match="rank 0 at epoch 1 put_q: wait slot .* from rank 1; rank 1 at"):
        check_calls([broken], in_turn([broken]))


def test_a_small_slot_is_caught() -> None:
    good = torus()
    first, *rest = good.slots
    with pytest.raises(ScheduleError, match="a chunk of"):
        check_layout(replace(good, slots=(replace(first, nbytes=first.nbytes - 4), *rest)))


class Heedless(SymbolicRun):
    """Writers that do not wait until their reader has given the bank back."""

    def credit(self, reader: int, epoch: int) -> list[int]:
        return [0] * self.num_ranks


def test_without_credits_a_bank_is_overwritten_while_it_is_read() -> None:
    again = [build_exchange(gather_site(3), Mesh.of(Topology.grid(1, 3), 1, 3))] * 4
    check_calls(again, overlapped(again))
    with pytest.raises(ScheduleError, match="may still use"):
        Heedless(again, direct=True).of(overlapped(again))
    again = [torus()] * 4
    with pytest.raises(ScheduleError, match="may still use"):
        Heedless(again, direct=True).of(overlapped(again))


def test_three_open_sites_do_not_fit_in_two_banks() -> None:
    again = [torus(1, 2)] * 3
    puts = [(epoch, phase) for epoch in (1, 2, 3) for phase in ("put_q", "put_k", "put_v")]
    with pytest.raises(ScheduleError, match="opens epoch 3 while epoch 1"):
        check_calls(again, puts)
