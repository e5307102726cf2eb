"""Build what every site of this rank's graph does on all ranks, and prove it before use.

Layers repeat, so each distinct site is built and proved once (codegen/proof/checker.py: no deadlock, no race, no lost
signal, the right result); sites of one geometry share the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.passes.state import State


def run(state: State) -> None:
    """The pass: fills ``programs``: that of the tokens, then those that gather the batch and weights, if any."""
    state.programs = state.schedules()
    prove(state.programs)


def prove(programs: Mapping[str, Sequence[Schedule]]) -> None:
    """Check every distinct schedule of some programs.

    Raises:
        ScheduleError: one is wrong.
    """
    every = [schedule for schedules in programs.values() for schedule in schedules]
    for schedule in {id(schedule): schedule for schedule in every}.values():
        check(schedule)
