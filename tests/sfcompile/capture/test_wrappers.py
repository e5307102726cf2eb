"""Inputs that are tensors around tensors: taken apart, put together in the graph, and refused where they come out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compositions import Packed, packed
from torch import fx, nn

from sfcompile.capture.graph import capture
from sfcompile.capture.wrappers import without_wrappers
from sfcompile.errors import UnsupportedError
from sfcompile.torch_private import is_static_input


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
    assert len(got.parameters) == 1, "the bias; what a weight holds cannot be cut into shares of its own"
    real = [model.weight if isinstance(value, Packed) else value for value in inputs]
    tensors = [flat(real)[i] for i in got.tensor_inputs]
    assert all(one is other for one, other in zip(flat(real), flat(real), strict=True)), "weights are known by identity"
    held = [value for value in flat(real) if value is not x]
    assert len(held) >= 3 and sum(map(is_static_input, held)) >= 3
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


class Picky(Packed):
    """Knows the parts of a linear layer only, for which torch asks it in a plain run."""

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *rest: Any) -> Packed:
        return Picky(inner["data_"], inner["factor"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Picky(args[0].data_, args[0].factor)
        if func not in (torch.ops.aten.t.default, torch.ops.aten.addmm.default):
            raise NotImplementedError(f"no {func} here")
        return func(*(x.data_.float() * x.factor if isinstance(x, Picky) else x for x in args))


def test_an_op_that_a_class_does_not_know_is_refused_in_words() -> None:
    model = layer()
    model.weight = nn.Parameter(Picky(model.weight.data_, model.weight.factor), requires_grad=False)  # type: ignore[arg-type]
    gm, inputs = dynamo(model, torch.randn(3, 8))
    plain, values, _ = without_wrappers(gm, inputs)
    with pytest.raises(UnsupportedError, match=r"Picky, .* does not know aten\.linear\.default \(no aten"):
        capture(plain, values)
