"""Batch axes: whole samples for groups of ranks, tokens inside, exact on ranks that are threads."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from helpers import captured, placeholder_values, run_compiled
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sfcompile.capture.graph import Captured
from sfcompile.codegen.proof.checker import check
from sfcompile.errors import MeshError, NotShardedError
from sfcompile.passes.choose_schedules import groups_of
from sfcompile.passes.runner import Compiled, run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology

RANKS = {"ulysses": 1, "ring": 1}


class Guided(nn.Module):
    """A conditional and an unconditional sample in one batch, modulated each by its own time and text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.modulation, self.qkv, self.out = nn.Linear(16, 64), nn.Linear(32, 96), nn.Linear(32, 32)
        self.text = nn.Linear(16, 32)

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            scale, shift = self.modulation(time).unsqueeze(1).chunk(2, -1)
            joint = torch.cat([self.text(text), x * (1 + scale) + shift], 1)
            q, k, v = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in self.qkv(joint).chunk(3, -1))
            x = x + self.out(sdpa(q, k, v).transpose(1, 2).flatten(2))[:, text.shape[1] :]
        return x


def close(out: torch.Tensor, want: torch.Tensor) -> None:
    """The contract: an error is measured by the output's scale, which is what rounding goes by on any processor."""
    error = float((out - want).abs().max() / want.abs().max())
    assert error <= 1e-5, f"error {error:.1e} of the output's scale"


def guided(batch: int = 2, tokens: int = 21) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(1)
    return Guided(), (torch.randn(batch, tokens, 32), torch.randn(batch, 16), torch.randn(batch, 6, 16))


def compile_rank(got: Captured, rank: int, topology: Topology, mesh: Mapping[str, int] | None) -> Compiled:
    return run_pipeline(State(got.gm, got.mode, topology, rank, Asked(mesh, shard_everything=True)))


@pytest.mark.parametrize(
    ("machines", "inside", "batch", "mesh"),
    [
        (2, 1, 2, {"batch": 2}),
        (2, 2, 2, {"batch": 2, "ulysses": 2}),
        (2, 2, 2, {"batch": 2, "ring": 2}),
        (1, 4, 4, {"batch": 2, "ulysses": 2}),
        (2, 3, 2, {"batch": 2, "ring": 3}),
        (2, 2, 4, {"batch": 4}),
    ],
)
def test_samples_are_shared_out_and_tokens_inside(machines: int, inside: int, batch: int, mesh: dict[str, int]) -> None:
    model, inputs = guided(batch)
    got = captured(model, *inputs)
    topology = Topology.grid(machines, inside)
    values = placeholder_values(got)
    compiled = [compile_rank(got, rank, topology, RANKS | mesh) for rank in range(topology.num_ranks)]
    with torch.no_grad():
        want = got.gm(*values)[0]
    for (out,) in run_compiled(compiled, topology, values):
        close(out, want)
    for rank, one in enumerate(compiled):
        report = one.report
        assert (report.batch, report.num_ranks) == (mesh["batch"], topology.num_ranks)
        assert report.share < 1.35, report
        for schedules in one.programs.values():
            for schedule in schedules:
                check(schedule)
                assert rank in schedule.members(rank)[1]
                if isinstance(schedule.site, AttentionSite) and mesh["batch"] == machines:
                    group = schedule.members(rank)[1]
                    assert len({topology.machine_of[member] for member in group}) == 1, "attention crosses machines"


def test_two_machines_take_a_guidance_pair_apart_by_themselves() -> None:
    """Slow links between two machines: the planner gives each machine a sample, and attention crosses nothing."""
    model, inputs = guided()
    got = captured(model, *inputs)
    slow = Topology.grid(2, 2, network_bytes_per_s=1e6)
    report = compile_rank(got, 0, slow, None).report
    assert report.batch > 1 and "batch split" in str(report)
    assert compile_rank(got, 0, slow, {"ulysses": 4, "ring": 1}).report.batch == 1


def test_a_batch_that_cannot_be_split_is_refused() -> None:
    model, inputs = guided(3)
    got = captured(model, *inputs)
    with pytest.raises(MeshError, match="splits the batch 2 ways.*A batch of 3 on 4 ranks cannot be split 2 ways"):
        compile_rank(got, 0, Topology.grid(2, 2), {"batch": 2, "ulysses": 2, "ring": 1})


def test_what_mixes_samples_is_listed_and_strict_objects() -> None:
    class Mean(Guided):
        def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return super().forward(x, time, text).sort(0).values

    model, inputs = Mean(), guided()[1]
    got = captured(model, *inputs)
    state = State(got.gm, got.mode, Topology.grid(2, 1), 0, Asked({"batch": 2, "ulysses": 1, "ring": 1}))
    with pytest.raises(NotShardedError, match="sort"):
        run_pipeline(state, strict=True)


def test_groups_are_whole_machines() -> None:
    topology = Topology((0, 1, 0, 1))
    assert groups_of(topology, 2) == [(0, 2), (1, 3)]
    assert groups_of(topology, 1) == [(0, 2, 1, 3)]


def test_the_first_sample_alone_leaves_all_groups_with_one_order_of_communication() -> None:
    """A slice of the batch: cut in two, one group would have it and the other nothing."""

    def first(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = x.unflatten(2, (4, 8)).transpose(1, 2)
        a = sdpa(h, h, h).transpose(1, 2).flatten(2)
        return a + torch.tanh(a[:1] @ w) * 2

    got = captured(first, torch.randn(2, 24, 32), torch.randn(32, 32))
    topology = Topology.grid(1, 4)
    compiled = [compile_rank(got, rank, topology, {"batch": 2, "ulysses": 2, "ring": 1}) for rank in range(4)]
    assert len({tuple(rank.order) for rank in compiled}) == 1 and compiled[0].order
    values = placeholder_values(got)
    for (out,) in run_compiled(compiled, topology, values):
        close(out, got.gm(*values)[0])


@pytest.mark.parametrize("batch", [1, 2])
def test_machines_behind_slow_links_compute_the_same_each(batch: int) -> None:
    """Attention between them would take longer than computing all of it twice: each machine is a job of its own. Two
    samples too, of which no machine can take one: to gather the output would cost more than to compute it."""
    model, inputs = guided(batch, 1024)
    got = captured(model, *inputs)
    slow = Topology.grid(2, 2, network_bytes_per_s=1e6)
    values = placeholder_values(got)
    states = [State(got.gm, got.mode, slow, rank) for rank in range(4)]
    compiled = [run_pipeline(state) for state in states]
    report = compiled[0].report
    assert (report.copies, report.batch, report.num_ranks) == (2, 1, 4), report
    assert 2.0 <= report.share < 2.1 and "2 copies" in report.headline and "compute the same" in str(report)
    for state in states:
        assert state.group is not None and state.group.groups == ((0, 1), (2, 3))
    with torch.no_grad():
        want = got.gm(*values)[0]
    outs = [out for (out,) in run_compiled(compiled, slow, values)]
    for out in outs:
        close(out, want)
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])


def test_copies_share_out_the_batch_each() -> None:
    """Four machines of two ranks: two groups of machines, in each of which a machine has a sample."""
    model, inputs = guided(2, 1024)
    got = captured(model, *inputs)
    topology = Topology.grid(4, 2, network_bytes_per_s=1e8)
    values = placeholder_values(got)
    compiled = [run_pipeline(State(got.gm, got.mode, topology, rank)) for rank in range(8)]
    report = compiled[0].report
    assert (report.copies, report.batch, report.num_ranks) == (2, 2, 8), report
    with torch.no_grad():
        want = got.gm(*values)[0]
    for (out,) in run_compiled(compiled, topology, values):
        close(out, want)


@pytest.mark.parametrize(
    "asked", [Asked(shard_everything=True), Asked(schedule="torus"), Asked({"ulysses": 4, "ring": 1})]
)
def test_what_a_user_asks_for_is_done_by_all_ranks_together(asked: Asked) -> None:
    model, inputs = guided(1, 1024)
    got = captured(model, *inputs)
    slow = Topology.grid(2, 2, network_bytes_per_s=1e6)
    assert run_pipeline(State(got.gm, got.mode, slow, 0, asked)).report.copies == 1


@pytest.mark.parametrize("speed", [1e5, pytest.param(1e8, marks=pytest.mark.thorough)])
def test_more_machines_are_never_predicted_to_be_slower(speed: float) -> None:
    model, inputs = guided(1, 2048)
    got = captured(model, *inputs)
    steps = []
    for machines in (1, 2, 4, 8):
        topology = Topology.grid(machines, 2, network_bytes_per_s=speed)
        steps.append(run_pipeline(State(got.gm, got.mode, topology, 0)).report.predicted_s)
    assert all(more <= 1.03 * fewer for fewer, more in itertools.pairwise(steps)), steps
