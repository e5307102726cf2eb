"""Every site has a proved schedule before a rank runs it, and equal sites share one."""

from __future__ import annotations

import pytest
import torch
from helpers import captured
from models import build

from sfcompile.codegen.proof import checker
from sfcompile.errors import ScheduleError
from sfcompile.passes import build_schedules
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.topology import Topology


def finished(name: str, asked: Asked) -> State:
    model, inputs = build(name)
    got = captured(model, *inputs)
    state = State(got.gm, got.mode, Topology.grid(1, 4), 1, asked)
    run_pipeline(state)
    return state


def test_a_schedule_per_site_and_one_for_equal_sites() -> None:
    state = finished("self", Asked(shard_everything=True, split_batch=False))
    (schedules,) = state.programs.values()
    assert [schedule.site.geometry() for schedule in schedules] == [site.geometry() for site in state.local.sites]
    assert len(set(map(id, schedules))) == len({site.geometry() for site in state.local.sites}) < len(schedules)
    assert not any(schedule.groups for schedule in schedules)


def test_groups_run_the_same_schedule_side_by_side_and_gather_at_the_end() -> None:
    state = finished("self", Asked({"batch": 2, "ulysses": 2, "ring": 1}, shard_everything=True))
    assert state.group is not None and list(state.programs) == [state.local.program, state.group.program]
    inside, across = state.programs.values()
    assert {schedule.groups for schedule in inside} == {((0, 1), (2, 3))}
    assert {schedule.groups for schedule in across} == {((0, 2), (1, 3))}
    assert [schedule.site for schedule in across] == list(state.group.sites)


def test_what_cannot_be_proved_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    proved: list[object] = []

    def refuse(schedule: object) -> None:
        proved.append(schedule)
        raise ScheduleError("a signal is lost")

    assert build_schedules.check is checker.check
    monkeypatch.setattr(build_schedules, "check", refuse)
    with pytest.raises(ScheduleError, match="a signal is lost"):
        finished("self", Asked(shard_everything=True))
    assert len(proved) == 1


def test_no_site_no_schedule() -> None:
    got = captured(lambda x: x.relu(), torch.zeros(3))
    state = State(got.gm, got.mode, Topology.grid(1, 2), 0)
    assert not any(run_pipeline(state).programs.values())
