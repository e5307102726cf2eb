"""Groups of machines that compute the same each: ``run(rank, TOPOLOGY)`` on two machines of two ranks."""

from __future__ import annotations

import time
from typing import Any

import torch
from model_cases import Plain, close, compiled, tokens

from sfcompile.backend import last_report
from sfcompile.errors import PeerFailedError, RankMismatchError


def run(rank: int, topology: str) -> None:
    """Behind slow links each machine computes alone; all ranks have the same bits, or an error if they should not."""
    with torch.no_grad():
        model, x = Plain(), tokens(1024)[:1]
        call = compiled(model, topology=topology)
        for step in range(3):
            outs: list[Any] = [None] * 4
            close(out := call(x + step), model(x + step))
            torch.distributed.all_gather_object(outs, out)
            assert all(torch.equal(out, other) for other in outs)
        plan = last_report()
        assert plan is not None and plan.copies == 2 and 2.0 <= plan.share < 2.1, str(plan)
        weight, kept = model.qkv[0].weight, model.qkv[0].weight.clone()
        for other_input, other_weight, late in (
            (rank > 1, 0, 0),
            (rank == 2, 0, 0),
            (rank == 2, 0, 1),
            (0, rank > 1, 0),
        ):
            weight.add_(other_weight)
            if rank == 0:  # it learns between its calls that rank 2 failed, and rank 1 hears it of nobody else
                time.sleep(late)
            try:
                call(x + other_input)
            except (RankMismatchError, PeerFailedError):
                weight.copy_(kept)
            else:
                raise AssertionError("a difference between copies was not noticed")
            close(call(x), model(x))
