"""Which graphs draw random numbers, and the generator's state as a number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from sfcompile.capture.randomness import draws, generator_state, set_generator_state, state_mark

CPU = torch.device("cpu")


def sdpa(dropout: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=dropout)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x + torch.randn_like(x), True),
        (lambda x: x + torch.rand(4), True),
        (lambda x: F.dropout(x, 0.1, training=True), True),
        (lambda x: F.dropout(x, 0.1, training=False), False),
        (lambda x: torch.bernoulli(x.sigmoid()), True),
        (lambda x: x[..., torch.randperm(4)], True),
        (sdpa(0.0), False),
        (lambda x: x * 2, False),
    ],
)
def test_what_draws(function: Callable[[torch.Tensor], torch.Tensor], expected: bool) -> None:
    assert draws(make_fx(function)(torch.randn(1, 2, 3, 4))) is expected


def test_attention_with_dropout_draws() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    op = torch.ops.aten.scaled_dot_product_attention.default
    for arguments, keywords, expected in (((x, x, x), {}, False), ((x, x, x, None, 0.2), {}, True)):
        graph.output(graph.call_function(op, arguments, keywords))
        assert draws(torch.fx.GraphModule(torch.nn.Module(), graph)) is expected
        graph.erase_node(next(iter(reversed(graph.nodes))))


def test_a_state_is_a_number_and_can_be_put_back() -> None:
    torch.manual_seed(3)
    first, state = state_mark(CPU), generator_state(CPU)
    drawn = torch.randn(4)
    assert not torch.equal(state_mark(CPU), first)
    larger = torch.zeros(state.numel() + 24, dtype=torch.uint8)
    set_generator_state(CPU, larger[16:-8].copy_(state))
    assert torch.equal(state_mark(CPU), first) and torch.equal(torch.randn(4), drawn)
