"""How far off what has travelled may be: element by element, and through an attention. All in fp64."""

from __future__ import annotations

import torch
from random_sites import Case

from sfcompile.runtime.program.formats import BF16, FP8, SAME

ERRORS = {SAME: 0.0, BF16: 2.0**-8, FP8: 2.0**-4}
"""The most that an element may be off, relative to it."""
SMALL_FP8 = 2.0**-17
"""The most that an element of a row of "fp8" may be off, relative to the row's largest, if that is more."""


def most_off(values: torch.Tensor, written: str) -> torch.Tensor:
    """The bound of runtime/program/formats.py, by element."""
    size = values.double().abs()
    small = SMALL_FP8 if written == FP8 else 0.0
    return torch.maximum(ERRORS[written] * size, small * size.amax(-1, keepdim=True))


def attention_off(case: Case) -> torch.Tensor:
    """By element of the output, how far off an attention may be whose chunks all travel with the site's wire.

    Scores s are off by at most ds = scale (|q| dk + dq |k| + dq dk), so a weight p becomes p' with |p' / p| within
    exp(+-2 max ds) of one; sum p' v' is off by sum p ((exp(2 max ds) - 1)(|v| + dv) + dv); and then the output travels.
    """
    site, group = case.site, case.site.heads // case.site.kv_heads
    k, v = (whole.double().repeat_interleave(group, 1) for whole in (case.k, case.v))
    q = case.q.double()
    dq, dk, dv = (most_off(x, site.written(name)) for name, x in (("q", q), ("k", k), ("v", v)))
    scores = site.scale * q @ k.transpose(-1, -2)
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if site.causal:
        hidden |= torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    if case.mask is not None and case.mask.dtype == torch.bool:
        hidden |= ~case.mask
    elif case.mask is not None:
        scores = scores + case.mask.double()
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    off = site.scale * (
        q.abs() @ dk.transpose(-1, -2) + dq @ k.abs().transpose(-1, -2) + dq @ dk.transpose(-1, -2)
    )  # fmt: skip
    grown = torch.expm1(2 * off.masked_fill(weights == 0.0, 0.0).amax(-1, keepdim=True))
    inside = grown * (weights @ (v.abs() + dv)) + weights @ dv
    return inside + most_off(case.expected.abs() + inside, site.written("o"))
