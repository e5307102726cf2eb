"""Instructions that only compute, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.litmus import run
from ptx.text import PtxError, read_entry, split_list
from ptx.values import from_bf16, to_bf16, to_tf32

LOAD = "mov.u32 %r90, %tid.x;\nmul.wide.u32 %rd40, %r90, 8;\nadd.s64 %rd41, %rd0, %rd40;\nadd.s64 %rd42, %rd1, %rd40;\n"
RNG = np.random.default_rng(0)
WORDS = np.concatenate([RNG.integers(0, 2**32, 28, dtype=np.uint64), np.array([0, 1, 2**31, 2**32 - 1], np.uint64)])


def computed(code: str) -> np.ndarray:
    """What ``code`` makes of %r1, %r2 (the halves of a 64-bit word %rd2 of each thread) in %rd3, by thread."""
    source = WORDS | WORDS[::-1] << np.uint64(32)
    out = np.zeros(32, np.uint64)
    text = (
        LOAD + "ld.global.b64 %rd2, [%rd41];\nmov.b64 {%r1, %r2}, %rd2;\n" + code + "\nst.global.b64 [%rd42+0], %rd3;"
    )
    run([text], [source, out])
    return out


A, B = WORDS.astype(np.uint32), WORDS[::-1].astype(np.uint32)
SA, SB = A.view(np.int32).astype(np.int64), B.view(np.int32).astype(np.int64)


def _quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array(
        [int(abs(int(a)) // abs(int(b))) * (1 if (a < 0) == (b < 0) else -1) for a, b in zip(x, y, strict=True)]
    )


@pytest.mark.parametrize(
    ("code", "want"),
    [
        ("add.s32 %r3, %r1, %r2;", SA + SB),
        ("sub.s32 %r3, %r1, %r2;", SA - SB),
        ("mul.lo.s32 %r3, %r1, %r2;", SA * SB),
        ("mad.lo.s32 %r3, %r1, 3, %r2;", SA * 3 + SB),
        ("mul.hi.u32 %r3, %r1, %r2;", (A.astype(np.uint64) * B) >> np.uint64(32)),
        ("and.b32 %r3, %r1, 255;", A & 255),
        ("shl.b32 %r3, %r1, 5;", A.astype(np.int64) << 5),
        ("shr.s32 %r3, %r1, 5;", SA >> 5),
        ("mov.b32 %r4, 40;\nshr.u32 %r3, %r1, %r4;", A * 0),
        ("shr.u32 %r3, %r1, 31;", A >> 31),
        ("bfe.u32 %r3, %r1, 4, 9;", (A >> 4) & 511),
        ("bfe.s32 %r3, %r1, 4, 1;", -((SA >> 4) & 1)),
        ("min.s32 %r3, %r1, %r2;", np.minimum(SA, SB)),
        ("neg.s32 %r3, %r1;", -SA),
        ("or.b32 %r4, %r2, 1;\ndiv.s32 %r3, %r1, %r4;", _quotient(SA, (SB | 1))),
        ("or.b32 %r4, %r2, 1;\nrem.s32 %r3, %r1, %r4;", SA - _quotient(SA, SB | 1) * (SB | 1)),
        ("setp.lt.s32 %p1, %r1, %r2;\nselp.b32 %r3, %r1, %r2, %p1;", np.minimum(SA, SB)),
        ("setp.lt.u32 %p1, %r1, %r2;\nmov.b32 %r3, 7;\n@%p1 mov.b32 %r3, %r1;", np.where(A < B, A, 7)),
        ("setp.lt.u32 %p1, %r1, %r2;\nmov.b32 %r3, 7;\n@!%p1 bra Z;\nmov.b32 %r3, %r1;\nZ:", np.where(A < B, A, 7)),
        ("prmt.b32 %r3, %r1, %r2, 0x5410;", (A & 0xFFFF) | (B & 0xFFFF).astype(np.uint64) << np.uint64(16)),
        ("mov.b32 {%rs1, %rs2}, %r1;\nmov.b32 %r3, {%rs2, %rs1};", (A >> 16) | (A << 16)),
    ],
)  # fmt: skip
def test_integers(code: str, want: np.ndarray) -> None:
    got = computed(code + "\ncvt.u64.u32 %rd3, %r3;")
    assert np.array_equal(got.astype(np.uint32), np.asarray(want).astype(np.int64).astype(np.uint32))


def test_wide_products_and_signs() -> None:
    assert np.array_equal(computed("mul.wide.s32 %rd3, %r1, %r2;").view(np.int64), SA * SB)
    assert np.array_equal(
        computed("mad.wide.s32 %rd3, %r1, 8, %rd2;").view(np.int64),
        SA * 8 + (A.astype(np.int64) | B.astype(np.int64) << 32),
    )
    assert np.array_equal(computed("cvt.s64.s32 %rd3, %r1;").view(np.int64), SA)


def test_numbers_of_sixteen_bits() -> None:
    x = np.array([1.0, -2.5, np.inf, 1.00390625, 1.01171875, -0.0], np.float32)  # two ties, to even
    want = np.array([0x3F80, 0xC020, 0x7F80, 0x3F80, 0x3F82, 0x8000], np.uint16)
    assert np.array_equal(to_bf16(x), want)
    assert np.array_equal(from_bf16(want), np.array([1.0, -2.5, np.inf, 1.0, 1.015625, -0.0], np.float32))
    assert to_tf32(np.array([1.0 + 2**-11], np.float32)).view(np.float32)[0] == np.float32(1.0 + 2**-10)
    got = computed("cvt.rn.f32.s32 %r3, %r1;\ncvt.rn.f16x2.f32 %r4, %r3, 0f3F800000;\ncvt.u64.u32 %rd3, %r4;")
    assert np.array_equal(got.astype(np.uint32) & 0xFFFF, np.full(32, 0x3C00))
    product = computed("mov.b32 %r1, 0x3F804000;\nmul.bf16x2 %r3, %r1, %r1;\ncvt.u64.u32 %rd3, %r3;")
    assert (product == 0x3F804080).all()


def test_lanes_exchange() -> None:
    assert np.array_equal(
        computed("shfl.sync.bfly.b32 %r3, %r1, 5, 31, -1;\ncvt.u64.u32 %rd3, %r3;").astype(np.uint32),
        A[np.arange(32) ^ 5],
    )
    assert (computed("shfl.sync.idx.b32 %r3, %r1, 3, 31, -1;\ncvt.u64.u32 %rd3, %r3;").astype(np.uint32) == A[3]).all()
    for name, whole in (("max.s32", SA.max()), ("min.u32", A.min()), ("or.b32", np.bitwise_or.reduce(A))):
        every = computed(f"redux.sync.{name} %r3, %r1, -1;\ncvt.u64.u32 %rd3, %r3;").astype(np.uint32)
        assert (every == np.int64(whole).astype(np.uint32)).all(), name


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(PtxError, match="does not know frobnicate"):
        computed("frobnicate.b32 %r3, %r1;")
    with pytest.raises(PtxError, match="no kernel"):
        read_entry("nothing")
    assert split_list("{%r1, %r2}, [%rd1+8], 5") == ("{%r1, %r2}", "[%rd1+8]", "5")
