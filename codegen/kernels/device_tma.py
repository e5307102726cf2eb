# mypy: ignore-errors
"""Device functions of the kernel that fetches by tensor copies (attend_tma.py), beside those of device.py."""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def fence_async() -> None:
    """What this thread's loads of global memory may see, its tensor copies may read too."""
    gl.inline_asm("fence.proxy.async.global;", "", (), (), is_pure=False)


@gluon.jit
def first_warp() -> tl.tensor:
    """1 in the first of the four warps that run this code, else 0; its first thread polls for all of them.

    Warps differ in it: behind a test of it stands nothing for which warps wait for each other.
    """
    thread = gl.inline_asm("mov.u32 $0, %tid.x;", "=r", (), gl.int32, is_pure=False)
    return ((thread & 127) < 32).to(gl.int32)


@gluon.jit
def come(counter_ptr: tl.tensor) -> None:
    """A warpgroup has come: what its threads stored happens before the return of :func:`wait_for_all`."""
    gl.barrier()  # every thread's stores happen before the add of one
    gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="sys")


@gluon.jit
def wait_for_all(counter_ptr: tl.tensor, count: tl.tensor, place_ptr: tl.tensor) -> None:
    """Until ``count`` have come, or a wait of this rank has given up; then the counter is set back, for nobody of this
    launch comes again."""
    seen = gl.atomic_add(counter_ptr, 0, sem="acquire", scope="sys")
    going = unbroken(place_ptr)  # noqa: F821  # of device.py
    while (seen < count) & (going != 0):
        seen = gl.atomic_add(counter_ptr, 0, sem="acquire", scope="sys")
        going = unbroken(place_ptr)  # noqa: F821
    gl.atomic_xchg(counter_ptr, 0, sem="relaxed", scope="gpu")


@gluon.jit
def copy_chunk(dst: tl.tensor, src: tl.tensor, count: tl.tensor) -> None:
    """``count`` int32 words from ``src`` to ``dst`` (byte addresses, multiples of 16), by four warps."""
    WORDS: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    from_ptr = gl.multiple_of(src.to(gl.int64).to(gl.pointer_type(gl.int32)), 16)
    to_ptr = gl.multiple_of(dst.to(gl.int64).to(gl.pointer_type(gl.int32)), 16)
    at = count * 0
    while at < count:
        i = gl.multiple_of(at, 2048) + gl.arange(0, 2048, WORDS)
        gl.store(to_ptr + i, gl.load(from_ptr + i, mask=i < count), mask=i < count)
        at += 2048


@gluon.constexpr_function
def hidden_text(outputs: tuple[list[str], ...], inputs: tuple[list[str], ...]) -> str:
    """Sets scores of the first columns to -inf. Columns are said as numbers: one register for each, kept through all
    loops, is what the compiler would make of a comparison with a range.

    Element e of a thread's scores of 64 x N lies in column 8 (e // 4) + 2 (lane % 4) + e % 2 (PTX ISA, wgmma's D).
    """
    lines = [
        ".reg .pred hidden;",
        ".reg .b32 lane;",
        "mov.u32 lane, %laneid;",
        "and.b32 lane, lane, 3;",
        "shl.b32 lane, lane, 1;",
        f"sub.s32 lane, {inputs[1][0]}, lane;",
    ]
    for e, (result, score) in enumerate(zip(outputs[0], inputs[0], strict=True)):
        if e % 4 < 2:
            lines.append(f"setp.gt.s32 hidden, lane, {8 * (e // 4) + e % 2};")
            lines.append(f"selp.f32 {result}, 0fFF800000, {score}, hidden;")
            below = e + 2  # the same column, eight rows below
            lines.append(f"selp.f32 {outputs[0][below]}, 0fFF800000, {inputs[0][below]}, hidden;")
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.jit
def hide_first(scores: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """Scores without those of the first columns."""
    return gl.inline_asm(hidden_text, ("=f", "f", "r"), [scores, columns], scores.type, is_pure=True)


@gluon.constexpr_function
def kept_text(threads: int, operands: tuple[tuple[list[str], ...], tuple[list[str], ...]]) -> str:
    """Stores, or loads, of all that a thread holds of a tile's state: four words at a time, threads side by side."""
    outputs, inputs = operands
    words = [word for group in (outputs or inputs[:-1]) for word in group]
    lines = [
        ".reg .b32 thread;",
        ".reg .b64 place;",
        "mov.u32 thread, %tid.x;",
        f"and.b32 thread, thread, {threads - 1};",
        "mul.wide.u32 place, thread, 16;",
        f"add.s64 place, place, {inputs[-1][0]};",
    ]
    for at in range(0, len(words), 4):
        group, place = "{" + ", ".join(words[at : at + 4]) + "}", f"[place + {4 * at * threads}]"
        lines.append(f"ld.global.v4.f32 {group}, {place};" if outputs else f"st.global.v4.f32 {place}, {group};")
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def keep_text(outputs: tuple[list[str], ...], inputs: tuple[list[str], ...]) -> str:
    """Stores; see kept_text."""
    return kept_text(128, (outputs, inputs))


@gluon.jit
def keep(m: tl.tensor, l: tl.tensor, acc: tl.tensor, place_of: tl.tensor) -> None:  # noqa: E741
    """Stores a warpgroup's softmax state, each thread its own registers."""
    gl.inline_asm(keep_text, ("f", "f", "f", "l"), [m, l, acc, place_of], (), is_pure=False)


@gluon.jit
def kept(m: tl.tensor, l: tl.tensor, acc: tl.tensor, place_of: tl.tensor) -> tl.tuple:  # noqa: E741
    """What :func:`keep` stored, by the same threads, of the types of ``m``, ``l`` and ``acc``."""
    return gl.inline_asm(keep_text, ("=f", "=f", "=f", "l"), [place_of], (m.type, l.type, acc.type), is_pure=False)
