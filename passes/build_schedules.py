"""Build what every site of this rank's graph does on all ranks, and prove it before use.

Layers repeat, so each distinct site is built and proved once (codegen/proof/checker.py: no deadlock, no race, no lost
signal, the right result); sites of one geometry share the schedule.
"""

from __future__ import annotations

from dataclasses import replace

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.passes.state import Geometry, State


def run(state: State) -> None:
    """The pass: fills ``programs``: that of the tokens, then that which gathers the batch where it was split."""
    groups = state.group.groups if state.group is not None else ()
    proved: dict[Geometry, Schedule] = {}
    schedules = []
    for site in state.local.sites:
        key = site.geometry()
        if key not in proved:
            proved[key] = replace(state.choices.schedule(site), groups=groups)
            check(proved[key])
        schedules.append(proved[key])
    state.programs = {state.local.program: schedules}
    if state.group is not None and state.group.sites:
        state.programs[state.group.program] = [state.group.schedule(site) for site in state.group.sites]
        for schedule in state.programs[state.group.program]:
            check(schedule)
