"""Matrix products in registers and in swizzled shared memory, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from ptx import tiles
from ptx.clocks import Clocks
from ptx.values import to_halves

RNG = np.random.default_rng(1)
LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def pair(table: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Two neighbours of a row in a register."""
    bits = to_halves(table, "f16").astype(np.uint32)
    return bits[row, column] | bits[row, column + 1] << np.uint32(16)


def test_mma() -> None:
    """PTX ISA, fragments of m16n8k16 and m16n8k8."""
    a, b, c = (RNG.integers(-4, 5, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    of_a = tuple(pair(a, G + 8 * (r % 2), 2 * T + 8 * (r // 2)) for r in range(4))
    of_b = tuple(pair(b.T, G, 2 * T + 8 * r) for r in range(2))
    of_c = tuple(c[G + 8 * (r // 2), 2 * T + r % 2] for r in range(4))
    got = tiles.multiply("m16n8k16", "f16", of_a, of_b, of_c)
    want = a @ b + c
    assert all(np.array_equal(got[r], want[G + 8 * (r // 2), 2 * T + r % 2]) for r in range(4))
    small_a, small_b = a[:, :8], b[:8]
    of_a = tuple(small_a[G + 8 * (r % 2), T + 4 * (r // 2)].view(np.uint32) for r in range(4))
    of_b = tuple(small_b[T + 4 * r, G].view(np.uint32) for r in range(2))
    got = tiles.multiply("m16n8k8", "tf32", of_a, of_b, of_c)
    want = small_a @ small_b + c
    assert all(np.array_equal(got[r], want[G + 8 * (r // 2), 2 * T + r % 2]) for r in range(4))


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_and_registers(transposed: bool) -> None:
    rows = RNG.integers(0, 2**16, (3, 2, 8, 8)).astype(np.uint16)
    registers = tiles.from_rows(rows, transposed)
    assert np.array_equal(tiles.to_rows(tuple(registers), transposed), rows)
    low = registers[1].reshape(3, 32)[2] & 0xFFFF
    assert np.array_equal(low, rows[2, 1].T[G, 2 * T] if transposed else rows[2, 1][G, 2 * T])


@pytest.mark.parametrize(("mode", "swizzle"), [(1, 128), (2, 64), (3, 32), (0, 16)])
def test_pieces_of_an_operand_are_told_apart(mode: int, swizzle: int) -> None:
    """Each 16-byte piece has an address of its own; within 8 rows of a swizzled tile they fill it."""
    for flipped in (False, True):
        leading, stride = (128, 256) if swizzle == 16 else (8 * swizzle * 4, 8 * swizzle)
        descriptor = mode << 62 | stride >> 4 << 32 | leading >> 4 << 16 | 1024 >> 4
        places = tiles.chunk_addresses(descriptor, 16, 32, 16, flipped)
        assert places.shape == ((16, 2) if not flipped else (16, 2))
        assert len(np.unique(places)) == places.size and (places % 16 == 0).all() and places.min() >= 1024
    if swizzle == 128:  # row r of a K-major tile: piece c lies at place c ^ r
        places = tiles.chunk_addresses(1 << 62 | 64 << 32 | 1 << 16, 8, 128, 64, False)
        assert np.array_equal(places, np.array([[r * 128 + 16 * (c ^ r) for c in range(8)] for r in range(8)]))


def test_sums_of_a_warpgroup() -> None:
    total = RNG.standard_normal((64, 32)).astype(np.float32)
    registers = tiles.group_registers(total)
    assert len(registers) == 16 and all(len(register) == 128 for register in registers)
    assert np.array_equal(tiles.group_sum(registers), total)
    assert registers[5][32 * 2 + 7].view(np.float32) == total[32 + 7 // 4, 8 + 2 * (7 % 4) + 1]


def test_clocks_keep_what_was_handed_on() -> None:
    """A chain of atomics passes on what the first released; more warps than there was room for."""
    clocks = Clocks()
    first = clocks.add(60, 0)
    second = clocks.add(60, 1)
    a, b, c = int(first[0]), int(first[1]), int(second[5])
    clocks.write(64, a, "release", 2, True, False)
    clocks.write(64, b, "relaxed", 2, True, True)
    clocks.read(64, c, "acquire", 2)
    assert clocks.seen[c, 0, a] == 1 and clocks.seen[c, 0, b] == 0 and clocks.seen[a, 0, a] == 2
    clocks.write(64, b, "relaxed", 2, True, False)  # a store that is no atomic ends the chain
    assert clocks.released[64] == []
