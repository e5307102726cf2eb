"""The text of a graph differs wherever a capture could, and there is none where a name does not say what is called."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from sfcompile.capture.graph_key import NoText, name_of, text_of_capture

X = torch.randn(4, 6)


def text(
    function: Callable[..., Any], *inputs: Any, around: contextlib.AbstractContextManager[Any] | None = None
) -> str:
    texts: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with around or contextlib.nullcontext():
            texts.append(text_of_capture(gm, inputs))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend)(*inputs)
    return texts[0]


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Scaled(nn.Module):
    def __init__(self, values: torch.Tensor, parameter: bool) -> None:
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=False) if parameter else values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.values


def variants(kind: str) -> list[str]:
    match kind:
        case "sizes":
            return [text(doubled, x) for x in (X, X[:2], X.t(), X.double(), X[:, None])]
        case "numbers":
            return [text(lambda x, n=n: x.add(n), X) for n in (1, 1.0, 2)]
        case "calls":
            return [text(function, X) for function in (lambda x: x.cos(), lambda x: x.sin(), lambda x: x.sin().sin())]
        case "weights or inputs":
            return [text(Scaled(torch.ones(6), parameter), X) for parameter in (False, True)]
        case "requires_grad":
            return [text(doubled, x) for x in (X, X.clone().requires_grad_())]
        case "state":
            states = [
                contextlib.nullcontext(), torch.enable_grad(), torch.autocast("cpu"), torch.inference_mode(),
                torch.autocast("cpu", torch.float16), torch.nn.attention.sdpa_kernel(
                    torch.nn.attention.SDPBackend.MATH), torch.device("meta"),
            ]  # fmt: skip
            return [text(doubled, X, around=state) for state in states]
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["sizes", "numbers", "calls", "weights or inputs", "requires_grad", "state"])
def test_another_capture_has_another_text(kind: str) -> None:
    texts = variants(kind)
    assert len(set(texts)) == len(texts)


def test_the_same_again_has_the_same_text_whatever_the_values() -> None:
    assert text(doubled, X) == text(doubled, torch.zeros(4, 6))


def test_constants_count_byte_by_byte() -> None:
    def graph(values: torch.Tensor) -> fx.GraphModule:
        root = nn.Module()
        root.register_buffer("values", values)
        fresh = fx.Graph()
        x = fresh.placeholder("x")
        fresh.output((fresh.call_function(torch.add, (x, fresh.get_attr("values"))),))
        return fx.GraphModule(root, fresh)

    values = torch.zeros(100_000)
    other = values.clone()
    other[77_777] = 1e-30  # no sample of a fingerprint lies there
    texts = [text_of_capture(graph(each), [X]) for each in (values, other, values.clone())]
    assert texts[0] == texts[2] != texts[1]


def mine(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def test_what_has_no_text() -> None:
    torch.compiler.allow_in_graph(mine)
    with pytest.raises(Exception, match="not torch's") as caught:
        text(lambda x: mine(x), X)
    assert isinstance(caught.value.__cause__ or caught.value, NoText) or "NoText" in str(caught.value)
    with torch.library._scoped_library("of_a_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeImplicitAutograd")
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output((graph.call_function(torch.ops.of_a_test.twice.default, (x,)),))
        with pytest.raises(NoText, match="another library"):
            text_of_capture(fx.GraphModule(nn.Module(), graph), [X])


@functools.wraps(torch.nn.functional.gelu)
def another_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 3


def test_a_borrowed_name_is_none() -> None:
    part = functools.update_wrapper(functools.partial(another_gelu), torch.nn.functional.gelu)
    for function in (another_gelu, torch.no_grad()(another_gelu), part):
        with pytest.raises(NoText):
            name_of(function)
    own = torch.nn.functional
    for function in (own.gelu, own.silu, own.layer_norm, torch.add, torch.Tensor.add, torch.split):
        assert name_of(function)


def test_a_conjugated_constant_has_no_text() -> None:
    root = nn.Module()
    root.register_buffer("turns", torch.ones(3, dtype=torch.complex64).conj())
    graph = fx.Graph()
    graph.output((graph.call_function(torch.view_as_real, (graph.call_function(torch.resolve_conj, (graph.get_attr(
        "turns"),)),)),))  # fmt: skip
    with pytest.raises(NoText, match="conjugated"):
        text_of_capture(fx.GraphModule(root, graph), [])
