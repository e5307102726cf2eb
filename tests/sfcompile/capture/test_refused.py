"""Graphs that take derivatives, and tensors that are not what they look like, are not captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import captured
from torch import fx
from torch._dynamo.exc import BackendCompilerFailed
from torch.testing._internal.two_tensor import TwoTensor

from sfcompile.capture.refused import refuse_odd_tensors
from sfcompile.errors import UnsupportedError


def _square_with_gradients_on(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return (x * w).square()


def _derivative(x: torch.Tensor, w: torch.Tensor) -> Any:
    return torch.func.grad(lambda v: (v * w).square().sum())(x)


@pytest.mark.parametrize(
    ("function", "wanted", "text"),
    [
        (_square_with_gradients_on, True, "turns gradients on, and its result wants them"),
        (_derivative, False, "takes derivatives"),
    ],
)
def test_derivatives_are_refused(function: Callable[..., Any], wanted: bool, text: str) -> None:
    x, w = torch.randn(2, 5), torch.randn(5, requires_grad=wanted)
    with pytest.raises(BackendCompilerFailed, match=f"UnsupportedError: .*{text}"):
        captured(function, x, w)


@torch.no_grad()
def test_gradients_that_nobody_can_want_are_no_reason() -> None:
    x, w = torch.randn(2, 5), torch.randn(5, requires_grad=True)
    got = captured(_square_with_gradients_on, x, w.detach())
    assert torch.equal(got.gm(x, w.detach())[0], (x * w).square())

    def dropped(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return _square_with_gradients_on(x, w).detach()

    assert torch.equal(captured(dropped, x, w).gm(x, w)[0], (x * w).square())


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "wrapper": lambda: TwoTensor(torch.ones(5), torch.zeros(5)),
    "sparse": lambda: torch.eye(5).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(5, 4)], layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_with_a_meaning_of_their_own_are_refused(kind: str) -> None:
    gm = fx.symbolic_trace(lambda x, odd: (x + 1, odd * 2))
    refuse_odd_tensors(gm, [torch.ones(5), torch.nn.Parameter(torch.ones(5))])
    with pytest.raises(UnsupportedError, match="input 'odd' is a .* plain dense tensors only"):
        refuse_odd_tensors(gm, [torch.ones(5), ODD[kind]()])


def test_a_wrapper_is_not_taken_for_what_it_looks_like() -> None:
    with pytest.raises(BackendCompilerFailed, match="UnsupportedError: .* is a .* plain dense tensors only"):
        captured(lambda x, w: x * w, torch.ones(2, 5), ODD["wrapper"]())


def test_a_class_that_keeps_torchs_meaning_is_plain() -> None:
    class Named(torch.Tensor):
        pass

    assert captured(lambda x: x + 1, torch.ones(3).as_subclass(Named)).gm(torch.ones(3))[0].tolist() == [2.0] * 3


def test_a_graph_that_gives_a_tensor_other_memory_is_refused() -> None:
    weight, kept = torch.nn.Parameter(torch.zeros(8, 8), requires_grad=False), torch.ones(8, 8)

    def step(x: torch.Tensor) -> torch.Tensor:
        weight.data = kept.clone()
        return x @ weight

    with (
        torch.no_grad(),
        pytest.raises(BackendCompilerFailed, match="UnsupportedError: the graph gives a tensor other"),
    ):
        captured(step, torch.randn(3, 8))


def test_an_op_that_writes_in_secret_is_refused() -> None:
    """As kernels of quantised attention are registered: the output is an argument like others."""
    with torch.library._scoped_library("secret", "FRAGMENT") as library:
        library.define("attend(Tensor q, Tensor out) -> Tensor")
        library.impl("attend", lambda q, out: q.sum(), "CPU")
        torch.library.register_fake("secret::attend", lambda q, out: q.new_empty(()), lib=library)

        def call(x: torch.Tensor, written: bool) -> torch.Tensor:
            out = torch.zeros_like(x) if written else torch.empty_like(x)
            torch.ops.secret.attend(x, out)
            return out + 1

        with pytest.raises(BackendCompilerFailed, match="UnsupportedError: secret.attend is given memory that nobody"):
            captured(call, torch.randn(3), False)
        captured(call, torch.randn(3), True)
        gone = lambda x: (torch.ops.secret.attend(x, x.new_empty(0)), x.new_empty(3))[0]  # noqa: E731
        captured(gone, torch.randn(3))
