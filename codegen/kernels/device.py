# mypy: ignore-errors
"""Device functions of the generated kernels. The generator copies those that a kernel uses into its source.

Words of the symmetric heap that two ranks touch are only ever written with a release and read with an acquire at system
scope. The chain that makes a put visible (``sender`` may be many programs of one GPU):

    stores of every thread -> CTA barrier -> atomic add of the arrival counter (acq_rel)    each program of the sender
                                             -> last one: exchange of the signal (release)
    acquire of the signal (wait) -> CTA barrier -> loads                                    each program of the receiver

The last program's add reads what the others' adds wrote, so their stores happen before its release; an acquire that
reads the released epoch therefore sees them all (PTX memory model: causality order is transitive over scopes that
include both sides).
"""

from __future__ import annotations

import triton
import triton.language as tl

TAG_BITS = tl.constexpr(24)
SIGNAL_SET = tl.constexpr(9)
CMP_GE = tl.constexpr(5)
SPINS = tl.constexpr(1 << 26)


@triton.jit
def word(address: tl.tensor) -> tl.tensor:
    """An int64 word of the heap."""
    return address.to(tl.pointer_type(tl.int64))


@triton.jit
def wait_word(address: tl.tensor, value: tl.tensor) -> None:
    """Spin until the word holds a value or a greater one; add-0 with acquire is Triton's portable load-acquire."""
    seen = tl.atomic_add(word(address), 0, sem="acquire", scope="sys")
    while seen < value:
        seen = tl.atomic_add(word(address), 0, sem="acquire", scope="sys")


@triton.jit
def wait_word_bounded(address: tl.tensor, value: tl.tensor, report_ptr: tl.tensor, slot: tl.tensor) -> None:
    """:func:`wait_word` of debug builds: after SPINS polls the first program to give up writes what it waited for.

    ``report_ptr`` holds [given up, slot, value, value seen]. Whoever sees that one gave up gives up too, so the kernel
    ends and the host raises.
    """
    seen = tl.atomic_add(word(address), 0, sem="acquire", scope="sys")
    spins = 0
    while (seen < value) & (spins < SPINS):
        seen = tl.atomic_add(word(address), 0, sem="acquire", scope="sys")
        spins += 1
        if spins % 4096 == 0:
            if tl.atomic_add(report_ptr, 0, sem="relaxed", scope="gpu") != 0:
                spins = SPINS
    if seen < value:
        if tl.atomic_add(report_ptr, 1, sem="relaxed", scope="gpu") == 0:
            tl.store(report_ptr + 1, slot.to(tl.int64))
            tl.store(report_ptr + 2, value)
            tl.store(report_ptr + 3, seen)


@triton.jit
def last_of(counter_ptr: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Whether this program is the last of ``count`` to come here; what all of them stored happens before its return.

    The last one sets the counter back: no other program of this launch comes here again.
    """
    tl.debug_barrier()  # every thread's stores happen before thread 0's add
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="sys")
    last = before == count - 1
    if last:
        tl.atomic_xchg(counter_ptr, 0, sem="relaxed", scope="gpu")
    return last


@triton.jit
def raise_signal(address: tl.tensor, value: tl.tensor) -> None:
    """Publish a signal or a credit to a peer that loads and stores can reach."""
    tl.atomic_xchg(word(address), value, sem="release", scope="sys")


@triton.jit
def note_stranger(address: tl.tensor, signal: tl.tensor, status: tl.tensor) -> None:
    """If the chunk of this epoch came with another call's tag, write its signal to ``status``, which the host reads.

    The word does not change any more: a later epoch's chunk waits for this rank's credit. One that has not come (the
    schedule did not make this rank wait for it) says nothing.
    """
    seen = tl.atomic_add(word(address), 0, sem="relaxed", scope="sys")
    if (seen >> TAG_BITS == signal >> TAG_BITS) & (seen != signal):
        tl.atomic_xchg(word(status), seen, sem="relaxed", scope="gpu")


@triton.jit
def copy_words(
    dst: tl.tensor, src: tl.tensor, count: tl.tensor, part: tl.tensor, parts: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """This program's part of ``count`` int32 words from ``src`` to ``dst`` (byte addresses, multiples of 16)."""
    from_ptr = tl.multiple_of(src.to(tl.pointer_type(tl.int32)), 16)
    to_ptr = tl.multiple_of(dst.to(tl.pointer_type(tl.int32)), 16)
    at = part * BLOCK
    while at < count:
        i = tl.multiple_of(at, BLOCK) + tl.arange(0, BLOCK)
        tl.store(to_ptr + i, tl.load(from_ptr + i, mask=i < count), mask=i < count)
        at += parts * BLOCK


@triton.jit
def factor_of(values: tl.tensor) -> tl.tensor:
    """Bits of the fp32 factor of each row of fp32 ``values`` [rows, W]; see runtime/program/formats.py.

    The largest magnitude is found by its bits, which order nan above infinity; either gives a nan.
    """
    top = tl.minimum(tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), 0x7F800000)
    exponent = tl.maximum(((top + 0x1FFFFF) >> 23) - 8, 1)
    return tl.where(top == 0x7F800000, 0x7FC00000, exponent << 23)


@triton.jit
def inverse_of(factor: tl.tensor) -> tl.tensor:
    """One over a factor of :func:`factor_of`, both powers of two; 0 for nan."""
    return tl.where(factor == 0x7FC00000, 0, (254 << 23) - factor).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_of(values: tl.tensor) -> tl.tensor:
    """fp32 of at most 448 as e4m3, rounded to the nearest, to even between two: with integers, for every GPU.

    Below 2^-6 numbers lie 2^-9 apart: there the sum with 1.5 * 2^23 rounds 512 times the value to an integer.
    """
    bits = values.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    small = (size.to(tl.float32, bitcast=True) * 512.0 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def from_e4m3(codes: tl.tensor) -> tl.tensor:
    """e4m3 (uint8) as fp32. As a half the same bits, moved, are the number times 2^-8."""
    wide = codes.to(tl.int32)
    half = (((wide & 0x7F) << 7) | ((wide & 0x80) << 8)).to(tl.int16).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 256.0


@triton.jit
def at_most(values: tl.tensor, largest: tl.constexpr) -> tl.tensor:
    """What is beyond the largest number becomes it; nan stays."""
    low = tl.where(values > largest, largest, values)
    return tl.where(low < -largest, -largest, low)
