from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Layout, Ownership
from sfcompile.passes.graph.local_graph import LocalGraph


@pytest.fixture
def parts() -> tuple[LocalGraph, fx.Node, Layout]:
    space, mode = LabelSpace(), FakeTensorMode()
    runs = space.fresh(9)
    local = LocalGraph(mode, Ownership(space, [runs[0]], [0], 2), 1, "test")
    node = local.graph.placeholder("x")
    with mode:
        node.meta["val"] = torch.empty(2, 9, 4)
    return local, node, Layout(1, runs)


@pytest.mark.parametrize(
    ("positions", "ops"),
    [
        (list(range(9)), []),
        ([], ["slice"]),
        ([3, 4, 5], ["slice"]),
        ([1, 3, 5, 7], ["slice"]),
        ([0, 1, 5, 6], ["slice", "slice", "cat"]),
        ([0, 2, 3, 8], ["slice", "slice", "slice", "cat"]),
    ],
)
def test_take_uses_views_where_it_can(
    parts: tuple[LocalGraph, fx.Node, Layout], positions: list[int], ops: list[str]
) -> None:
    local, node, _ = parts
    taken = local.take(node, 1, np.array(positions, dtype=np.int64))
    local.graph.output(taken)
    x = torch.randn(2, 9, 4)
    assert torch.equal(fx.GraphModule(local.root, local.graph)(x), x[:, positions])
    assert [str(n.target).split(".")[1] for n in local.graph.nodes if n.op == "call_function"] == ops


def test_many_pieces_become_one_index_and_equal_constants_are_shared(
    parts: tuple[LocalGraph, fx.Node, Layout],
) -> None:
    local, node, _ = parts
    wide = local.call(torch.ops.aten.repeat.default, [node, [1, 5, 1]], {})
    positions = np.array([i for i in range(45) if i % 4 in (0, 1)], dtype=np.int64)
    taken = [local.take(wide, 1, positions) for _ in range(2)]
    local.graph.output(tuple(taken))
    x = torch.randn(2, 9, 4)
    assert torch.equal(fx.GraphModule(local.root, local.graph)(x)[1], x.repeat(1, 5, 1)[:, positions])
    assert sum(n.op == "get_attr" for n in local.graph.nodes) == 1


def test_a_shard_of_merged_batch_and_tokens(parts: tuple[LocalGraph, fx.Node, Layout]) -> None:
    local, node, layout = parts
    merged = local.call(torch.ops.aten.reshape.default, [node, [18, 4]], {})
    local.graph.output(local.shard(merged, Layout(0, layout.runs, outer=2)))
    x = torch.randn(2, 9, 4)
    mine = local.owners.positions(layout.runs, 1)
    assert torch.equal(fx.GraphModule(local.root, local.graph)(x), x[:, mine].reshape(-1, 4))


def test_a_gather_is_a_visible_pair_with_its_site(parts: tuple[LocalGraph, fx.Node, Layout]) -> None:
    local, node, layout = parts
    whole = local.gather(local.shard(node, layout), layout, (2, 9, 4))
    assert tuple(whole.meta["val"].shape) == (2, 9, 4)
    assert local.sites[0].owned == (((0, 5),), ((5, 4),))  # type: ignore[union-attr]
    names = [str(n.target) for n in local.graph.nodes if "streamfusion" in str(n.target)]
    assert names == ["streamfusion.exchange_start.default", "streamfusion.exchange_finish.default"]


def test_a_sum_over_ranks_keeps_its_dtype(parts: tuple[LocalGraph, fx.Node, Layout]) -> None:
    local, node, _ = parts
    for dtype in (torch.int32, torch.bfloat16, torch.float64):
        part = local.call(torch.ops.aten._to_copy.default, [node], {"dtype": dtype})
        assert local.all_reduce(part).meta["val"].dtype == dtype


def test_a_view_of_a_whole_value_does_not_rely_on_its_strides(parts: tuple[LocalGraph, fx.Node, Layout]) -> None:
    local, node, _ = parts
    captured = fx.Graph()
    x = captured.placeholder("x")
    copied = local.copy(captured.call_function(torch.ops.aten.view.default, (x, [18, 4])), {x: node})
    local.graph.output(copied)
    permuted = torch.randn(4, 9, 2).permute(2, 1, 0)
    out = fx.GraphModule(local.root, local.graph)(permuted)
    assert torch.equal(out, permuted.reshape(18, 4))
