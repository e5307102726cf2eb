"""Ranges of sites in torch.profiler's record."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from random_sites import random_case
from rank_workers import attend_and_gather, schedules_of
from threads import run_threads
from torch.profiler import ProfilerActivity, profile

from sfcompile.runtime.rank.profiles import named
from sfcompile.runtime.rank.session import current_session


def test_every_stage_of_a_site_is_a_range_of_the_profile() -> None:
    case = random_case(5, ranks=2)

    def work(rank: int) -> set[str]:
        current_session().load("p", schedules_of(case))
        with profile(activities=[ProfilerActivity.CPU]) if rank == 0 else nullcontext() as record:
            attend_and_gather(case, rank, torch.zeros(1, dtype=torch.int64))
        return set() if record is None else {event.key for event in record.key_averages()}

    seen, unseen = run_threads(2, work)
    attention = {f"attention 0: {stage}" for stage in ("put_q", "put_k", "put_v", "attend", "collect")}
    assert attention | {"exchange 1: exchange_start", "exchange 1: exchange_finish"} <= seen
    assert not unseen


def test_nothing_is_made_while_nobody_profiles() -> None:
    assert named("attention", 0, "attend", "p") is named("exchange", 1, "exchange_start", "p")
