"""Graphs as JSON and back."""

from __future__ import annotations

import json
import operator
from typing import Any

import pytest
import torch
from helpers import captured
from torch import fx

from sfcompile.errors import PackageError, UnsupportedError
from sfcompile.package.graph import graph_from_json, graph_to_json


def there_and_back(gm: fx.GraphModule) -> fx.GraphModule:
    data, constants = graph_to_json(gm)
    return graph_from_json(json.loads(json.dumps(data)), constants)


def test_a_graph_survives() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        a, b = x.masked_fill(x > 1, float("-inf")).softmax(-1).split([2, 3], dim=1)
        y = torch.cat([a, b], dim=1).to(torch.float64) + torch.tensor([0.1, float("nan"), 1.0]).nan_to_num()
        return y.to(memory_format=torch.contiguous_format).sum(dim=-1, dtype=torch.float32)

    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).clamp(max=2).sub(1)
    gm = captured(fn, x).gm
    again = there_and_back(gm)
    assert [node.name for node in again.graph.nodes] and len(again.graph.nodes) == len(gm.graph.nodes)
    assert torch.equal(again(x)[0], gm(x)[0])


def built(target: Any, *args: Any) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2)
    graph.output((graph.call_function(target, (x, *args)),))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_values_of_every_kind_survive() -> None:
    for value in (float("inf"), 1.5, 3, True, complex(1, 2), None, [1, (2, 3)], torch.bfloat16, torch.device("cpu"),
                  torch.strided, torch.channels_last, "text"):  # fmt: skip
        again = there_and_back(built(torch.ops.aten.add.Tensor, value))
        (call,) = (node for node in again.graph.nodes if node.op == "call_function")
        assert call.args[1] == value and type(call.args[1]) in (type(value), fx.immutable_collections.immutable_list)


@pytest.mark.parametrize("target", [operator.add, print, torch.ops.streamfusion.opaque.default])
def test_python_is_refused(target: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot be exported"):
        graph_to_json(built(target, 1))
    with pytest.raises(UnsupportedError, match="it holds a set"):
        graph_to_json(built(torch.ops.aten.add.Tensor, {1}))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("aten.add.Tensor", "aten.add.Tenso", "not registered"),
        ("aten.add.Tensor", "os.system", "not registered"),
        ("aten.add.Tensor", "_dir", "not registered"),
        ('"node": "x"', '"node": "y"', "cannot be read"),
        ('["call"', '["exec"', "cannot be read"),
        ('"bfloat16"', '"load"', "cannot be read"),
        ('"dtype": "bf', '"eval": "bf', "cannot be read"),
    ],
)
def test_changed_text_is_refused(old: str, new: str, text: str) -> None:
    data, _ = graph_to_json(built(torch.ops.aten.add.Tensor, torch.bfloat16))
    assert old in json.dumps(data)
    with pytest.raises(PackageError, match=text):
        graph_from_json(json.loads(json.dumps(data).replace(old, new)), {})
