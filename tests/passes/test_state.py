"""What the passes hand on: the key of a program."""

from __future__ import annotations

from dataclasses import replace

import torch
from helpers import captured

from sfcompile.passes.choose_schedules import Choices
from sfcompile.passes.state import State
from sfcompile.runtime.program.topology import Topology


def test_a_program_is_named_by_graph_shapes_topology_and_options_and_not_by_the_rank() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    topology = Topology.grid(1, 2)
    got = captured(double, torch.zeros(2, 3))
    first = State(got.gm, got.mode, topology, 0, choices=Choices(topology))
    assert replace(first, rank=1).program == first.program
    others = [
        replace(first, topology=Topology.grid(2, 1)),
        replace(first, shard_everything=True),
        State(captured(double, torch.zeros(2, 4)).gm, got.mode, topology, 0, choices=Choices(topology)),
    ]
    assert len({state.program for state in (first, *others)}) == 4
