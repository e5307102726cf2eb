"""The library's kernels as they are called: shapes that they take, what is made of what they return.

The kernels themselves need a GPU; stand-ins here check what the real ones demand and compute in fp64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfcompile.runtime.rank import attention_library
from sfcompile.runtime.rank.attention_library import attend, fits, kernel_for, prefer

INF = float("inf")
ATEN: Any = torch.ops.aten


def computed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output in q's dtype and log-sum-exp; a row without keys gets what real kernels give it: nothing sensible."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    scores = scores if bias is None else scores + bias.double()
    return (torch.softmax(scores, -1) @ v.double()).to(q.dtype), torch.logsumexp(scores, -1).nan_to_num(
        neginf=9.0
    ).float()


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins; the names of those that were called."""
    called: list[str] = []

    def flash(q: Any, k: Any, v: Any, dropout: float, causal: bool, debug: bool, *, scale: float) -> Any:
        called.append("flash")
        assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256 and not causal
        return *computed(q, k, v, None, scale), "more"

    def cudnn(
        q: Any, k: Any, v: Any, bias: Any, with_lse: bool, dropout: float, causal: bool, debug: bool, *, scale: float
    ) -> Any:
        called.append("cudnn")
        assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 128 and with_lse and not causal
        o, lse = computed(q, k, v, bias, scale)
        return o, lse.unsqueeze(-1), "more"

    def efficient(
        q: Any, k: Any, v: Any, bias: Any, with_lse: bool, dropout: float, causal: bool, *, scale: float
    ) -> Any:
        called.append("efficient")
        assert with_lse and not causal and (bias is None or bias.stride(-2) % 8 == 0)
        o, lse = computed(q, k, v, bias, scale)
        return o, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32)), "more"

    for name, kernel in (("flash", flash), ("cudnn", cudnn), ("efficient", efficient)):
        monkeypatch.setattr(ATEN, f"_scaled_dot_product_{name}_attention", kernel)
    return called


@pytest.mark.parametrize("v_head_dim", [None, 20])
@pytest.mark.parametrize("head_dim", [16, 17, 136, 300])
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_pair(dtype: torch.dtype, mask: str, head_dim: int, v_head_dim: int | None, kernels: list[str]) -> None:
    torch.manual_seed(head_dim)
    q, k = (torch.randn(2, 3, length, head_dim).to(dtype) for length in (7, 11))
    v = torch.randn(2, 3, v_head_dim or head_dim, 11).to(dtype).transpose(-1, -2)
    bias = {"none": None, "bool": torch.rand(1, 1, 7, 11) < 0.7, "additive": torch.randn(7, 11).to(dtype)}[mask]
    if bias is not None:
        bias[..., 2, :] = False if mask == "bool" else -INF  # a row that sees no key
    o, lse = attend(q, k, v, bias, head_dim**-0.5)
    scores = q.double() @ k.double().transpose(-1, -2) * head_dim**-0.5
    if bias is not None:
        scores = scores.masked_fill(~bias, -INF) if mask == "bool" else scores + bias.double()
    expected = torch.softmax(scores, -1).nan_to_num(0.0) @ v.double()
    tolerance = 2 * torch.finfo(dtype).eps * float(expected.abs().max())  # of one rounding to the dtype
    assert o.dtype == torch.float32 and o.shape == expected.shape
    assert float((o.double() - expected).abs().max()) <= tolerance
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1), atol=2e-6, rtol=2e-6)
    widest = max(head_dim, v_head_dim or 0)
    assert kernels == ["flash" if mask == "none" and dtype == torch.float16 and widest <= 256 else "efficient"]


def test_the_preferred_kernel_where_it_can(kernels: list[str]) -> None:
    q = torch.randn(1, 2, 5, 64).half()
    try:
        prefer("cudnn")
        o, lse = attend(q, q, q, None, 0.125)
        assert kernels == ["cudnn"] and lse.shape == (1, 2, 5) and o.shape == q.shape
        assert kernel_for(torch.empty(1, 2, 5, 256).half()) == "flash"
        assert kernel_for(torch.empty(1, 2, 5, 264).half()) == "efficient"
        assert kernel_for(torch.empty(1, 2, 5, 64)) == "efficient"
    finally:
        prefer("flash")
    assert attention_library.kernel_for(q) == "flash"


def test_only_gpus_have_them() -> None:
    assert not fits(torch.empty(1))
