"""How the elements of a chunk are written while it travels: as they are, as bf16, or as fp8 with a scale for each row.

A row is one token of one head, W elements. As "fp8" it is W bytes of e4m3 (4 significant bits) and a factor of its own:

    [ e4m3: batch x heads x tokens x W | up to 3 bytes | fp32: batch x heads x tokens ]

The factor is the power of two that brings the row's largest magnitude into (224, 448], 448 being e4m3's largest number.
Powers of two are multiplied without rounding, so an element x comes back as x' with

    "bf16"   |x' - x| <= 2^-8 |x|
    "fp8"    |x' - x| <= max(2^-4 |x|, 2^-17 largest |x| of the row)

(2^-10 factors where e4m3 has no normal numbers left, and a factor is less than 1/224 of the largest.) Both hold for
magnitudes between 2^-126 and 2^127: smaller ones are off by at most 2^-126, larger ones may become infinite. What was
decoded comes back unchanged if it travels again. A row that holds an infinity or a nan comes back as nan, so that it is
seen. What would be rounded beyond the largest number of the model's dtype becomes that number.

Generated kernels write the same bytes (codegen/kernels/device.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from sfcompile.options import Wire

SAME, BF16, FP8 = "same", "bf16", "fp8"

_E4M3 = torch.float8_e4m3fn
_SCALE_BYTES = 4
_FINITE = 0x7F800000
_UP = 0x1FFFFF  # carries into the exponent what has a mantissa above 1.75
_NAN = 0x7FC00000
_BLOCK = 1 << 17
"""Elements that are encoded or decoded at a time."""

Rows = TypeVar("Rows", int, NDArray[np.int64])


def travel_bytes(written: str, rows: Rows, width: int, dtype: torch.dtype) -> Rows:
    """Bytes of ``rows`` rows of ``width`` elements of the model's ``dtype``, as they travel."""
    if written == FP8:
        return -(-rows * width // _SCALE_BYTES) * _SCALE_BYTES + rows * _SCALE_BYTES
    return rows * (width * (2 if written == BF16 else dtype.itemsize))


def form(written: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the tensor that travels for one of ``shape`` and ``dtype``."""
    if written == FP8:
        rows = math.prod(shape[:-1])
        return (travel_bytes(FP8, rows, shape[-1], dtype),), torch.uint8
    return shape, torch.bfloat16 if written == BF16 else dtype


def smaller(wire: Wire, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> Wire:
    """What of a wire makes chunks smaller than they are; the rest travels as it is."""
    widths = {"q": head_dim, "k": head_dim, "v": v_head_dim, "o": v_head_dim}

    def pays(tensor: str) -> bool:
        written, width = getattr(wire, tensor), widths[tensor]
        return travel_bytes(written, 1, width, dtype) < travel_bytes(SAME, 1, width, dtype)

    return Wire(**{tensor: getattr(wire, tensor) if pays(tensor) else SAME for tensor in widths})


def encode(values: torch.Tensor, written: str) -> torch.Tensor:
    """What travels for a chunk [..., rows, W]; the chunk itself if it travels as it is."""
    if written == SAME:
        return values
    if written == BF16:
        return values.to(torch.bfloat16, copy=True)
    packed = torch.empty(form(FP8, tuple(values.shape), values.dtype)[0], dtype=torch.uint8, device=values.device)
    codes, factors = _fp8_parts(packed, tuple(values.shape))
    packed[values.numel() : packed.numel() - factors.nbytes].zero_()
    for block in _blocks(tuple(values.shape)):
        wide = values[block].float()
        top = (wide.view(torch.int32) & 0x7FFFFFFF).amax(-1)  # bits are in the order of magnitudes, nan above infinity
        exponent = ((top + _UP >> 23) - 8).clamp_(1, 253)
        exponent = exponent.masked_fill_(top >= _FINITE, 254)  # its inverse is 0
        inverse = (254 - exponent << 23).view(torch.float32)
        factors[block].copy_(torch.where(top >= _FINITE, _NAN, exponent << 23).view(torch.float32))
        codes[block].copy_(wide * inverse.unsqueeze(-1))
    return packed


def words(wire: Wire) -> str:
    """What a wire does to what travels, with the error bounds, in a line."""
    bounds = {BF16: "2^-8 of an element", FP8: "2^-4 of an element or 2^-17 of its row's largest"}
    off = "; ".join(f"{bounds[kind]} ({kind})" for kind in (BF16, FP8) if kind in wire)
    return f"{wire}, off by at most {off}" if off else str(wire)


def decode(arrived: torch.Tensor, written: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The chunk of ``shape`` and ``dtype`` that was encoded; what arrived itself if it travels as it is."""
    if written == SAME:
        return arrived
    if written == BF16:
        return arrived.to(dtype)
    values = torch.empty(shape, dtype=dtype, device=arrived.device)
    codes, factors = _fp8_parts(arrived, shape)
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    for block in _blocks(shape):
        # torch converts e4m3 element by element. As a half the same bits, moved, are the number times 2^-8: the sign is
        # extended from bit 7 to bit 15, four bits of exponent and three of mantissa stand above seven zeros.
        bits = codes[block].view(torch.int8).to(torch.int16)
        halves = (bits & 0x7F).bitwise_left_shift_(7).bitwise_or_(bits & -0x8000).view(torch.float16)
        wide = halves.to(torch.float32).mul_(256.0).mul_(factors[block].unsqueeze(-1))
        values[block].copy_(wide.clamp_(-most, most))
    return values


def _fp8_parts(packed: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The elements and the factors of a chunk of ``shape``, as views."""
    count = math.prod(shape)
    factors = packed[packed.numel() - math.prod(shape[:-1]) * _SCALE_BYTES :].view(torch.float32)
    return packed[:count].view(_E4M3).view(shape), factors.view(shape[:-1])


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """A chunk [..., heads, tokens, W] cut so that intermediate values stay in a processor's cache."""
    if len(shape) < 3:
        yield (slice(None),)
        return
    *leading, heads, tokens, width = shape
    rows = max(1, min(tokens, _BLOCK // max(width, 1)))
    some = max(1, _BLOCK // max(rows * width, 1)) if rows == tokens else 1
    for first in product(*map(range, leading)):
        before = tuple(slice(at, at + 1) for at in first)
        for head in range(0, heads, some):
            for row in range(0, tokens, rows):
                yield (*before, slice(head, head + some), slice(row, row + rows))
