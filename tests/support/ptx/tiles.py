"""Matrix products of warps and warpgroups: how a tile lies in registers and in shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx.text import PtxError
from ptx.values import halves

Array = NDArray[Any]
_G, _T = np.arange(32) // 4, np.arange(32) % 4


def _places(rows: list[Array], columns: list[Array], width: int) -> Array:
    """Where the elements of a tile [rows, width] stand in a list [lane, element of the lane]."""
    flat = np.stack(rows, 1) * width + np.stack(columns, 1)  # [lane, element] -> place in the tile
    return np.argsort(flat.ravel())


_PAIR = (0, 0, 1, 1)
# Elements of a lane in the order of its registers, lower half first.
_A16 = _places(
    [_G + 8 * (r % 2) for r in range(4) for _ in range(2)],
    [2 * _T + i + 8 * (r // 2) for r in range(4) for i in range(2)],
    16,
)
_B16 = _places([2 * _T + i + 8 * r for r in range(2) for i in range(2)], [_G for _ in range(4)], 8)
_A8 = _places([_G + 8 * (r % 2) for r in range(4)], [_T + 4 * (r // 2) for r in range(4)], 8)
_B8 = _places([_T + 4 * r for r in range(2)], [_G, _G], 8)
_C = _places([_G + 8 * (r // 2) for r in range(4)], [2 * _T + r % 2 for r in range(4)], 8)
_C_BACK = np.argsort(_C)


def elements(registers: tuple[Array, ...], kind: str) -> Array:
    """fp32 [warps, 32 lanes x elements of a lane] of 32-bit registers that hold numbers of ``kind``."""
    bits = np.stack(registers, 1)
    if kind in ("f16", "bf16"):
        return halves(bits.view(np.uint16), kind).reshape(len(bits) // 32, -1)
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).reshape(len(bits) // 32, -1)
    return bits.view(np.float32).reshape(len(bits) // 32, -1)


def multiply(
    shape: str, kind: str, a: tuple[Array, ...], b: tuple[Array, ...], c: tuple[Array, ...]
) -> tuple[Array, ...]:
    """mma.sync of several warps: registers of the sum, fp32.

    Raises:
        PtxError: a shape that the machine does not know.
    """
    if shape == "m16n8k16" and kind in ("f16", "bf16"):
        places, depth = (_A16, _B16), 16
    elif shape == "m16n8k8" and kind == "tf32":
        places, depth = (_A8, _B8), 8
    else:
        raise PtxError(f"the machine does not know the product {shape} of {kind}")
    x = elements(a, kind)[:, places[0]].reshape(-1, 16, depth)
    y = elements(b, kind)[:, places[1]].reshape(-1, depth, 8)
    z = elements(c, "f32")[:, _C].reshape(-1, 16, 8) + x @ y
    out = z.reshape(len(z), -1)[:, _C_BACK].reshape(-1, 4)
    return tuple(np.ascontiguousarray(out[:, i]) for i in range(4))


def from_rows(rows: Array, transposed: bool) -> list[Array]:
    """ldmatrix: 8 x 8 matrices of 16-bit numbers, rows [warps, matrices, 8, 8], as a register of each."""
    if transposed:
        low, high = rows[:, :, 2 * _T, _G], rows[:, :, 2 * _T + 1, _G]
    else:
        low, high = rows[:, :, _G, 2 * _T], rows[:, :, _G, 2 * _T + 1]
    both = low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
    return [np.ascontiguousarray(both[:, i]).ravel() for i in range(both.shape[1])]


def to_rows(registers: tuple[Array, ...], transposed: bool) -> Array:
    """stmatrix: the rows [warps, matrices, 8, 8] of what registers hold."""
    bits = np.stack([register.reshape(-1, 32) for register in registers], 1)
    rows = np.zeros((*bits.shape[:2], 8, 8), np.uint16)
    low, high = (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)
    if transposed:
        rows[:, :, 2 * _T, _G], rows[:, :, 2 * _T + 1, _G] = low, high
    else:
        rows[:, :, _G, 2 * _T], rows[:, :, _G, 2 * _T + 1] = low, high
    return rows


# ---------------------------------------------------------------------- wgmma


def chunk_addresses(descriptor: int, extent: int, depth_bytes: int, depth: int, flipped: bool) -> Array:
    """Where the 16-byte pieces of an operand lie in shared memory, by its descriptor (PTX ISA, wgmma's matrix layouts).

    Args:
        extent: rows (M or N) of the operand; ``depth`` is its K, of ``depth_bytes`` in all.
        flipped: the rows are contiguous in memory ("MN-major"), else K is.

    Returns:
        K-major: [extent, depth_bytes / 16]; flipped: [depth, extent / 8].
    """
    base = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    swizzle = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62 & 3]
    if not flipped:
        row, piece = np.arange(extent)[:, None], np.arange(depth_bytes // 16)[None, :]
        step = leading if swizzle == 16 else 16
        address = base + row // 8 * stride + row % 8 * swizzle + piece * step
    else:
        k, piece = np.arange(depth)[:, None], np.arange(extent // 8)[None, :]
        pieces = swizzle // 16
        address = base + piece // pieces * leading + k // 8 * stride + k % 8 * swizzle + piece % pieces * 16
    if swizzle > 16:  # bits 4.. of the address are crossed with bits 7..
        address = address ^ ((address >> 7 & (swizzle // 16 - 1)) << 4)
    return address.astype(np.int64)


def operand(pieces: Array, kind: str, flipped: bool) -> Array:
    """fp32 [extent, depth] of an operand's pieces [..., 4] as :func:`chunk_addresses` orders them."""
    numbers = (
        halves(np.ascontiguousarray(pieces).view(np.uint16), kind)
        if kind in ("f16", "bf16")
        else pieces.view(np.float32)
    )
    table = numbers.reshape(pieces.shape[0], -1)
    return table.T if flipped else table


def group_rows(a: tuple[Array, ...], kind: str) -> Array:
    """fp32 [64, K]: an operand A in the registers of a warpgroup's four warps; K is 16, of TF32 8."""
    return elements(a, kind)[:, _A8 if kind == "tf32" else _A16].reshape(64, -1)


def group_sum(registers: list[Array]) -> Array:
    """fp32 [64, N] of a warpgroup's accumulators, N / 2 registers a thread."""
    parts = [elements(tuple(registers[i : i + 4]), "f32")[:, _C].reshape(64, 8) for i in range(0, len(registers), 4)]
    return np.concatenate(parts, 1)


def group_registers(total: Array) -> list[Array]:
    """The registers that hold a sum [64, N], as 32-bit words."""
    out: list[Array] = []
    for at in range(0, total.shape[1], 8):
        block = np.ascontiguousarray(total[:, at : at + 8], np.float32).reshape(4, -1)[:, _C_BACK].reshape(-1, 4)
        out += [np.ascontiguousarray(block[:, i]).view(np.uint32) for i in range(4)]
    return out
