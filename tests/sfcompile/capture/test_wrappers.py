"""Inputs that are tensors around tensors: taken apart, put together in the graph, and refused where they come out."""

from __future__ import annotations

from typing import Any

import torch
from compositions import Packed, packed
from torch import fx, nn

from sfcompile.capture.graph import capture
from sfcompile.capture.wrappers import without_wrappers
from sfcompile.errors import UnsupportedError


def dynamo(model: Any, *inputs: Any) -> tuple[fx.GraphModule, list[Any]]:
    """What Dynamo hands to a backend."""
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, values: list[Any]) -> Any:
        graphs.append((gm, values))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    return graphs[0]


def layer() -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(8, 6)
    made.weight = packed(made.weight.detach())
    return made


def test_a_weight_is_taken_apart_and_its_ops_are_in_the_graph() -> None:
    model, x = layer(), torch.randn(3, 8)
    gm, inputs = dynamo(model, x)
    plain, values, flat = without_wrappers(gm, inputs)
    assert flat is not None and not any(isinstance(value, Packed) for value in values)
    got = capture(plain, values)
    assert {value.dtype for value in values} == {torch.int8, torch.float32}
    assert len(got.parameters) == 3, "what a weight holds does not change from call to call, as the bias"
    real = [model.weight if isinstance(value, Packed) else value for value in inputs]
    tensors = [flat(real)[i] for i in got.tensor_inputs]
    with torch.no_grad():
        torch.testing.assert_close(got.gm(*tensors)[0], model(x))


def test_plain_inputs_are_left_alone() -> None:
    gm, inputs = dynamo(nn.Linear(8, 6), torch.randn(3, 8))
    plain, values, flat = without_wrappers(gm, inputs)
    assert plain is gm and values == inputs and flat is None


def test_a_wrapper_that_comes_out_is_refused() -> None:
    model = layer()

    def step(x: torch.Tensor) -> Any:
        return model(x), model.weight.detach()

    gm, inputs = dynamo(step, torch.randn(3, 8))
    plain, values, _ = without_wrappers(gm, inputs)
    try:
        capture(plain, values)
    except UnsupportedError as error:
        assert "output 1 is a Packed" in str(error)
    else:
        raise AssertionError("it was captured")
