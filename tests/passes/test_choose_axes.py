"""Attention over space and time by turns: switched by an all-to-all where that costs less than moving q, k, v and o."""

from __future__ import annotations

import pytest
import torch
from helpers import captured, placeholder_values, run_compiled
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sfcompile.capture.graph import Captured
from sfcompile.passes.analyse_attention import analyse_attention
from sfcompile.passes.choose_axes import regions
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.topology import Topology

BATCH, FRAMES, SPACE, WIDTH = 2, 8, 24, 32


class Mixer(nn.Module):
    """A block over the middle dim of [N, L, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(2, (4, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(sdpa(q, k, v).transpose(1, 2).flatten(2))


class ByTurns(nn.Module):
    """Space, time, space, time over [B, F, S, C]."""

    def __init__(self, kinds: str = "stst") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kinds, self.blocks = kinds, nn.ModuleList([Mixer() for _ in kinds])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            if kind == "s":
                x = block(x.flatten(0, 1)).unflatten(0, (BATCH, FRAMES))
            else:
                y = x.permute(0, 2, 1, 3).reshape(BATCH * SPACE, FRAMES, WIDTH)
                x = block(y).reshape(BATCH, SPACE, FRAMES, WIDTH).permute(0, 2, 1, 3)
        return x


def states(got: Captured, ranks: int, shard: bool = True) -> list[State]:
    topology, asked = Topology.grid(1, ranks), Asked(shard_everything=shard, split_batch=False)
    return [State(got.gm, got.mode, topology, rank, asked) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_space_and_time_by_turns_switch_once_between_blocks(ranks: int) -> None:
    got = captured(ByTurns(), torch.zeros(BATCH, FRAMES, SPACE, WIDTH))
    every = states(got, ranks)
    compiled = [run_pipeline(state) for state in every]
    report = compiled[0].report
    assert (report.sharded_sites, report.local_sites) == (0, 4), "no attention needs another rank"
    assert len(report.moved) == 3 and all("another dim" in row.reason for row in report.moved), str(report)
    assert len(report.gathered) == 1, "the output"
    values = placeholder_values(got)
    with torch.no_grad():
        want = got.gm(*values)[0]
    for (out,) in run_compiled(compiled, Topology.grid(1, ranks), values):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_attention_over_few_frames_is_sharded_over_space() -> None:
    """Four frames on three ranks are uneven; the pixels in the batch are not, and need no traffic."""
    got = captured(ByTurns("tt"), torch.zeros(BATCH, FRAMES, SPACE, WIDTH))
    report = run_pipeline(states(got, 3)[0]).report
    assert (report.sharded_sites, report.local_sites) == (0, 2)
    assert report.share < 1.05


def test_an_ordinary_model_has_no_choice() -> None:
    got = captured(Mixer(), torch.zeros(2, 24, WIDTH))
    assert run_pipeline(states(got, 4)[0]).report.sharded_sites == 1


def test_a_value_goes_with_the_attention_that_alone_it_feeds() -> None:
    got = captured(ByTurns("st"), torch.zeros(BATCH, FRAMES, SPACE, WIDTH))
    first, second = (site.node for site in analyse_attention(got.gm.graph))
    region = regions(got.gm.graph, (first, second))
    norms = [node for node in got.gm.graph.nodes if "layer_norm" in str(node.target)]
    adds = [node for node in got.gm.graph.nodes if str(node.target) == "aten.add.Tensor"]
    assert [region[node] for node in norms] == [first, second]
    assert [region[node] for node in adds] == [first, second], "the residual is read by both blocks"


class Grid(nn.Module):
    """Two blocks over tokens that are kept as [B, F, H, W, C] between attentions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mixers = nn.ModuleList([Mixer(), Mixer()])
        self.mlps = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for mixer, mlp in zip(self.mixers, self.mlps, strict=True):
            x = x + mixer(x.flatten(1, 3)).unflatten(1, x.shape[1:4])
            x = x + torch.tanh(mlp(x))
        return x


@pytest.mark.parametrize(("frames", "dim"), [(3, 2), (4, 1)])
def test_a_grid_of_few_frames_is_cut_along_another_dim(frames: int, dim: int) -> None:
    """Three frames for four ranks, but four rows: every rank attends with one row of every frame."""
    got = captured(Grid(), torch.zeros(1, frames, 4, 6, WIDTH))
    every = states(got, 4)
    compiled = [run_pipeline(state) for state in every]
    report = compiled[0].report
    assert report.sharded_sites == 2 and report.share == 1.0 and len(report.gathered) == 1 and not report.moved
    assert every[0].layouts.chosen[got.gm.graph.output_node().args[0][0]].dim == dim  # type: ignore[index]
    inputs = placeholder_values(got)
    with torch.no_grad():
        want = got.gm(*inputs)
    for out in run_compiled(compiled, every[0].topology, inputs):
        torch.testing.assert_close(out[0], want[0], rtol=1e-5, atol=1e-5)


class Video(nn.Module):
    """Images [B F, C, H, W]: each attended to and convolved by itself, then over time at every pixel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.space, self.time = (nn.ModuleList([Mixer(), Mixer()]) for _ in range(2))
        self.convs = nn.ModuleList([nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        for space, conv, time in zip(self.space, self.convs, self.time, strict=True):
            x = x + conv(torch.tanh(x))
            y = x.flatten(2).transpose(1, 2)
            x = x + (space(y) - y).transpose(1, 2).unflatten(2, (height, width))
            y = x.unflatten(0, (BATCH, FRAMES)).permute(0, 3, 4, 1, 2).reshape(-1, FRAMES, WIDTH)
            y = time(y).reshape(BATCH, height, width, FRAMES, WIDTH).permute(0, 3, 4, 1, 2)
            x = x + y.reshape(x.shape)
        return x


@pytest.mark.parametrize("split_batch", [False, True])
def test_frames_are_convolved_without_halos_and_switched_around_time(split_batch: bool) -> None:
    """Also where the batch might be split: pixels and frames in it are not samples, and to gather them costs more than
    no attention would save. Work is slow, links are fast."""
    got = captured(Video(), torch.zeros(BATCH * FRAMES, WIDTH, 8, 6))
    top = Topology.grid(1, 4, flops_per_s=1e7, message_s=1e-6, wait_s=1e-6, local_latency_s=1e-6, launch_s=1e-6)
    compiled = [
        run_pipeline(State(got.gm, got.mode, top, rank, Asked(split_batch=split_batch, parts=()))) for rank in range(4)
    ]
    report = compiled[0].report
    assert report.share < 1.01 and len(report.gathered) == 1, str(report)
    if not split_batch:
        assert report.sharded_sites == 0 and not any("halo" in row.reason for row in report.moved), str(report)
    values = placeholder_values(got)
    with torch.no_grad():
        want = got.gm(*values)[0]
    for (out,) in run_compiled(compiled, top, values):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
