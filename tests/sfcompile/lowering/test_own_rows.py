"""Graphs of ranks that differ in bounds only become one graph, which gives every rank its own rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from sfcompile.capture.graph import Captured, capture
from sfcompile.lowering.own_rows import can_take_out, differing, slices_of, take_out, with_rows

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
X, W = torch.randn(8, 32), torch.randn(32, 32)


def captured(model: Model) -> Captured:
    graphs = []

    def backend(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(capture(gm, inputs))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(X, W)
    return graphs[0]


def of_an_input(start: int) -> Model:
    return lambda x, w: torch.relu(x[start : start + 3] @ w)


def of_a_computed_value(start: int) -> Model:
    return lambda x, w: (x @ w @ w @ w).exp() + torch.arange(64.0)[4 * start : 4 * start + 8].sum()


def of_rows_of_rows(start: int) -> Model:
    return lambda x, w: x[start : start + 4][start : start + 1].neg() @ w + (w @ w @ w @ w @ w).sum()


def both(start: int) -> Model:
    return lambda x, w: x[:, start : start + 2] @ w[start : start + 2, 1:] + x[:, 1:]


@pytest.mark.parametrize("kind", [of_an_input, of_a_computed_value, of_rows_of_rows, both])
def test_two_ranks_have_one_graph_and_each_its_rows(kind: Callable[[int], Model]) -> None:
    graphs = [captured(kind(start)) for start in (0, 2)]
    texts, bounds = zip(*(slices_of(graph.gm) for graph in graphs), strict=True)
    names = differing(bounds)
    assert texts[0] == texts[1] and names
    codes = []
    for start, graph in zip((0, 2), graphs, strict=True):
        assert can_take_out(graph.gm, names)
        gm, rows = take_out(graph.gm, graph.mode, names)
        codes.append(gm.code)
        inputs = [
            X if node.meta["val"].shape == X.shape else W for node in graph.gm.graph.nodes if node.op == "placeholder"
        ]
        (out,) = with_rows(gm, rows, X.device)(*inputs)
        assert torch.equal(out, kind(start)(X, W))
    assert codes[0] == codes[1]


def test_slices_of_inputs_are_views_and_equal_ones_stay() -> None:
    graphs = [captured(both(start)) for start in (0, 2)]
    names = differing([slices_of(graph.gm)[1] for graph in graphs])
    gm, rows = take_out(graphs[1].gm, graphs[1].mode, names)
    assert len(rows) == 2 and all(each.source is not None for each in rows)
    assert gm.code.count("slice.Tensor") == 2  # both 1: are the same on all ranks


def test_a_large_copy_is_not_made_for_it() -> None:
    graph = captured(lambda x, w: torch.relu(x @ w)[2:5])
    names = set(slices_of(graph.gm)[1])
    assert names and not can_take_out(graph.gm, names)


def test_graphs_of_other_shapes_have_other_texts() -> None:
    even, uneven = (captured(lambda x, w, n=n: x[:n] @ w) for n in (4, 5))
    assert slices_of(even.gm)[0] != slices_of(uneven.gm)[0]
