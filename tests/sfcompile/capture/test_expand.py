"""Fused layers and checkpoints become the plain ops they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from helpers import captured
from torch import nn

from sfcompile.capture.graph import Captured
from sfcompile.torch_private import GraphBreak


def counts(got: Captured, name: str) -> int:
    return sum(name in str(node.target) for node in got.gm.graph.nodes)


def through(got: Captured, call: Callable[..., Any], x: torch.Tensor) -> Any:
    """What a captured graph returns: Dynamo hands it its parameters."""
    torch._dynamo.reset()
    run = torch.compile(call, backend=lambda gm, inputs: lambda *full: got.gm(*(full[i] for i in got.tensor_inputs)))
    with torch.no_grad():
        return run(x)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [None, "keys", "pairs"])
def test_a_fused_encoder_layer_is_its_ops(masked: str | None, norm_first: bool) -> None:
    torch.manual_seed(0)
    gelu = "gelu" if norm_first else "relu"
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=norm_first, activation=gelu).eval()
    x = torch.randn(2, 7, 16)
    keep = torch.arange(7)[None] < torch.tensor([[7], [5]])

    def call(x: torch.Tensor) -> torch.Tensor:
        if masked == "keys":
            return layer(x, src_key_padding_mask=~keep) * keep[..., None]
        return layer(x, src_mask=torch.ones(7, 7).triu(1).bool() if masked else None)

    with torch.no_grad():
        want = call(x)
    got = captured(call, x)
    assert counts(got, "scaled_dot_product_attention") == 1 and not counts(got, "_transformer_encoder_layer_fwd")
    torch.testing.assert_close(through(got, call, x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_fused_encoder_layer_under_autocast_has_eagers_dtype(norm_first: bool) -> None:
    """Its residuals are added in place, into the lower dtype. Both round a dozen times, not at the same places: the
    errors against fp32 are of one size."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=norm_first).eval()
    x = torch.randn(2, 7, 16)

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    with torch.no_grad():
        exact, eager = layer(x), call(x)
    ours = through(captured(call, x), call, x)
    assert ours.dtype == eager.dtype == torch.bfloat16
    assert (ours - exact).abs().max() < 2 * (eager - exact).abs().max()


def test_fused_attention_gives_its_weights_too() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()

    def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = module.out_proj
        weights = module.in_proj_weight, module.in_proj_bias, out.weight, out.bias
        return torch._native_multi_head_attention(x, x, x, 16, 4, *weights)  # type: ignore[arg-type]

    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        want = call(x)
    for mine, whole in zip(through(captured(call, x), call, x), want, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-5)


def test_checkpoints_within_checkpoints_are_opened_up_and_keep_their_lines() -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    def outer(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(inner, x.sin(), use_reentrant=False) + 1

    def call(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(outer, x, use_reentrant=False).cos()

    x = torch.randn(1, 2, 5, 4)
    got = captured(call, x)
    assert counts(got, "scaled_dot_product_attention") == 1 and not counts(got, "opaque")
    node = next(node for node in got.gm.graph.nodes if "scaled_dot" in str(node.target))
    assert "test_expand.py" in (node.stack_trace or "")
    torch.testing.assert_close(got.gm(x)[0], call(x))


def traced(call: Callable[..., Any], x: torch.Tensor) -> bool:
    """Whether torch's own Dynamo sees a function as one graph."""
    torch._dynamo.reset()
    try:
        torch.compile(call, backend="eager", fullgraph=True)(x)
    except GraphBreak:
        return False
    return True


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_sequences_are_padded_and_stacked(batch_first: bool, side: str) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        rows = [x, x[:3], x[2:]]
        return nn.utils.rnn.pad_sequence(rows, batch_first=batch_first, padding_value=2.0, padding_side=side)

    x = torch.randn(7, 4)
    if not traced(call, x):  # Dynamo of torch 2.11 breaks the graph at other sides, under any backend
        with pytest.raises(GraphBreak, match="pad_sequence"):
            captured(call, x)
        return
    got = captured(call, x)
    assert counts(got, "pad_sequence") == 0 and counts(got, "stack") == 1
    assert torch.equal(through(got, call, x), call(x))


@pytest.mark.parametrize("space", [1, 2, 3])
def test_padding_by_the_other_end_and_averages_of_all_are_plain_ops(space: int) -> None:
    """Of which each rank has its rows, and adds up its own."""
    x, pad = torch.randn(2, 3, *(5, 4, 3)[:space]), [1, 2, 0, 3, 1, 0][: 2 * space]
    average = getattr(nn.functional, f"adaptive_avg_pool{space}d")

    def call(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x, pad, mode="circular") * average(x, 1) + average(x, [1] * space)

    got = captured(call, x)
    assert not counts(got, "pad") and not counts(got, "adaptive") and counts(got, "mean") == 2
    torch.testing.assert_close(through(got, call, x), call(x))


def test_padding_and_averages_of_another_kind_stay() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(x, [1, 1, 0, 0]) + nn.functional.pad(x, (2, 0, 0, 0), mode="circular")
        return nn.functional.pad(x, (-1, 2)) + nn.functional.adaptive_avg_pool2d(x, (1, 9))

    x = torch.randn(2, 3, 5, 6)
    got = captured(call, x)
    assert counts(got, "pad") == 2 and counts(got, "adaptive") == 1
    torch.testing.assert_close(through(got, call, x), call(x))


@pytest.mark.parametrize("size", [(6, 8), (7, 9)])
def test_patches_that_touch_are_rows_and_columns(size: tuple[int, int]) -> None:
    """Also where some rows at the end are in none."""
    unfold, fold = nn.Unfold((2, 4), stride=(2, 4)), nn.Fold(size, (2, 4), stride=(2, 4))

    def call(x: torch.Tensor) -> torch.Tensor:
        return fold(unfold(x) * 2) + nn.functional.fold(nn.functional.unfold(x, 3, padding=1), size, 3, padding=1)

    x = torch.randn(2, 3, *size)
    got = captured(call, x)
    assert not counts(got, "im2col") and counts(got, "col2im") == 1, "those that overlap"
    torch.testing.assert_close(through(got, call, x), call(x))


def _written(x: torch.Tensor) -> torch.Tensor:
    x.mul_(3)
    nn.functional.relu_(x[:, :2])
    torch.add(x, 1, out=x)
    torch._foreach_mul_([x], 2.0)
    return x


@pytest.mark.parametrize("beside", [_written, torch.func.vmap(lambda row: row * 2)], ids=["writes", "vmap"])
def test_calls_whose_results_nobody_reads_stay_beside_one_that_is_opened_up(beside: Callable[..., Any]) -> None:
    """They write in place, or begin and end a vmap: a sweep for dead calls dropped them, and the result was wrong."""

    def call(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = beside(nn.functional.unfold(x, 3, padding=1))
        return out

    x = torch.randn(1, 2, 4, 4)
    got = captured(call, x)
    assert not counts(got, "im2col")
    torch.testing.assert_close(through(got, call, x), call(x))
