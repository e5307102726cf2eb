"""Schedules whose ranks run programs of their own: mutants, which no builder would write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.runtime.program.instructions import RankProgram


def by_hand(schedule: Schedule, program: Callable[[int], RankProgram]) -> Schedule:
    """The schedule, but rank ``r`` runs ``program(r)`` and not the origin's program seen from its place.

    ``check`` reads the origin's alone, so it says nothing of such a schedule: symbolic_run.py does.
    """

    def own(self: Schedule, rank: int) -> RankProgram:
        return program(rank)

    kind = type("ByHand", (type(schedule),), {"program": own})
    changed: Schedule = kind(**{entry.name: getattr(schedule, entry.name) for entry in fields(schedule) if entry.init})
    return changed
