# mypy: ignore-errors
"""Device functions of the generated kernels. The generator copies those that a kernel uses into its source.

Words of the symmetric heap that two ranks touch are only ever written with a release and read with an acquire at system
scope. The chain that makes a put visible (``sender`` may be many programs of one GPU):

    stores of every thread -> CTA barrier -> atomic add of the arrival counter (acq_rel)    each program of the sender
                                             -> last one: exchange of the signal (release)
    acquire of the signal (wait) -> CTA barrier -> loads                                    each program of the receiver

The last program's add reads what the others' adds wrote, so their stores happen before its release; an acquire that
reads the released epoch therefore sees them all (PTX memory model: causality order is transitive over scopes that
include both sides). What a network card wrote is ordered by the same acquire: NVSHMEM's own wait (3.4.5) is a bare
volatile loop, after which loads of the chunk might still be served from before.

A wait ends when its time is up, or when the host says so. Then the program goes on with what is there, so that the
kernel ends, and *nothing of it may leave this rank*: ``gave_up``, which is never taken back, is looked at before each
signal is raised. A program gives up before it counts itself at the arrival counter, and the last one looks after its
own count; so it sees that any of them has. The host reads the status at the end of the call.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

TAG_BITS = tl.constexpr(24)
SIGNAL_SET = tl.constexpr(9)
LOOK_EVERY = tl.constexpr(256)
STATUS = tl.constexpr(8)
ABORT = tl.constexpr(9)
LIMIT_NS = tl.constexpr(10)
SITE = tl.constexpr(11)
GAVE_UP = tl.constexpr(8)


@triton.jit
def word(address: tl.tensor) -> tl.tensor:
    """An int64 word of the heap."""
    return address.to(tl.int64).to(tl.pointer_type(tl.int64))


@triton.jit
def unbroken(place_ptr: tl.tensor) -> tl.tensor:
    """1 while no wait of this rank has given up, else 0; the same for every thread of the program.

    An atomic: one thread looks and tells the others, who might see it change at different times.
    """
    gave_up = word(tl.load(place_ptr + STATUS) + GAVE_UP)
    return (tl.atomic_or(gave_up, 0, sem="relaxed", scope="gpu") == 0).to(tl.int32)


@triton.jit
def wait_word(address: tl.tensor, value: tl.tensor, place_ptr: tl.tensor, slot: tl.tensor) -> None:
    """Spin until the word holds a value or a greater one; add-0 with acquire is Triton's portable load-acquire.

    Every so many polls one thread looks at the clock and at the host's abort word (in the host's memory: a look costs
    a microsecond or two). Who gives up first writes down what it waited for: [1, site, slot, value, seen] after the
    first word of the status.
    """
    seen = tl.atomic_add(word(address), 0, sem="acquire", scope="sys")
    if seen < value:
        status = tl.load(place_ptr + STATUS)
        abort = word(tl.load(place_ptr + ABORT))
        until = globaltimer() + tl.load(place_ptr + LIMIT_NS)
        going = unbroken(place_ptr)
        spins = 0
        while (seen < value) & (going != 0):
            seen = tl.atomic_add(word(address), 0, sem="acquire", scope="sys")
            spins += 1
            if spins % LOOK_EVERY == 0:
                # Threads may differ in what they see here; the atomic takes one thread's word for all.
                stop = ((tl.load(abort, volatile=True) != 0) | (globaltimer() >= until)).to(tl.int64)
                before = tl.atomic_or(word(status + GAVE_UP), stop, sem="relaxed", scope="gpu")
                going = (before == 0).to(tl.int32)
        if seen < value:
            if tl.atomic_add(word(status + GAVE_UP), 2, sem="relaxed", scope="gpu") < 2:
                report = word(status + GAVE_UP)
                tl.store(report + 1, tl.load(place_ptr + SITE))
                tl.store(report + 2, slot.to(tl.int64))
                tl.store(report + 3, value)
                tl.store(report + 4, seen)


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
    wait for it gave up) says nothing.
    """
    seen = tl.atomic_add(word(address), 0, sem="relaxed", scope="sys")
    if (seen >> TAG_BITS == signal >> TAG_BITS) & (seen != signal):
        tl.atomic_xchg(word(status), seen, sem="relaxed", scope="gpu")


@triton.jit
def copy_words(
    dst: tl.tensor, src: tl.tensor, count: tl.tensor, part: tl.tensor, parts: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """This program's part of ``count`` int32 words from ``src`` to ``dst`` (byte addresses, multiples of 16)."""
    from_ptr = tl.multiple_of(src.to(tl.int64).to(tl.pointer_type(tl.int32)), 16)
    to_ptr = tl.multiple_of(dst.to(tl.int64).to(tl.pointer_type(tl.int32)), 16)
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
