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
from sfcompile.package.calls import CallList
from sfcompile.package.graph import graph_from_json, graph_to_json


def there_and_back(gm: fx.GraphModule) -> CallList:
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
    assert len(again.names) == len(gm.graph.nodes) - 1
    assert torch.equal(again.runner()(x)[0], gm(x)[0])


def built(target: Any, *args: Any, **kwargs: Any) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2)
    graph.output((graph.call_function(target, (x, *args), kwargs),))
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize(
    ("call", "args", "kwargs"),
    [
        ("aten.mul.Tensor", (float("inf"),), {}),
        ("aten.mul.Tensor", (complex(1, 2),), {}),
        ("aten.add.Tensor", (3,), {"alpha": 1.5}),
        ("aten.sum.dim_IntList", ([0], True), {"dtype": torch.bfloat16}),
        ("aten.permute.default", ((1, 0),), {}),
        ("aten.clamp.default", (None, 2), {}),
        ("aten.gelu.default", (), {"approximate": "tanh"}),
        ("aten.zeros_like.default", (), {"device": torch.device("cpu"), "layout": torch.strided}),
        ("aten.clone.default", (), {"memory_format": torch.channels_last}),
    ],
)
def test_values_of_every_kind_survive(call: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    namespace, packet, overload = call.split(".")
    target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    (made,) = there_and_back(built(target, *args, **kwargs)).calls
    assert made.target is target and repr((made.args[1:], made.kwargs)) == repr((args, kwargs))


@pytest.mark.parametrize("target", [operator.add, print, torch.ops.streamfusion.opaque.default])
def test_python_is_refused(target: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot be exported"):
        graph_to_json(built(target, 1))
    with pytest.raises(UnsupportedError, match="it holds a set"):
        graph_to_json(built(torch.ops.aten.add.Tensor, {1}))


@pytest.mark.parametrize("target", [torch.ops.aten.add_.Tensor, torch.ops.aten.as_strided.default])
def test_operators_that_no_package_may_call_are_refused_when_written(target: Any) -> None:
    with pytest.raises(UnsupportedError, match="it (writes to its operands|says itself where in memory)"):
        graph_to_json(built(target, 1))


@pytest.mark.parametrize("name", ["__and__", "class", "x0=print(1)", "a.b", "", "größe"])
def test_a_name_that_is_no_identifier_is_replaced_when_written_and_refused_when_read(name: str) -> None:
    gm = built(torch.ops.aten.relu.default)
    next(iter(gm.graph.nodes))._rename("renamed")
    next(iter(gm.graph.nodes)).name = name
    data, _ = graph_to_json(gm)
    assert data["nodes"][0] == ["input", "node_0"]
    with pytest.raises(PackageError, match="which is no identifier or taken"):
        graph_from_json(json.loads(json.dumps(data).replace('"node_0"', json.dumps(name))), {})


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("aten.sum.dim_IntList", "aten.sum.dim_IntLis", "not registered"),
        ("aten.sum.dim_IntList", "os.system", "not registered"),
        ("aten.sum.dim_IntList", "_dir", "not registered"),
        ("aten.sum.dim_IntList", "aten.sum.__class__", "not registered"),
        ("aten.sum.dim_IntList", "aten.fill_.Scalar", "may not be called by a package: it writes"),
        ('"node": "x"', '"node": "y"', "does not stand before it"),
        ('"node": "x"', '"node": "sum_dim_int_list"', "does not stand before it"),
        ('["call", "sum_dim_int_list"', '["call", "x"', "no identifier or taken"),
        ('["call"', '["exec"', "node of kind 'exec'"),
        ('["output"', '["input"', "no output at its end"),
        ('"bfloat16"', '"load"', "no dtype 'load'"),
        ('"dtype": {', '"evil": {', "argument 'evil' is unknown"),
        ('"dtype": "bf', '"eval": "bf', "an argument is a 'eval'"),
        ("[0]", '["0"]', "argument dim is a"),
        ("[0]", "[0], false, 1", "4 arguments for at most 3"),
        ("[0]", "[[0]]", "argument dim is a"),
    ],
)
def test_changed_text_is_refused(old: str, new: str, text: str) -> None:
    data, _ = graph_to_json(built(torch.ops.aten.sum.dim_IntList, [0], dtype=torch.bfloat16))
    assert old in json.dumps(data)
    with pytest.raises(PackageError, match=text):
        graph_from_json(json.loads(json.dumps(data).replace(old, new)), {})


def test_a_constant_is_one_that_the_package_has() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor([1.0, 2.0])

    data, constants = graph_to_json(captured(fn, torch.ones(2)).gm)
    (name,) = constants
    text = json.dumps(data)
    with pytest.raises(PackageError, match="is missing"):
        graph_from_json(json.loads(text), {})
    with pytest.raises(PackageError, match="a constant has the name"):
        graph_from_json(
            {**data, "nodes": [[*node[:2], "a=1;b"] if node[0] == "constant" else node for node in data["nodes"]]},
            constants,
        )
