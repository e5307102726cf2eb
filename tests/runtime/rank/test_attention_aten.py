"""Attention with its log-sum-exp, and the merge, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfcompile.runtime.rank import attention_library
from sfcompile.runtime.rank.attention_aten import attend, merge

INF = float("inf")
ATEN: Any = torch.ops.aten


def exact(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Scores in fp64, masked."""
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    if bias is None:
        return scores
    return scores.masked_fill(~bias, -INF) if bias.dtype == torch.bool else scores + bias.double()


@pytest.mark.parametrize("head_dim", [1, 8, 40, 64, 72, 128, 256])
@pytest.mark.parametrize("v_head_dim", [None, 24])
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_one_pair(head_dim: int, v_head_dim: int | None, mask: str) -> None:
    torch.manual_seed(head_dim)
    q, k = torch.randn(2, 7, 3, head_dim).transpose(1, 2), torch.randn(2, 3, 11, head_dim)
    v = torch.randn(2, 3, v_head_dim or head_dim, 11).transpose(-1, -2)
    bias = {"none": None, "bool": torch.rand(1, 1, 7, 11) < 0.7, "additive": torch.randn(7, 11)}[mask]
    if bias is not None:
        bias[..., 2, :] = False if mask == "bool" else -INF  # a row that sees no key
    done = attend(q, k, v, bias, head_dim**-0.5)
    assert done is not None
    scores = exact(q, k, bias, head_dim**-0.5)
    torch.testing.assert_close(done[1].double(), torch.logsumexp(scores, -1), atol=2e-6, rtol=2e-6)
    expected = torch.softmax(scores, -1).nan_to_num(0.0) @ v.double()
    torch.testing.assert_close(done[0].double(), expected, atol=2e-6, rtol=2e-6)
    if mask != "none":
        assert (done[0][:, :, 2] == 0).all() and (done[1][:, :, 2] == -INF).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 16, 32).to(dtype) for _ in range(3))
    done = attend(q, k, v, torch.rand(16, 16) < 0.8, 0.2)
    assert done is not None and done[1].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("shape", [(5, 1), (1, 7), (1, 1, 5, 1), (2, 1, 1, 7), (1, 3, 5, 7), (1,), (7,)])
def test_masks_broadcast(shape: tuple[int, ...]) -> None:
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    bias = torch.randn(shape)
    done = attend(q, k, v, bias, 0.3)
    assert done is not None
    expected = torch.softmax(exact(q, k, bias, 0.3), -1) @ v.double()
    torch.testing.assert_close(done[0].double(), expected, atol=2e-6, rtol=2e-6)


def test_nothing_to_attend_is_none() -> None:
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 5, 8)
    assert attend(q[:, :, :0], k, k, None, 1.0) is None
    assert attend(q, k[:, :, :0], k[:, :, :0], None, 1.0) is None


def test_merge_of_any_cut_is_the_whole() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16)
    bias = torch.randn(9, 30).masked_fill(torch.rand(9, 30) < 0.4, -INF)
    bias[3], bias[5, :10] = -INF, -INF
    total = None
    for start, stop in ((0, 10), (10, 10), (10, 23), (23, 30)):
        part = attend(q, k[:, :, start:stop], v[:, :, start:stop], bias[:, start:stop], 0.25)
        total = merge(total, part)
    assert total is not None
    expected = torch.softmax(exact(q, k, bias, 0.25), -1).nan_to_num(0.0) @ v.double()
    torch.testing.assert_close(total[0].double(), expected, atol=2e-6, rtol=2e-6)
    assert (total[0][:, :, 3] == 0).all() and (total[1][:, :, 3] == -INF).all()


def test_merge_with_nothing_is_the_other_itself() -> None:
    part = (torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2))
    assert merge(None, part) is part and merge(part, None) is part and merge(None, None) is None


def test_merge_into_the_first_is_the_same_to_the_last_bit() -> None:
    torch.manual_seed(0)
    a, b = ((torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5)) for _ in range(2))
    want, kept = merge(a, b), b[0].clone()
    merged = merge(a, b, into_first=True)
    assert want is not None and merged is not None
    assert merged[0] is a[0] and torch.equal(merged[0], want[0]) and torch.equal(merged[1], want[1])
    assert torch.equal(b[0], kept)


def test_merge_survives_scores_far_apart() -> None:
    far, near = (
        (torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), -3e38)),
        (torch.full((1, 1, 1, 2), 5.0), torch.zeros(1, 1, 1)),
    )
    for a, b in ((far, near), (near, far)):
        merged = merge(a, b)
        assert merged is not None and merged[0].tolist() == [[[[5.0, 5.0]]]] and merged[1].item() == 0.0


LEAST = float(torch.finfo(torch.float32).min)


@pytest.mark.parametrize("v_head_dim", [16, 24])
@pytest.mark.parametrize(("hides", "tolerance"), [(-1e4, 1e-4), (-1e9, 2e-6), (LEAST, 2e-6)])
@pytest.mark.parametrize("shape", [(9, 23), (2, 1, 9, 23), (1, 1, 9, 1)])
def test_rows_that_a_number_hides_as_a_whole(
    hides: float, tolerance: float, v_head_dim: int, shape: tuple[int, ...]
) -> None:
    """What is between chunks of several sizes is as in one softmax: scores are rounded beside the number."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 9, 16), torch.randn(2, 3, 23, 16), torch.randn(2, 3, 23, v_head_dim)
    bias = torch.where(torch.rand(shape) < 0.5, 0.0, hides)
    bias[..., 4:7, :] = hides
    bias[..., 7, :] = -INF
    scores = (q @ k.transpose(-1, -2)) * 0.3 + bias
    want = torch.softmax(scores.double(), -1).nan_to_num(0.0) @ v.double()
    parts = [slice(0, 2), slice(2, 3), slice(3, 15), slice(15, 23)]
    whole = None
    for part in parts:
        piece = bias[..., part] if bias.shape[-1] > 1 else bias
        whole = merge(whole, attend(q, k[:, :, part], v[:, :, part], piece, 0.3, lambda: bias.amax(-1, keepdim=True)))
    assert whole is not None and whole[0].dtype == torch.float32
    torch.testing.assert_close(whole[0].double(), want, atol=tolerance, rtol=tolerance)


def library_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, *more: Any, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the memory-efficient kernel computes, a log-sum-exp in fp32 too, which keeps no logarithm beside 1e9."""
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale + bias.float()
    most = scores.amax(-1)
    weights = torch.exp(scores - most.masked_fill(most == -INF, 0.0).unsqueeze(-1))
    total = weights.sum(-1)
    return ((weights @ v.float()) / total.unsqueeze(-1)).to(q.dtype), most + total.log()


@pytest.mark.parametrize(("hides", "tolerance"), [(-1e4, 2e-3), (-3e8, 2e-6), (-1e9, 2e-6), (LEAST, 2e-6)])
@pytest.mark.parametrize("shape", [(9, 23), (2, 1, 9, 23), (1, 1, 9, 1)])
def test_rows_that_a_number_hides_on_gpus(
    hides: float, tolerance: float, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CPUs, and the host reads nothing: a query that its scores are nothing to is zero, the number taken off."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 9, 16), torch.randn(2, 3, 23, 16), torch.randn(2, 3, 23, 16)
    bias = torch.where(torch.rand(shape) < 0.5, 0.0, hides)
    bias[..., 4:7, :] = hides
    bias[..., 7, :] = -INF
    scores = (q @ k.transpose(-1, -2)) * 0.3 + bias
    want = torch.softmax(scores.double(), -1).nan_to_num(0.0) @ v.double()
    monkeypatch.setattr(attention_library, "fits", lambda q: True)
    monkeypatch.setattr(ATEN, "_scaled_dot_product_efficient_attention", library_kernel)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("the host waits"))
    whole = None
    for part in [slice(0, 2), slice(2, 3), slice(3, 15), slice(15, 23)]:
        piece = bias[..., part] if bias.shape[-1] > 1 else bias
        whole = merge(whole, attend(q, k[:, :, part], v[:, :, part], piece, 0.3, lambda: bias.amax(-1, keepdim=True)))
    assert whole is not None
    monkeypatch.undo()
    torch.testing.assert_close(whole[0].double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_one_device(dtype: torch.dtype) -> None:
    """Contract D10: error against fp64 at most 1.2 times that of one-device attention, here cut in four."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 8, 256, 64).to(dtype) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    one = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    total = None
    for start in range(0, 256, 64):
        total = merge(total, attend(q, k[:, :, start : start + 64], v[:, :, start : start + 64], None, 64**-0.5))
    assert total is not None
    worst, rms = (
        (lambda t: float((t.double() - expected).abs().max())),
        (lambda t: float((t.double() - expected).norm())),
    )
    assert worst(total[0].to(dtype)) <= 1.2 * worst(one)
    assert rms(total[0].to(dtype)) <= 1.2 * rms(one)
