"""Recorded runs: the same results, and events that say what really happened."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from random_sites import Case, random_case
from rank_workers import attend_and_gather, schedules_of
from threads import run_threads

from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank import recorder
from sfcompile.runtime.rank.recorder import Event, Recorder
from sfcompile.runtime.rank.session import current_session

CALLS = 2


@pytest.fixture
def recording() -> Iterator[Recorder]:
    recorder.active = Recorder()
    yield recorder.active
    recorder.active = None


def run(case: Case, machine_of: tuple[int, ...]) -> list[torch.Tensor]:
    def work(rank: int) -> torch.Tensor:
        current_session().load("p", schedules_of(case))
        ticket = torch.zeros(1, dtype=torch.int64)
        for _ in range(CALLS):
            out, ticket = attend_and_gather(case, rank, ticket)
        return out

    return run_threads(case.mesh.num_ranks, work, machine_of)


@pytest.mark.parametrize(("seed", "machine_of"), [(21, (0, 0)), (22, (0, 0, 1)), (30, (0, 0, 1, 1))])
def test_bytes_stages_and_results(recording: Recorder, seed: int, machine_of: tuple[int, ...]) -> None:
    case = random_case(seed, ranks=len(machine_of))
    outs = run(case, machine_of)
    scale = float(case.expected.abs().max())
    assert all(float((out.double() - case.expected).abs().max()) <= 1e-5 * scale for out in outs)
    topology = Topology(machine_of)
    for site, schedule in enumerate(schedules_of(case)):
        events = [event for event in recording.events if event.site == site]
        sent = {
            lane: sum(event.nbytes for event in events if event.lane == lane) for lane in ("send", "network")
        }  # fmt: skip
        inside, across = schedule.bytes_by_link(topology)
        assert (sent["send"], sent["network"]) == (CALLS * inside, CALLS * across)
        for rank in range(len(machine_of)):
            mine = [event for event in events if event.rank == rank]
            stages = [event.name for event in mine if event.lane == "stage"]
            each = (
                ["put_k", "put_q", "put_v", "attend", "collect"] if site == 0 else ["exchange_start", "exchange_finish"]
            )
            assert stages == each * CALLS and len({event.epoch for event in mine}) == CALLS
            check_nested(mine)


def check_nested(events: list[Event]) -> None:
    """Everything happens inside a stage, and ends after it began."""
    stages = [event for event in events if event.lane == "stage"]
    for event in events:
        assert event.start_s <= event.stop_s
        assert any(s.start_s <= event.start_s and event.stop_s <= s.stop_s and s.epoch == event.epoch for s in stages)


def test_peers_are_ranks_of_the_job(recording: Recorder) -> None:
    run(random_case(21, ranks=2), (0, 0))
    messages = [event for event in recording.events if event.lane in ("send", "wait")]
    assert messages and all(event.peer == 1 - event.rank for event in messages)
    assert any(event.name == "k -> rank 1" for event in messages) or any("o -> rank" in e.name for e in messages)


def test_nothing_is_recorded_without_a_recorder() -> None:
    before = Recorder()
    run(random_case(21, ranks=2), (0, 0))
    assert before.events == [] and recorder.active is None
