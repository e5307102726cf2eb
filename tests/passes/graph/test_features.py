"""Products computed by features: each rank reads its rows of the weights, and all get all features in their order."""

from __future__ import annotations

import pytest
import torch
from helpers import run_lockstep
from random_ops import rand
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear

from sfcompile.passes.graph.features import compute_by_features, site_of
from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Ownership
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView

aten = torch.ops.aten


def products(mode: FakeTensorMode, x: torch.Tensor, weights: list[torch.Tensor]) -> list[OpView]:
    """Calls of linear as they were captured: the first with a bias of its own."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"in{i}") for i in range(len(weights) + 1)]
    with mode:
        for node, value in zip(nodes, (x, *weights), strict=True):
            node.meta["val"] = torch.empty(value.shape)
    calls = [(nodes[0], nodes[1], nodes[2]), *((nodes[0], node) for node in nodes[3:])]
    ops = []
    for args in calls:
        node = graph.call_function(aten.linear.default, args)
        with mode:
            node.meta["val"] = torch.empty(*x.shape[:-1], args[1].meta["val"].shape[0])
        op = OpView.of(node)
        assert op is not None
        ops.append(op)
    return ops


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("rows", [(1,), (2, 5), ()])
def test_every_rank_has_all_features_in_their_order(ranks: int, rows: tuple[int, ...]) -> None:
    x = rand(*rows, 6)
    weights = [rand(8, 6), rand(8), rand(16, 6), rand(4, 6)]  # of the first product a bias, too
    places = tuple(reversed(range(ranks)))  # of ranks that hold their stretches in another order than their own
    want = [linear(x, weights[0], weights[1]), linear(x, weights[2]), linear(x, weights[3])]

    def make(rank: int) -> tuple[fx.GraphModule, list[object]]:
        mode = FakeTensorMode()
        ops = products(mode, x, weights)
        local = LocalGraph(mode, Ownership(LabelSpace(), [], [], ranks), rank, "test")
        inputs = [local.graph.placeholder(f"in{i}") for i in range(len(weights) + 1)]
        with mode:
            for node, value in zip(inputs, (x, *weights), strict=True):
                node.meta["val"] = torch.empty(value.shape)
        outs = compute_by_features(local, ops, inputs[0], [inputs[1:3], inputs[3:4], inputs[4:]], places)
        assert local.sites == [site_of([op.node for op in ops], places)]
        read = [node.meta["val"].shape[0] for node in local.graph.nodes if node.target is aten.slice.Tensor]
        assert {8 // ranks, 16 // ranks, 4 // ranks} <= set(read)
        local.graph.output(tuple(outs))
        return fx.GraphModule(local.root, local.graph), list(local.sites)

    for outs in run_lockstep(make, ranks, [x, *weights]):
        for out, whole in zip(outs, want, strict=True):
            assert out.shape == whole.shape and out.is_contiguous()
            # Sums of six products in fp32, in an order that the number of features may change.
            torch.testing.assert_close(out, whole, rtol=1e-6, atol=1e-6)
