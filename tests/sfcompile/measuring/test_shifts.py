"""Shifts: who sends to whom, and numbers that travel the same way."""

from __future__ import annotations

import numpy as np
import pytest
from threads import run_threads

from sfcompile.codegen.proof.checker import check
from sfcompile.measuring.shifts import LANES, Shifts, shift, sources
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import current_session


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_a_shift_crosses_machines_or_does_not(across: bool, keeps: bool) -> None:
    topology = Topology.grid(3, 2)
    schedule = shift(topology, across, 8, keeps)
    check(schedule)
    for rank in range(6):
        (arrival,) = schedule.program(rank).arrivals
        assert topology.same_machine(rank, arrival.src) != across and arrival.src != rank
        assert schedule.site.wanted_shape(rank) == (1 + keeps, 8)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("machine_of", [(0, 0, 1), (0, 1, 1, 1), (0, 0, 0, 1, 1), (0, 1, 0, 0)])
def test_machines_of_unequal_size_send_what_they_can(machine_of: tuple[int, ...], across: bool) -> None:
    topology = Topology(machine_of)
    schedule = shift(topology, across, 8, keeps=False)
    check(schedule)
    sent = [int(schedule.arrival_bytes(schedule.origin.arrivals[0])[place]) for place in range(len(machine_of))]
    assert set(sent) <= {0, 32} and any(sent)
    for rank in range(len(machine_of)):
        (arrival,) = schedule.program(rank).arrivals
        comes = schedule.site.wanted_shape(rank) == (1, 8)
        assert not comes or topology.same_machine(rank, arrival.src) != across


@pytest.mark.parametrize(
    ("machine_of", "inside", "across"),
    [((0, 1, 0, 0, 1, 0), 6, 4), ((0, 0, 0, 0, 0, 1), 4, 2), ((0, 1, 0, 2), 2, 4), ((0, 1, 1, 1), 2, 2)],
)
def test_an_even_number_of_ranks_on_unequal_machines_goes_in_pairs(
    machine_of: tuple[int, ...], inside: int, across: int
) -> None:
    """Whoever sends hears from the same rank; as many as can have a partner."""
    for is_across, paired in ((False, inside), (True, across)):
        senders = sources(Topology(machine_of), is_across)
        assert sum(src is not None for src in senders) == paired
        assert all(src is None or senders[src] == rank for rank, src in enumerate(senders))


def test_messages_and_words_travel_and_leave_no_program_behind() -> None:
    def work(rank: int) -> np.ndarray:
        session = current_session()
        with Shifts(session, inside=(4,), across=(8, 16)) as shifts:
            assert shifts.comes(False, 4) and shifts.comes(True, 16) and shifts.goes(False) and shifts.goes(True)
            for lane in range(LANES):
                shifts.put(True, 16, lane)
            for lane in range(LANES):
                shifts.receive(True, 16, lane)
            shifts.put(False, 4)
            shifts.put_word(rank, 10.0 * rank)
            shifts.receive(False, 4)
            told = shifts.receive_word()
            assert np.array_equal(shifts.meet(1.0), [[1.0, 0.0]] * 4)
        assert not session.programs
        return told

    for told in run_threads(4, work, machine_of=(0, 0, 1, 1)):
        assert np.array_equal(told, [[rank, 10.0 * rank] for rank in range(4)])
