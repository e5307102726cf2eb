"""Attention on GPUs by torch's library kernels, with its log-sum-exp: FlashAttention, cuDNN, memory-efficient.

    kernel     dtypes         bias   head sizes
    flash      fp16, bf16     no     up to 256, in eights
    cudnn      fp16, bf16     no     up to 128, in eights
    efficient  also fp32      yes    any, in eights

Other head sizes are padded with zeros: of q and k they add nothing to any score, of v they make columns that are cut
off. Outputs are rounded to the inputs' dtype by the kernels and merged in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Partial = tuple[torch.Tensor, torch.Tensor]
_HALF = (torch.float16, torch.bfloat16)
_WIDEST = {"flash": 256, "cudnn": 128}

_preferred = "flash"


def prefer(name: str) -> None:
    """Take this kernel where several could: "flash" or "cudnn"; what was measured to be faster."""
    global _preferred
    assert name in _WIDEST
    _preferred = name


def fits(q: torch.Tensor) -> bool:
    """Whether a library kernel takes such queries at all."""
    return q.device.type == "cuda" and q.dtype in (*_HALF, torch.float32)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float) -> Partial:
    """Attention of q [B, H, Lq, D] with k, v [B, H, Lk, D or E]: o [B, H, Lq, E] in fp32, lse [B, H, Lq].

    Args:
        bias: boolean (True: may attend) or additive, broadcastable to [B, H, Lq, Lk].
    """
    width = v.shape[-1]
    q, k, v = _padded(q, k, v)
    if bias is not None:
        o, lse = _efficient(q, k, v, bias, scale)
    else:
        name = kernel_for(q)
        o, lse = KERNELS[name](q, k, v, scale)
    return o[..., :width].float(), lse.reshape(lse.shape[:2] + (-1,))[:, :, : q.shape[2]]


def kernel_for(q: torch.Tensor) -> str:
    """What attends (padded) queries without a bias."""
    if q.dtype not in _HALF:
        return "efficient"
    return next((name for name in (_preferred, "flash") if q.shape[-1] <= _WIDEST[name]), "efficient")


def _padded(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """All with one head size, a multiple of 8, and each head's elements side by side."""
    size = max(-(-t.shape[-1] // 8) * 8 for t in tensors)
    padded = [torch.nn.functional.pad(t, (0, size - t.shape[-1])) if t.shape[-1] < size else t for t in tensors]
    return [t if t.stride(-1) == 1 else t.contiguous() for t in padded]


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Partial:
    o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    return o, lse


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Partial:
    op = torch.ops.aten._scaled_dot_product_cudnn_attention
    o, lse, *_ = op(q, k, v, None, True, 0.0, False, False, scale=scale)
    return o, lse


def _efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float) -> Partial:
    op = torch.ops.aten._scaled_dot_product_efficient_attention
    if bias is None:
        o, lse, *_ = op(q, k, v, None, True, 0.0, False, scale=scale)
        return o, lse
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=q.dtype, device=q.device).masked_fill_(~bias, float("-inf"))
    whole = bias.to(q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    dead = (whole == float("-inf")).all(dim=-1)
    # The kernel wants rows of a multiple of 8 elements: a view of something longer.
    padded = torch.nn.functional.pad(whole, (0, -k.shape[2] % 8))[..., : k.shape[2]]
    o, lse, *_ = op(q, k, v, padded, True, 0.0, False, scale=scale)
    lse = lse[:, :, : q.shape[2]].masked_fill(dead, float("-inf"))
    return o.masked_fill(dead.unsqueeze(-1), 0.0), lse


KERNELS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], Partial]] = {
    "flash": _flash,
    "cudnn": _cudnn,
    "efficient": lambda q, k, v, scale: _efficient(q, k, v, None, scale),
}
"""By name, attention without a bias; see the head of the file."""
