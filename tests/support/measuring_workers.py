"""Ranks that measure, each in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from model_cases import Plain
from rank_workers import session_of

from sfcompile.backend import last_report
from sfcompile.measuring import auto, cache
from sfcompile.measuring.quick import Quick

CPU = torch.device("cpu")


def own_caches(rank: int, folder: str) -> list[tuple[str, float]]:
    """Where the numbers of two askings come from, and the rate of matmul: with a file on every rank, and without."""
    os.environ["SFCOMPILE_CACHE"] = str(Path(folder) / str(rank))
    session = session_of()
    identities = session.exchange(cache.own_identity(CPU), "describe their machines")
    setting = cache.setting_of(session.topology, identities, "auto", torch.float32)
    assert not cache.write(setting, Quick({"flops_per_s": 1e9 * (rank + 1)}, 0.01, 0.4))
    given = auto.measured_links(session, session.topology, "auto", torch.float32)
    if rank == 0:
        cache.place(setting).unlink()
    auto.forget(session)
    after = auto.measured_links(session, session.topology, "auto", torch.float32)
    return [
        (given.source[:17], given.topology.flops_per_s),
        (after.source.split(" in ")[0], after.topology.flops_per_s),
    ]


def compiles(rank: int) -> dict[str, Any]:
    """Two small models as a user types them, then some steps of the second."""
    links, right = [], True
    x = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for attention in (False, True):
            torch._dynamo.reset()
            model = Plain(attention)
            placement = "shard" if attention else "auto"  # so small, the first is not worth it
            options = {"inner": "eager", "placement": placement}
            compiled = torch.compile(model, backend="streamfusion", options=options)
            for _ in range(6):
                right &= bool((compiled(x) - model(x)).abs().max() < 1e-5)
            report = last_report()
            assert report is not None and report.steps is not None
            links.append(report.links)
    return {
        "links": links, "plan": report.schedule, "right": right, "printed": str(report), "steps": report.steps.summary,
    }  # fmt: skip
