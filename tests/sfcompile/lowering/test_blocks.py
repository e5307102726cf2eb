"""A graph in blocks computes what the whole graph does, each distinct block is compiled once, and values are let go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import compile_ranks
import pytest
import torch
from device_workers import joint_attention
from fake_device import POLICIES, Gpu
from fake_ranks import largest, on_fake_gpus
from inductor_memory import disturbed_reads, wrapper_of
from processes import run_processes
from threads import run_threads
from torch import fx

from sfcompile.capture.graph import Captured, capture
from sfcompile.lowering.blocks import STRETCH, Blocks, blocks_of, stretches_of, why_distinct
from sfcompile.passes import choose_schedules
from sfcompile.passes.runner import Compiled, run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.phases import ATTEND, PUTS
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import current_session

Tensor = torch.Tensor
Block = Callable[[Tensor, Tensor], Tensor]
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def block(constant: float = 2.0, last: Callable[[Tensor], Tensor] = torch.relu) -> Block:
    """30 calls."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(7):
            x = torch.sin(x @ w) * constant + x
        return last(torch.relu(x))

    return run


def graph_of(fn: Callable[..., Any] | torch.nn.Module, *inputs: Tensor) -> Captured:
    with torch.no_grad():
        return capture(fx.symbolic_trace(fn), list(inputs))


class Row(torch.nn.Module):
    """Blocks one after the other, each with a matrix of its own."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.blocks = blocks
        self.weights = torch.nn.ParameterList(torch.randn(8, 8, generator=generator) / 3 for _ in blocks)

    def forward(self, x: Tensor) -> Tensor:
        for one, weight in zip(self.blocks, self.weights, strict=True):
            x = one(x, weight)
        return x


def in_a_row(blocks: Sequence[Block]) -> Captured:
    return graph_of(Row(blocks).requires_grad_(False), X)


def eagerly(blocks: Blocks, mode: Any) -> tuple[Callable[..., Any], int]:
    """The graph's callable with every region run call by call, and how many were compiled."""
    compiled: list[fx.GraphModule] = []

    def compile(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled.append(gm)
        return gm

    return blocks.compiled(mode, compile), len(compiled)


PLAIN, OTHER = block(), block(last=torch.tanh)


@pytest.mark.parametrize(
    ("row", "kinds", "repeated"),
    [
        ([PLAIN] * 5, 1, 5),
        ([PLAIN] * 4 + [OTHER] * 4, 2, 8),
        ([PLAIN] * 4 + [block(3.0)] + [PLAIN] * 4, 2, 8),
        ([PLAIN] * 4 + [block(2)] + [PLAIN] * 4, 2, 8),
        ([PLAIN, OTHER] * 4, 1, 4),
        ([PLAIN] * 4 + [block(last=lambda x: x.t().relu().t())] + [PLAIN] * 4, 2, 8),
    ],
    ids=["equal", "two kinds", "one constant", "an int for a float", "in turn", "strides"],
)
def test_blocks_compute_what_the_whole_graph_does(row: list[Block], kinds: int, repeated: int) -> None:
    graph = in_a_row(row)
    want = graph.gm(X)
    blocks = blocks_of(graph.gm)
    assert blocks is not None
    run, compiled = eagerly(blocks, graph.mode)
    assert compiled == kinds
    assert str(blocks).startswith(f"{repeated} blocks, ")
    for _ in range(2):
        assert all(map(torch.equal, run(X), want))


def test_what_makes_every_block_another_is_said() -> None:
    graph = in_a_row([block(1.0 + 0.5 * i) for i in range(6)])
    assert blocks_of(graph.gm) is None
    said = why_distinct(graph.gm)
    assert "6 blocks call the same operators, 6 of them are distinct" in said, said
    assert "its numbers (" in said and " / ..." in said, said
    assert why_distinct(in_a_row([PLAIN] * 6).gm) == "", "nothing differs"
    assert why_distinct(in_a_row([PLAIN]).gm) == "", "nothing repeats"


def test_dtypes_and_shapes_tell_blocks_apart() -> None:
    def model(x: Tensor, w: Tensor, wide: Tensor) -> Tensor:
        for _ in range(3):
            x = PLAIN(x, w)
        x = PLAIN(x.double(), w.double()).float()
        x = x @ wide
        for _ in range(3):
            x = PLAIN(x, wide.t() @ wide)
        return x

    inputs = [X, torch.randn(8, 8) / 3, torch.randn(8, 9) / 3]
    graph = graph_of(model, *inputs)
    blocks = blocks_of(graph.gm)
    assert blocks is not None
    run, _ = eagerly(blocks, graph.mode)
    assert torch.equal(run(*inputs)[0], graph.gm(*inputs)[0])
    for region in blocks.regions:
        like = {(node.meta["val"].dtype, node.meta["val"].shape[-1]) for node in region.nodes}
        assert len(like) == 1 or blocks.regions.count(region) == 1


def test_a_value_that_is_read_far_behind_is_handed_past_other_blocks() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        skips = []
        for i in range(8):
            x = PLAIN(x, w) if i < 4 else PLAIN(x + skips.pop(), w)
            skips.append(x)
        return x + skips[1].t().sum(0, keepdim=True).sum()

    inputs = [X, torch.randn(8, 8) / 3]
    graph = graph_of(model, *inputs)
    blocks = blocks_of(graph.gm)
    assert blocks is not None and blocks.spared > 64
    run, _ = eagerly(blocks, graph.mode)
    assert torch.equal(run(*inputs)[0], graph.gm(*inputs)[0])


@pytest.mark.parametrize("read_after", [0, 7])
def test_no_cut_lies_where_a_conjugated_view_is_handed_on(read_after: int) -> None:
    """A compiler's example of it would have no such mark, and what is made of it would be another value."""

    class Turned(Row):
        def forward(self, x: Tensor) -> Tensor:
            turned = torch.view_as_complex(torch.stack([x, x / 2], -1)).conj()
            for i, (one, weight) in enumerate(zip(self.blocks, self.weights, strict=True)):
                x = one(x, weight) + turned.imag if i == read_after else one(x, weight)
            return x

    graph = graph_of(Turned([block()] * 8).requires_grad_(False), X)
    assert (blocks_of(graph.gm) is None) == (read_after == 7)


def test_outputs_may_be_inputs_views_and_numbers() -> None:
    def model(x: Tensor, w: Tensor) -> Any:
        y = x
        for _ in range(4):
            y = PLAIN(y, w)
        return x, y, y.t(), x.t(), y, None

    graph = graph_of(model, X, torch.eye(8))
    blocks = blocks_of(graph.gm)
    assert blocks is not None
    got, want = eagerly(blocks, graph.mode)[0](X, torch.eye(8)), graph.gm(X, torch.eye(8))
    assert len(got) == len(want) and got[5] is None
    assert all(map(torch.equal, got[:5], want[:5]))


@pytest.mark.parametrize(
    "last", [lambda x: x + torch.rand_like(x), lambda x: torch.nn.functional.dropout(x, 0.5)], ids=["noise", "dropout"]
)
def test_a_graph_that_draws_stays_whole(last: Callable[[Tensor], Tensor]) -> None:
    """A compiler takes seeds once a graph: ranks that cut differently would draw differently."""
    assert blocks_of(in_a_row([block(last=last)] * 5).gm) is None


def test_a_graph_that_writes_in_place_stays_whole() -> None:
    graph = in_a_row([PLAIN] * 5)
    assert blocks_of(graph.gm) is not None
    add = next(node for node in graph.gm.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    add.target = torch.ops.aten.add_.Tensor
    assert blocks_of(graph.gm) is None


def test_what_spares_little_and_what_says_no_shapes_stays_whole() -> None:
    graph = in_a_row([PLAIN] * 2)
    assert blocks_of(graph.gm) is None
    graph = in_a_row([PLAIN] * 5)
    for node in graph.gm.graph.nodes:
        node.meta.pop("val", None)
    assert blocks_of(graph.gm) is None


def test_a_value_is_gone_after_its_last_reader() -> None:
    graph = in_a_row([PLAIN] * 5)
    blocks = blocks_of(graph.gm)
    assert blocks is not None
    handed: list[weakref.ref[Tensor]] = []

    def compile(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        def run(values: list[Tensor]) -> Sequence[Tensor]:
            outputs = gm(*values)
            kept = [ref() for ref in handed]
            assert kept.count(None) >= len(handed) - 1, "only what this region reads may live"
            del kept
            values.clear()
            assert all(ref() is None for ref in handed), "nobody else holds it"
            handed.extend(map(weakref.ref, outputs))
            return outputs

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    run = blocks.compiled(graph.mode, compile)
    assert torch.equal(run(X)[0], graph.gm(X)[0])
    assert len(handed) == 5


# ------------------------------------------------------------------ stretches that ranks compile side by side


DISTINCT = [block(1.0 + 0.5 * i) for i in range(8)]
"""240 calls, no two blocks alike."""


@pytest.mark.parametrize(("most", "pieces"), [(2, 2), (4, 2), (1, 0)])
def test_without_repeats_each_rank_gets_a_stretch(most: int, pieces: int) -> None:
    graph = in_a_row(DISTINCT)
    assert blocks_of(graph.gm) is None
    cut = stretches_of(graph.gm, most)
    assert (cut is None) == (pieces == 0)
    if cut is None:
        return
    assert len(cut.regions) == pieces and str(cut).startswith(f"{pieces} stretches")
    lengths = [len(region.nodes) for region in cut.regions]
    assert max(lengths) <= 1.5 * min(lengths), lengths
    assert all(len(region.outputs) == 1 for region in cut.regions), "it is cut where one value crosses"
    run, compiled = eagerly(cut, graph.mode)
    assert compiled == pieces and all(map(torch.equal, run(X), graph.gm(X)))


def test_where_much_crosses_a_graph_stays_whole() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        values = [x]
        for one in DISTINCT:
            values.append(one(values[-1], w).relu())
            values += [values[-1] * i for i in range(10)]
        return torch.cat(values)

    graph = graph_of(model, X, torch.eye(8))
    assert len(graph.gm.graph.nodes) > 2 * STRETCH and blocks_of(graph.gm) is None
    assert stretches_of(graph.gm, 2) is None


def test_what_is_short_or_right_in_one_piece_only_stays_whole() -> None:
    assert stretches_of(in_a_row(DISTINCT[:6]).gm, 2) is None
    assert stretches_of(in_a_row([*DISTINCT, block(last=lambda x: x + torch.rand_like(x))]).gm, 2) is None
    graph = in_a_row(DISTINCT)
    add = next(node for node in graph.gm.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    add.target = torch.ops.aten.add_.Tensor
    assert stretches_of(graph.gm, 2) is None


# ------------------------------------------------------------------ with ranks


def joint_inputs() -> list[Tensor]:
    torch.manual_seed(0)
    tables = (torch.randn(1, 14, 1, 16), torch.randn(1, 14, 1, 16))
    inputs = [torch.randn(1, 10, 32), torch.randn(1, 4, 32), *(torch.randn(32, 32) / 6 for _ in range(4))]
    return [*inputs, torch.randn(16), torch.randn(16), *tables]


def ranks_of(topology: Topology, asked: Asked) -> tuple[list[Compiled], Captured, list[Tensor], Tensor]:
    inputs = joint_inputs()

    def model(
        x: Tensor, text: Tensor, to_q: Tensor, to_k: Tensor, add_q: Tensor, add_k: Tensor, norm_q: Tensor,
        norm_k: Tensor, cos: Tensor, sin: Tensor,
    ) -> Tensor:  # fmt: skip
        for _ in range(4):
            x = x + joint_attention(x, text, to_q, to_k, add_q, add_k, norm_q, norm_k, cos, sin)[:, 4:]
        return x

    got = graph_of(model, *inputs)
    ranks = [run_pipeline(State(got.gm, got.mode, topology, r, asked)) for r in range(topology.num_ranks)]
    return ranks, got, inputs, got.gm(*inputs)[0]


@pytest.mark.parametrize("parts", [(), (2,)], ids=["whole tokens", "in parts"])
def test_ranks_hand_their_shards_from_block_to_block(parts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites of repetitions are told apart, and nothing is gathered in between."""
    monkeypatch.setattr(choose_schedules, "_WORTH", float("inf"))
    topology = Topology.grid(2, 1)
    ranks, got, inputs, want = ranks_of(topology, Asked(shard_everything=True, split_batch=False, parts=parts))
    blocks = [blocks_of(compiled.gm) for compiled in ranks]
    assert all(block is not None and block.spared >= 64 for block in blocks)
    runs = [eagerly(block, got.mode)[0] for block in blocks if block is not None]

    def work(rank: int) -> list[Tensor]:
        session = current_session()
        for program, schedules in ranks[rank].programs.items():
            session.load(program, schedules)
        outs = []
        with torch.no_grad():
            for _ in range(3):
                with session.call("model", []):
                    outs.append(runs[rank](*inputs)[0])
        return outs

    for outs in run_threads(2, work):
        for out in outs:
            assert float((out - want).abs().max() / want.abs().max()) <= 1e-5
    assert len(ranks[0].report.gathered) == 1, "the output"


@pytest.mark.parametrize("stores", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["nccl", "symm_mem"])
def test_on_gpus_no_cut_lies_between_a_put_and_who_holds_its_source(
    stores: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(shard_everything=True, split_batch=False, parts=(), late_reads=True)
    ranks, got, inputs, want = ranks_of(Topology.grid(2, 1), asked)
    blocks = [blocks_of(compiled.gm) for compiled in ranks]
    for block in blocks:
        assert block is not None
        for region in block.regions:
            kinds = [str(node.target).split(".")[1] for node in region.nodes if "streamfusion" in str(node.target)]
            assert sum(kind in PUTS.values() for kind in kinds) == 3 * kinds.count(ATTEND)
    runs = [eagerly(block, got.mode)[0] for block in blocks if block is not None]

    def work(rank: int, gpu: Gpu) -> float:
        session, outs = current_session(), []
        with torch.no_grad():
            for program, schedules in ranks[rank].programs.items():
                session.load(program, schedules)
            for _ in range(3):
                with session.call("model", []):
                    outs.append(runs[rank](*inputs)[0])
            gpu.synchronize()
        return largest(float((out - want).abs().max() / want.abs().max()) for out in outs)

    for seed, policy in enumerate(POLICIES):
        assert on_fake_gpus(monkeypatch, (0, 1), work, seed, policy, stores=stores) <= 1e-5


@pytest.mark.thorough
def test_inductor_leaves_alone_what_the_puts_of_a_region_read() -> None:
    asked = Asked(shard_everything=True, split_batch=False, parts=(), late_reads=True)
    ranks, got, _, _ = ranks_of(Topology.grid(2, 1), asked)
    blocks = blocks_of(ranks[0].gm)
    assert blocks is not None
    repeated = next(one for one in blocks.regions if [other.key for other in blocks.regions].count(one.key) > 1)
    gm, inputs = repeated.as_module(blocks.gm, got.mode)
    reads, faults = disturbed_reads(wrapper_of(gm, inputs, got.mode))
    assert reads >= 3 and not faults


@pytest.mark.ranks
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.thorough)])
def test_two_ranks_compile_a_repeated_block_once(compiler: str) -> None:
    run_processes(2, compile_ranks.repeated_blocks, (compiler,), timeout_s=300.0)
