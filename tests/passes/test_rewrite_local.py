from __future__ import annotations

import random
import time

import pytest
import torch
from graph_text import parse, same
from helpers import captured, check_sharded, placeholder_values, rewritten, run_compiled, run_lockstep, run_sharded
from hypothesis import given, note
from hypothesis import strategies as st
from random_networks import RandomNetwork
from random_ops import examples
from torch import fx
from torch.nn.functional import conv2d, gelu, group_norm, linear, scaled_dot_product_attention, silu

from sfcompile.errors import InternalError
from sfcompile.lowering.arrivals import takes_shard
from sfcompile.passes.analyse_tokens import analyse_tokens
from sfcompile.passes.choose_layouts import choose_layouts
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.stages import compute_seconds
from sfcompile.passes.place_min_cut import place_min_cut
from sfcompile.passes.rewrite_local import rewrite_local
from sfcompile.passes.rules.linked import Linked
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.topology import Topology


def test_each_value_is_gathered_at_most_once() -> None:
    def read_whole_thrice(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return y.softmax(1) + y.cumprod(1) + y.flip(1).sort(1).values

    got = captured(read_whole_thrice, torch.zeros(2, 9, 4))
    _, traffic, locals_ = rewritten(got, [(0, 1)], 3)
    assert all(len(of_rank.gathers) == len(set(of_rank.gathers)) for of_rank in traffic), "each rank gathers once"
    names = [str(n.target) for n in locals_[0].graph.nodes]
    assert names.count("streamfusion.exchange_start.default") == len(traffic[0].gathers)


def test_one_rank_of_three_slices_computes_and_gathers() -> None:
    """Rank 1 takes its rows of the input (a view, free), computes on them, and gathers them where an op mixes rows."""
    got = parse(
        """
        x: f32[1,9,4] = input
        y: f32[1,9,4] = aten.relu(x)
        z: f32[1,9,4] = aten.cumprod(y, 1)
        return z
        """
    )
    _, _, locals_ = rewritten(got, [(0, 1)], 3)  # type: ignore[arg-type]
    same(
        locals_[1].graph,
        """
        x: f32[1,9,4] = input
        slice_tensor: f32[1,3,4] = aten.slice.Tensor(x, 1, 3, 6)
        relu_default: f32[1,3,4] = aten.relu(slice_tensor)
        zeros_default: i64[1] = aten.zeros([1], dtype=torch.int64, device='cpu')
        exchange_start_default: i64[1] = streamfusion.exchange_start(relu_default, zeros_default, 'test', 0)
        exchange_finish_default: (f32[1,9,4], i64[1]) = streamfusion.exchange_finish(exchange_start_default, 'test', 0, [1, 9, 4], torch.float32)
        getitem_1: f32[1,9,4] = exchange_finish_default[0]
        z: f32[1,9,4] = aten.cumprod(getitem_1, 1)
        return z
        """,  # noqa: E501
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_outputs_leave_in_shards_and_come_in_them(parts: int) -> None:
    """One block in two graphs: the first gathers nothing, and what the second reads of it is what the first left."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 7, 8), *(0.2 * torch.randn(8, 8) for _ in range(3))]

    def before(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x @ weight for weight in weights)

    def behind(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.view(2, 7, 2, 4).transpose(1, 2) for y in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2) * 1

    topology, only = Topology.grid(1, 2), (parts,) if parts > 1 else ()
    states, graphs = [], []
    for rank in range(2):
        got = captured(before, *inputs)
        first = State(got.gm, got.mode, topology, rank, Asked(shard_everything=True, crossing=(0, 1, 2)))
        graphs.append(run_pipeline(first).gm(*inputs))
        assert not first.traffic.gathers and list(first.traffic.crossing) == [0, 1, 2]
        got = captured(behind, *before(*inputs))
        asked = Asked(shard_everything=True, split_batch=False, parts=only, arrivals=first.traffic.crossing)
        states.append(State(got.gm, got.mode, topology, rank, asked))
    (cut, *_), want = first.traffic.crossing.values(), before(*inputs)
    for rank, (results, state) in enumerate(zip(graphs, states, strict=True)):
        for place, result in enumerate(results):
            mine = torch.cat([want[place][:, first : first + n] for first, n in cut.owned[rank]], 1)
            torch.testing.assert_close(result, mine)
        gm = run_pipeline(state).gm
        assert [site.name for site in state.local.sites] == ["scaled_dot_product_attention", "output"]
        assert all(takes_shard(gm, place, cut, rank) for place in range(3))


def test_literal_sizes_are_this_ranks_own() -> None:
    got = captured(lambda x: x.reshape(2, 10, 2, 2).transpose(1, 2) * 1, torch.zeros(2, 10, 4))
    _, _, locals_ = rewritten(got, [(0, 1)], 3)
    shapes = [next(n.args[1] for n in loc.graph.nodes if "reshape" in str(n.target)) for loc in locals_]
    assert sorted(shape[1] for shape in shapes) == [3, 3, 4]


def test_source_lines_survive() -> None:
    got = captured(lambda x, w: gelu(linear(x, w)), torch.zeros(2, 9, 4), torch.zeros(4, 4))
    _, _, locals_ = rewritten(got, [(0, 1)], 2)
    node = next(n for n in locals_[0].graph.nodes if "gelu" in str(n.target))
    assert "test_rewrite_local.py" in (node.stack_trace or "")


def test_unsharded_graphs_are_copied() -> None:
    got = captured(lambda x: (x @ x.T).relu(), torch.zeros(3, 3))
    _, _, locals_ = rewritten(got, [], 2)
    before, after = (
        [str(n.target) for n in graph.nodes if n.op == "call_function"] for graph in (got.gm.graph, locals_[1].graph)
    )
    assert before == after


def test_a_rule_that_writes_a_wrong_shape_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Linked.emit

    def short(self: Linked, op: object, chosen: object, operands: list[fx.Node], local: object) -> fx.Node:
        node = right(self, op, chosen, operands, local)  # type: ignore[arg-type]
        return local._slice(node, 1, 0, 1)  # type: ignore[attr-defined,no-any-return]

    monkeypatch.setattr(Linked, "emit", short)
    with pytest.raises(InternalError, match=r"the local form of relu has shape \[2, 1, 4\], its shard has \[2, 5, 4\]"):
        rewritten(captured(lambda x: x.relu(), torch.zeros(2, 9, 4)), [(0, 1)], 2)


def test_a_wrong_rule_of_the_right_shape_is_caught_by_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Linked.emit

    def shifted(self: Linked, op: object, chosen: object, operands: list[fx.Node], local: object) -> fx.Node:
        return local.call(torch.ops.aten.roll.default, [right(self, op, chosen, operands, local), [1], [1]], {})  # type: ignore

    monkeypatch.setattr(Linked, "emit", shifted)
    with pytest.raises(AssertionError):
        check_sharded(lambda x: x.relu(), [torch.randn(2, 9, 4)], (0, 1))


def test_norms_over_tokens_keep_tokens_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their statistics are of all ranks' tokens: parts would be counted as ranks that there are not."""
    monkeypatch.setattr("sfcompile.passes.choose_schedules._WORTH", float("inf"))

    def step(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            q = (x @ w).unflatten(2, (2, 8)).transpose(1, 2)
            h = torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
            x = x + torch.nn.functional.group_norm(h.transpose(1, 2), 4).transpose(1, 2)
        return x

    torch.manual_seed(0)
    got = captured(step, torch.randn(1, 24, 16), torch.randn(16, 16))
    topology, compiled, states = Topology.grid(2, 1), [], []
    for rank in range(2):
        states.append(State(got.gm, got.mode, topology, rank, Asked(shard_everything=True, parts=(2,))))
        compiled.append(run_pipeline(states[-1]))
    assert states[0].choices.parts == 1
    assert any("meets other ranks inside" in note for note in states[0].choices.notes), states[0].choices.notes
    values = placeholder_values(got)
    for (out,) in run_compiled(compiled, topology, values):
        torch.testing.assert_close(out, got.gm(*values)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_come_with_statistics_are_right_however_slow_a_rank_is(seed: int) -> None:
    """Blocks of norm, activation and convolution through the real runtime: both banks in turn, ranks late at random."""
    draw = random.Random(seed)
    ranks, rows, batch = draw.choice([(3, 7, 2), (4, 10, 1), (4, 3, 2)])

    def net(x: torch.Tensor, w: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            h = silu(group_norm(x, 2))
            x = x + conv2d(silu(group_norm(conv2d(h, w, padding=1), 4)), w, padding=1)
        return conv2d(h + x, narrow, padding=1)

    torch.manual_seed(seed)
    got = captured(net, torch.randn(batch, 4, rows, 5), torch.randn(4, 4, 3, 3), torch.randn(2, 4, 3, 3))
    topology, compiled = Topology.grid(1, ranks), []
    for rank in range(ranks):
        state = State(got.gm, got.mode, topology, rank, Asked(shard_everything=True, split_batch=False))
        compiled.append(run_pipeline(state))
        told = [site for site in state.local.sites if len(site.shape) == 1]  # type: ignore[union-attr]
        assert len(told) == 6, "of every norm: what ranks tell, and rows with it"
    values = placeholder_values(got)
    late = [random.Random(f"{seed} {rank}") for rank in range(ranks)]
    outs = run_compiled(compiled, topology, values, lambda rank: time.sleep(late[rank].choice([0, 0, 0, 0.002])))
    for (out,) in outs:
        torch.testing.assert_close(out, got.gm(*values)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("links", "joined"), [({}, True), ({"local_bytes_per_s": 1e5}, False)])
def test_narrow_rows_go_with_statistics_where_a_message_costs_more_than_their_bytes(
    links: dict[str, float], joined: bool
) -> None:
    """Beside statistics they are fp32, so twice as long: not on a link on which that takes longer than a message."""

    def net(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return conv2d(group_norm(x * 2, 2), w, padding=1) + 1

    got = captured(net, torch.randn(1, 4, 8, 32).bfloat16(), torch.randn(4, 4, 3, 3).bfloat16())
    state = State(got.gm, got.mode, Topology.grid(1, 2, **links), 0, Asked(shard_everything=True))
    run_pipeline(state)
    assert any(len(site.shape) == 1 for site in state.local.sites) == joined  # type: ignore[union-attr]


def test_a_window_that_is_put_together_costs_nothing_but_its_rows() -> None:
    """The rank's own rows never enter an exchange, and no node that copies them is priced."""

    def net(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return conv2d(silu(group_norm(x * 2, 2)), w, padding=1) + 1

    got = captured(net, torch.randn(1, 4, 64, 64), torch.randn(4, 4, 3, 3))
    _, _, locals_ = rewritten(got, [(0, 2)], 2)
    cats = [node for node in locals_[0].graph.nodes if node.target is torch.ops.aten.cat.default and len(node.args) > 1]
    (window,) = [node for node in cats if node.args[1] == 2]
    assert window.meta["val"].shape == (1, 4, 34, 64), "a row of zeros, its own, one of the other rank"
    assert compute_seconds(window, Topology.grid(1, 2)) == 0.0
    convolution = next(node for node in locals_[0].graph.nodes if "conv2d" in str(node.target))
    assert convolution.meta["val"].shape[2] == 32, "no row is computed to be cut off"


@pytest.mark.parametrize(("grid", "taps", "stride"), [((8, 8), 3, 1), ((6, 9), 3, 1), ((8, 8), 7, 2), ((4, 3), 3, 2)])
def test_behind_a_norm_of_rows_a_window_of_columns_is_no_halo(grid: tuple[int, int], taps: int, stride: int) -> None:
    """Axes may be chosen so: the norm is cut along dim 2, its convolution along dim 3. Dims are switched as ever."""

    def net(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return conv2d(silu(group_norm(x * 2, 2)), w, padding=taps // 2, stride=stride) + 1

    got = captured(net, torch.randn(1, 4, *grid), torch.randn(4, 4, taps, taps))
    graph, dim, prefer = got.gm.graph, 2, {}
    first = next(node for node in graph.nodes if node.op == "placeholder")
    tokens = analyse_tokens(graph, [(first, 2), (first, 3)])
    for node in graph.nodes:
        dim = 3 if "conv" in str(node.target) else dim
        for one in tokens.layouts.get(node, {}).values():
            if one.dim == dim and one.plain:
                prefer[node] = one
    layouts = choose_layouts(tokens, [], 2, prefer=prefer)
    placement = place_min_cut(graph, tokens, layouts, Topology.grid(1, 2), shard_everything=True)
    assert {layouts.chosen[node].dim for node in placement.needs} == {2, 3}
    locals_ = [LocalGraph(got.mode, layouts.owners, rank, "test") for rank in range(2)]
    for local in locals_:
        rewrite_local(got.gm, tokens, layouts, placement, local)
    gms = [(fx.GraphModule(local.root, local.graph), local.sites) for local in locals_]
    values = placeholder_values(got)
    for (out,) in run_lockstep(lambda rank: gms[rank], 2, values):
        torch.testing.assert_close(out, got.gm(*values)[0], rtol=1e-5, atol=1e-5)


@examples(20)
@given(st.integers(0, 2**20), st.integers(2, 4))
def test_random_networks_on_shards(seed: int, ranks: int) -> None:
    """In fp64, where a wrong row is no rounding."""
    network = RandomNetwork(seed)
    note("\n".join([str(network.size), *network.steps]))
    run_sharded(network, network.inputs(), ranks, tolerance=1e-9)
