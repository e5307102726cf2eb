"""Phases: the names that programs, ops and the graph share."""

from __future__ import annotations

import torch

from sfcompile.runtime.program.phases import ATTENTION, ENDS, EXCHANGE, STARTS
from sfcompile.runtime.rank import ops


def test_every_phase_is_an_op() -> None:
    assert {getattr(torch.ops.streamfusion, phase).default for phase in (*ATTENTION, *EXCHANGE)} < set(
        ops.COMMUNICATION
    )


def test_a_site_begins_with_starts_and_has_one_end() -> None:
    for phases in (ATTENTION, EXCHANGE):
        assert phases[0] in STARTS and [phase for phase in phases if phase in ENDS] == [phases[-1]]
