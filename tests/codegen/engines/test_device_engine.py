"""Which ranks an engine writes to and how groups see the heap; test_device_side.py tests what it computes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from kernel_ranks import Job, make_site
from random_sites import gather_site

from sfcompile.codegen.engines.device_engine import KernelEngine, receivers_of
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.runtime.program.instructions import Push
from sfcompile.runtime.program.topology import Topology

CPU = torch.device("cpu")
TORUS = Job("torus", 2, 2, 2, 2, make_site(16, 4)).schedule()


def test_every_rank_that_is_written_to_gives_credit() -> None:
    for rank in range(4):
        engine = KernelEngine(TORUS, rank, KernelTarget(CPU), (0, 0, 0, 0))
        view = engine.view(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(7, dtype=torch.int64))
        senders = {other for other in range(4) if any(arrival.src == rank for arrival in TORUS.program(other).arrivals)}
        assert set(view.receivers.tolist()) == senders and rank not in senders


def test_with_several_domains_every_rank_gives_credit() -> None:
    """A ring between machines: who gets what this rank passes on is not who writes into this rank's bank."""
    ring = Job("ring", 3, 1, 1, 3, make_site(8, 3), True, "ring").schedule()
    assert receivers_of(ring, 1, (0, 0, 0)) == [2]
    assert receivers_of(ring, 1, (0, 1, 2)) == receivers_of(ring, 1, (0, 0, 2)) == [0, 2]


def test_a_rank_that_only_sends_outputs_home_waits_for_whom_they_are() -> None:
    """No builder makes such a rank: queries go both ways, so that whose outputs a rank sends it has sent to before."""
    program = TORUS.program(1)
    homeward = [step for step in program.phases["attend"] if isinstance(step, Push)]
    only = cast(
        Schedule,
        SimpleNamespace(
            members=lambda rank: (1, (5, 4, 7, 6)), program=lambda rank: replace(program, phases={"attend": homeward})
        ),
    )
    assert [step.q.src for step in homeward] == [3]
    assert receivers_of(only, 4, (0,) * 8) == [6]


def test_what_the_attention_leaves_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that no unit attends to: never what the memory held before."""
    engine = KernelEngine(TORUS, 0, KernelTarget(CPU), (0, 0, 0, 0))
    monkeypatch.setattr(engine._any, "run", lambda out, view, mask: None)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, float("nan"), **options))
    out = engine.attend(None, engine.view(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(12, dtype=torch.int64)))
    assert out.shape == (1, 4, 16, 32) and not out.any()


def test_a_group_knows_its_ranks_of_the_job() -> None:
    gather = replace(build_exchange(gather_site(2), Mesh.of(Topology.grid(1, 2), 2, 1)), groups=((0, 2), (1, 3)))
    engine = KernelEngine(gather, 3, KernelTarget(CPU, calls={}), (0, 0, 2, 2))
    assert engine.members == (1, 3) and receivers_of(gather, 3, (0, 0, 0, 0)) == [1]
    view = engine.view(torch.arange(6).view(2, 3), torch.zeros(12, dtype=torch.int64))
    assert view.receivers.tolist() == [0, 1, 2]
    error = engine.gave_up(gather.program(1).arrivals[0].slot, 5 << 24, 3 << 24, 2.0)
    assert (error.epoch, error.seen_epoch, error.peer) == (5, 3, 0)


def test_banks_have_room_for_the_schedule_and_what_lies_beside() -> None:
    near = KernelEngine(TORUS, 0, KernelTarget(CPU), (0, 0, 0, 0)).bank_bytes
    assert near > TORUS.heap_bytes
    apart = KernelEngine(TORUS, 0, KernelTarget(CPU, calls={}), (0, 0, 2, 2)).bank_bytes
    assert apart > near  # room to stage what NVSHMEM sends
