"""Running a list of calls: the same bits as fx, values freed after their last use, failures named."""

from __future__ import annotations

import json
import weakref
from typing import Any

import pytest
import torch
from models import build
from torch.library import Library

from sfcompile.errors import PackageError
from sfcompile.package.calls import CallList, OperatorCall, Ref
from sfcompile.package.graph import graph_from_json, graph_to_json
from sfcompile.package.traced import trace

ATEN = torch.ops.aten


@pytest.mark.parametrize("name", ["self", "joint", "cross"])
def test_the_runner_and_the_module_give_the_bits_of_fx(name: str) -> None:
    model, inputs = build(name)
    traced = trace(model, inputs, {})
    gm = traced.captured.gm
    values = [inputs[source] if kind == "input" else traced.weights[source] for kind, source in traced.placeholders]
    data, constants = graph_to_json(gm)
    calls = graph_from_json(json.loads(json.dumps(data)), constants)
    with torch.no_grad():
        want = gm(*values)
        for run in (calls.runner(), calls.as_module()):
            for _ in range(2):
                assert all(torch.equal(a, b) for a, b in zip(run(*values), want, strict=True))


def test_no_name_of_a_package_is_in_the_code_that_fx_writes() -> None:
    add = OperatorCall(2, "also", ATEN.add.Tensor, (Ref(0), Ref(1)), {})
    calls = CallList(["evil", "tensor", "also"], 1, {1: torch.ones(1)}, [add], [Ref(2)])
    assert "evil" not in calls.as_module().code and "also" not in calls.as_module().code


def test_lists_keywords_and_constants() -> None:
    calls = CallList(
        ["x", "c", "both", "sum", "like"],
        1,
        {1: torch.ones(2)},
        [
            OperatorCall(2, "both", ATEN.cat.default, ([Ref(0), Ref(1)],), {}),
            OperatorCall(3, "sum", ATEN.sum.default, (Ref(2),), {"dtype": torch.float64}),
            OperatorCall(4, "like", ATEN.full_like.default, (), {"self": Ref(2), "fill_value": 3}),
        ],
        [Ref(3), Ref(4), Ref(0)],
    )
    x = torch.tensor([1.0, 4.0])
    for run in (calls.runner(), calls.as_module()):
        total, like, same = run(x)
        assert total.item() == 7 and total.dtype is torch.float64 and like.tolist() == [3.0] * 4 and same is x


def test_a_value_is_freed_after_its_last_use() -> None:
    library = Library("sfcallstest", "DEF")
    library.define("watch(Tensor x) -> Tensor")
    alive: list[int] = []
    seen: list[weakref.ref[torch.Tensor]] = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in seen))
        out = x + 1
        seen.append(weakref.ref(out))
        return out

    library.impl("watch", watch, "CompositeExplicitAutograd")
    target = torch.ops.sfcallstest.watch.default
    calls = CallList(
        ["x", *(f"n{i}" for i in range(1, 7))], 1, {},
        [OperatorCall(i, f"n{i}", target, (Ref(i - 1),), {}) for i in range(1, 7)], [Ref(6)],
    )  # fmt: skip
    assert calls.runner()(torch.zeros(1))[0].item() == 6
    assert alive == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("values", [torch.tensor([9]), torch.zeros(3)])
def test_a_call_that_fails_is_named(values: Any) -> None:
    calls = CallList(
        ["x", "pick"], 1, {}, [OperatorCall(1, "pick", ATEN.index_select.default, (Ref(0), 0, Ref(0)), {})], [Ref(1)]
    )
    with pytest.raises(PackageError, match=r"a call of the package failed \((Runtime|Index)Error(.|\n)*at node `pick`"):
        calls.runner()(values)
