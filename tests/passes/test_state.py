"""What the passes hand on: the key of a program, and fields that are not there before a pass makes them."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from helpers import captured

from sfcompile.capture.graph import Captured
from sfcompile.passes.state import Asked, Choices, State
from sfcompile.runtime.program.topology import Topology


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def planned(got: Captured, topology: Topology, rank: int = 0, shard_everything: bool = False) -> State:
    state = State(got.gm, got.mode, topology, rank, Asked(shard_everything=shard_everything))
    state.choices = Choices(topology)
    return state


def test_a_program_is_named_by_graph_shapes_topology_and_options_and_not_by_the_rank() -> None:
    topology = Topology.grid(1, 2)
    got = captured(double, torch.zeros(2, 3))
    first = planned(got, topology)
    assert planned(got, topology, rank=1).program == first.program
    others = [
        planned(got, Topology.grid(2, 1)),
        planned(got, topology, shard_everything=True),
        planned(captured(double, torch.zeros(2, 4)), topology),
    ]
    assert len({state.program for state in (first, *others)}) == 4


def test_what_no_pass_has_made_is_not_there() -> None:
    got = captured(double, torch.zeros(2, 3))
    state = State(got.gm, got.mode, Topology.grid(1, 2), 0)
    absent = {field.name for field in fields(State) if not hasattr(state, field.name)}
    assert absent == {"sites", "tokens", "layouts", "choices", "placement", "local", "traffic", "programs", "report"}
    with pytest.raises(AttributeError, match="layouts"):
        _ = state.layouts
    assert state.group is None and state.fused_puts is None


def test_the_batch_of_a_mesh_is_one_where_none_was_asked_for() -> None:
    assert [Asked(mesh).batch for mesh in (None, {"ulysses": 2}, {"batch": 2, "ring": 2})] == [1, 1, 2]
