"""Ranks that fall out of step, each in its own process: what a call says, and that the next one is right again."""

from __future__ import annotations

import time

import torch
from random_sites import random_case
from rank_workers import attend_and_gather, schedules_of, session_of

import sfcompile.runtime.rank.session as session_module

WAYS = ("inputs", "order", "skipped", "interrupted", "late")


def falls_out(rank: int, how: str) -> tuple[str, str, float]:
    """A good call, one in which ranks fall out of step, and a good one.

    Returns:
        the error of the call out of step, its text, and the largest difference of the last call.
    """
    session_module._TELL_S = 30.0  # on a busy machine a second may be short
    session = session_of(timeout_s=10.0)
    case, ticket = random_case(5, ranks=2), torch.zeros(1, dtype=torch.int64)
    session.load("p", schedules_of(case))
    equal = torch.arange(4.0)

    def call(name: str = "model", inputs: torch.Tensor = equal, interrupted: bool = False) -> float:
        with session.call(name, [inputs]):
            if interrupted:
                raise KeyboardInterrupt
            whole, _ = attend_and_gather(case, rank, ticket)
        return float((whole.double() - case.expected).abs().max())

    call()
    kind, text = "", ""
    try:
        if how == "inputs":
            call(inputs=equal + rank)
        elif how == "order":
            call(name=f"model {rank}")
        elif how == "skipped" and rank == 0:
            call(inputs=equal + 1)
        elif how == "skipped":  # what is its second call is the first one's third
            call(inputs=equal + 2)
        elif how == "interrupted":
            call(interrupted=rank == 1)
        elif how == "late":  # rank 1 learns between its calls that rank 0's has failed
            if rank == 0:
                call(interrupted=True)
            time.sleep(0.5)
            call()
    except BaseException as error:
        kind, text = type(error).__name__, str(error)
    return kind, text, call()
