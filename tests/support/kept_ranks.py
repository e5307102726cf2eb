"""Ranks that compile one model again and again, as a job that starts again does, with what is kept on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from compile_ranks import Deep
from model_cases import close, tokens

from sfcompile.backend import last_report
from sfcompile.lowering import kept_plans
from sfcompile.passes.report.report import GraphReport


def starts(rank: int, folder: str) -> None:
    """Two ranks with folders of their own: what a start changes, and whether both took their graphs from the disk."""
    os.environ[kept_plans.VARIABLE] = "on"
    os.environ["SFCOMPILE_CACHE"] = str(Path(folder) / str(rank))
    model, x = Deep(3).eval(), tokens()
    with torch.no_grad():
        want = model(x)
    options: dict[str, Any] = {"inner": "eager", "topology": "auto:assumed", "placement": "shard", "timeout_s": 60.0}
    options["mesh"] = {"ulysses": 2}

    def start(x: torch.Tensor = x, want: torch.Tensor = want, **other: Any) -> GraphReport:
        torch._dynamo.reset()
        with torch.no_grad():
            run = torch.compile(model, backend="streamfusion", options=options | other)
            for _ in range(2):
                close(run(x), want)
        report = last_report()
        assert report is not None and report.sharded_sites + report.local_sites == 3
        return report

    def from_disk(report: GraphReport) -> bool:
        return "read from disk" in report.pass_seconds

    first, again = start(), start()
    assert not from_disk(first) and from_disk(again)
    assert again.headline == first.headline and again.programs == first.programs
    assert not from_disk(start(timeout_s=50.0)), "another option"
    groups = {"mesh": {"batch": 2, "ulysses": 1}}
    assert not from_disk(start(**groups)) and from_disk(start(**groups)), "ranks whose programs are their own"
    assert not from_disk(start(topology="1x2:h100-ib")), "another topology"
    assert not from_disk(start(x[:, :40], model(x[:, :40]).detach())), "other sizes"
    with torch.autocast("cpu", enabled=False):
        assert from_disk(start()), "the same as no autocast"
    # What one rank has lost or holds damaged, both make anew.
    if rank == 1:
        for path in (Path(folder) / "1" / "plans").glob("graph-*.json"):
            path.unlink()
    assert not from_disk(start()) and from_disk(start())
    if rank == 0:
        for path in (Path(folder) / "0" / "plans").glob("graph-*.json"):
            path.write_text("damaged")
    assert not from_disk(start()) and from_disk(start())
    os.environ[kept_plans.VARIABLE] = "off" if rank == 0 else "on"
    assert not from_disk(start()), "rank 0 keeps nothing"
