"""Numbers of registers: what numpy lacks of a GPU's arithmetic, an array a register."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
U2, U4, U8, F4 = np.uint16, np.uint32, np.uint64, np.float32


def to_bf16(x: Array) -> Array:
    """fp32 to bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(x, F4).view(U4).astype(U8)
    nearest = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), U2(0x7FFF), nearest.astype(U2))


def from_bf16(bits: Array) -> Array:
    """bits of bf16 to fp32."""
    return (bits.astype(U4) << U4(16)).view(F4)


def to_tf32(x: Array) -> Array:
    """fp32 to the nearest with 10 bits of fraction, ties away from zero; as bits."""
    bits = np.ascontiguousarray(x, F4).view(U4)
    return np.where(np.isfinite(x), (bits + U4(0x1000)) & U4(0xFFFFE000), bits)


def halves(bits: Array, kind: str) -> Array:
    """16-bit numbers of "f16" or "bf16" to fp32."""
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(F4)


def to_halves(x: Array, kind: str) -> Array:
    """fp32 to the bits of 16-bit numbers."""
    return to_bf16(x) if kind == "bf16" else x.astype(np.float16).view(U2)


def packed(op: str, kind: str, *operands: Array) -> Array:
    """Arithmetic on numbers that share a register, or on single 16-bit ones.

    Args:
        kind: f16, bf16, f16x2, bf16x2 or f32x2.
        operands: bits, of equal length.
    """
    width = U8 if kind == "f32x2" else U4 if kind.endswith("x2") else U2
    base = kind.removesuffix("x2")
    if base == "f32":
        numbers = [np.ascontiguousarray(x).view(F4) for x in operands]
    else:
        numbers = [halves(np.ascontiguousarray(x).view(U2), base) for x in operands]
    result = _OPS[op](*numbers)
    return (
        np.ascontiguousarray(result, F4).view(width)
        if base == "f32"
        else np.ascontiguousarray(to_halves(result, base)).view(width)
    )


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in fp32, rounded once (nearly: by way of fp64)."""
    return (a.astype(np.float64) * b + c).astype(F4)


_OPS: dict[str, Any] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "fma": fma, "neg": lambda a: -a,
    "max": np.fmax, "min": np.fmin, "abs": np.abs,
}  # fmt: skip


def shift_left(x: Array, by: Array) -> Array:
    """PTX clamps: a shift by the width or more leaves nothing."""
    bits = x.dtype.itemsize * 8
    return np.where(by < bits, x << (by.astype(x.dtype) & x.dtype.type(bits - 1)), x.dtype.type(0))


def shift_right(x: Array, by: Array) -> Array:
    """Arithmetic for signed numbers; clamped."""
    bits = x.dtype.itemsize * 8
    clamped = np.minimum(by, type(by.flat[0])(bits - 1)).astype(x.dtype)
    return x >> clamped if x.dtype.kind == "i" else np.where(by < bits, x >> clamped, x.dtype.type(0))


def divide(x: Array, y: Array, rest: bool) -> Array:
    """Quotient towards zero, or the remainder with the sign of ``x``; by zero all ones, as on GPUs."""
    safe = np.where(y == 0, y.dtype.type(1), y)
    remainder = np.fmod(x, safe)
    result = remainder if rest else (x - remainder) // safe
    return np.where(y == 0, x if rest else x.dtype.type(-1 if x.dtype.kind == "i" else np.iinfo(x.dtype).max), result)


def high_product(x: Array, y: Array) -> Array:
    """The upper half of a product."""
    bits = x.dtype.itemsize * 8
    exact = x.astype(object) * y.astype(object)
    return np.array([int(value) >> bits for value in exact], dtype=object).astype(x.dtype)


def extract(x: Array, at: Array, count: Array) -> Array:
    """Bits ``at .. at + count`` of ``x``; with their sign if ``x`` is signed."""
    bits = x.dtype.itemsize * 8
    at, count = (np.minimum(np.asarray(v).astype(np.int64), bits) for v in (at, count))
    plain = x.view(f"u{x.dtype.itemsize}").astype(object)
    values = [
        (int(v) >> int(a)) & ((1 << int(c)) - 1)
        for v, a, c in zip(plain, *np.broadcast_arrays(at, count, x)[:2], strict=True)
    ]
    if x.dtype.kind == "i":
        values = [
            v - (1 << int(c)) if c and v >> (int(c) - 1) else v
            for v, c in zip(values, np.broadcast_to(count, x.shape), strict=True)
        ]
    return np.array(values, dtype=np.int64 if x.dtype.kind == "i" else U8).astype(x.dtype)


def permute_bytes(a: Array, b: Array, select: Array) -> Array:
    """prmt.b32: each byte of the result picks one of the eight bytes of a and b, or its sign."""
    both = a.astype(U8) | b.astype(U8) << np.uint64(32)
    result = np.zeros(len(both), U8)
    for i in range(4):
        pick = (np.asarray(select).astype(U8) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((pick & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
        byte = np.where(pick & np.uint64(8), np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0)), byte)
        result |= byte << np.uint64(8 * i)
    return result.astype(U4)


def logic3(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3.b32: any function of three bits."""
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result
