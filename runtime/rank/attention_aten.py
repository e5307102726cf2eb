"""Attention of one (Q chunk, KV chunk) pair with its log-sum-exp, and the merge of partial results.

Two partials (o1, l1), (o2, l2) over disjoint keys, l the natural log-sum-exp of a query row's scores, merge to
    l = logaddexp(l1, l2),   o = o1 exp(l1 - l) + o2 exp(l2 - l) = o1 + (o2 - o1) sigmoid(l2 - l1)
in fp32 (fp64 for fp64 inputs). The last form rounds less: its two weights add up to one. A row that sees no key has
l = -inf, o = 0 and adds nothing.

A row that an additive mask hides as a whole by a large number (-1e4, -1e9, a format's least) has weights all the same,
of its scores as they are rounded beside that number. There l is that number plus the logarithm of about as many keys as
there are, which fp32 does not keep beside it: chunks of several sizes would count alike. On CPUs such l are computed
once more, in fp64. On GPUs that would make the host wait: there the number is taken off such a row's mask before, for
all of its keys, and where it is so large that scores vanish beside it, its query is made zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sfcompile.runtime.rank import attention_library

_FLASH_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

_HIDDEN = -1e3
"""A row whose log-sum-exp is below this is hidden by its mask."""
_LEAST = -1e10
"""Masks below this are as good as this: fp64 keeps the logarithm of a count beside it to 1e-6."""
_ROWS = 64
_ALONE = -8.0
"""Times the numbers that a format of scores keeps apart: beside a mask below this scores are nothing."""

Partial = tuple[torch.Tensor, torch.Tensor]
"""``(o [B, H, Lq, E], lse [B, H, Lq])``, fp32 or wider; lse may be wider than o."""


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    most: Callable[[], torch.Tensor] | None = None,
) -> Partial | None:
    """Attention of q [B, H, Lq, D] with k, v [B, H, Lk, D or E]; None if there is no query or no key.

    ``bias`` is boolean (True: may attend) or additive, broadcastable to [B, H, Lq, Lk]. On CPUs bf16 and fp16 are
    computed in fp32: a partial rounded to half precision before the merge would cost up to 1.8 times the error of
    one-device attention, and fp32 is as fast. GPUs' library kernels (attention_library.py) do round. ``most`` gives
    the largest bias of each of these queries to all keys, [..., Lq, 1], if these are some of the keys.
    """
    if q.numel() == 0 or k.shape[2] == 0:
        return None
    on_cpu, by_library = q.is_cpu, attention_library.fits(q)
    if bias is not None and bias.is_floating_point() and (by_library or not on_cpu):
        q, bias = _uncovered(q, bias, _most_of(bias) if most is None else most().to(q.device))
    if by_library:
        return attention_library.attend(q, k, v, bias, scale)
    wide = q.dtype
    if wide not in (torch.float32, torch.float64):
        wide = torch.promote_types(wide, torch.float32)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    dead: torch.Tensor | None = None
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=wide, device=q.device).masked_fill_(~bias, float("-inf"))
        bias = bias.to(wide)
        dead = (bias == float("-inf")).all(dim=-1)  # the flash kernel reports lse = 0 for a row without keys
    if on_cpu and q.shape[-1] == v.shape[-1]:
        o, lse = _flash_cpu(q, k, v, bias, scale)
    else:
        o, lse = _plain(q, k, v, bias, scale)
    if dead is not None:
        dead = dead.expand(lse.shape)
        lse = lse.masked_fill(dead, float("-inf"))
        o = o.masked_fill(dead.unsqueeze(-1), 0.0)
    if bias is not None and on_cpu:
        lse = _lse_of_hidden(q, k, bias, scale, lse, most or (lambda: _most_of(bias)))
    return o, lse


def _flash_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float) -> Partial:
    q, k, v = [t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v)]
    if bias is not None:
        bias = bias.expand(*bias.shape[:-1], k.shape[2])  # the kernel broadcasts every dim but this one
        bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    o, lse = _FLASH_CPU(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    return o, lse


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float) -> Partial:
    """Softmax written out, for head sizes that no flash kernel takes."""
    scores = (q * scale) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    most = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - most.masked_fill(most == float("-inf"), 0.0))
    total = weights.sum(dim=-1, keepdim=True)
    # A row without keys has a total of 0; its output is made 0 by the caller.
    return (weights @ v) / total.clamp(min=1.0), (most + total.log()).squeeze(-1)


def _most_of(bias: torch.Tensor) -> torch.Tensor:
    return bias.amax(dim=-1, keepdim=True)


def _uncovered(q: torch.Tensor, bias: torch.Tensor, most: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and their bias, of which rows that it hides as a whole by a finite number no longer hold that number; see
    the head of the file. Nothing here makes the host wait, so the bias is gone through whatever it holds.

    Args:
        most: the largest bias of each of these queries to all keys.
    """
    hidden = (most < _HIDDEN) & (most != float("-inf"))
    wide = torch.promote_types(q.dtype, torch.float32)
    alone = most.to(wide) < _ALONE / torch.finfo(wide).eps
    return q.masked_fill(hidden & alone, 0.0), bias - torch.where(hidden, most, 0.0)


def _lse_of_hidden(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    lse: torch.Tensor,
    most: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """``lse``; in fp64 if a finite mask hides some rows from all keys, with those computed once more."""
    hidden = (lse < _HIDDEN) & (lse != float("-inf"))
    if not hidden.any():
        return lse
    hidden &= most().squeeze(-1) < _HIDDEN  # keys of padding are hidden from rows that see others
    rows = hidden.any(dim=0).any(dim=0).nonzero().flatten()
    if not len(rows):
        return lse
    lse, keys = lse.double(), k.transpose(-1, -2)
    bias = bias.expand(*lse.shape, k.shape[2])
    for part in rows.split(_ROWS):
        scores = (q[:, :, part] * scale) @ keys + bias[:, :, part]
        top = scores.amax(dim=-1)
        total = torch.exp(scores - top.masked_fill(top == float("-inf"), 0.0).unsqueeze(-1)).sum(dim=-1)
        exact = top.double().clamp(min=_LEAST) + total.double().log()
        lse[:, :, part] = torch.where(hidden[:, :, part], exact, lse[:, :, part])
    return lse


def merge(a: Partial | None, b: Partial | None, into_first: bool = False) -> Partial | None:
    """Merge two partials over disjoint keys; see the head of the file.

    Args:
        into_first: the output of ``a`` may be overwritten with the result: no other memory of its size is needed.
    """
    if a is None or b is None:
        return a if b is None else b
    (o1, l1), (o2, l2) = a, b
    share = (l2 - l1).sigmoid_().nan_to_num_(0.0).to(o1.dtype).unsqueeze(-1)  # nan: neither saw a key
    return (o1.lerp_(o2, share) if into_first else o1.lerp(o2, share)), torch.logaddexp(l1, l2)
