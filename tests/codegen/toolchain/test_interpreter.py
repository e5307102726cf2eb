"""What Triton's interpreter lacks."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from deadline import Deadline
from watched import UNWATCHED

from sfcompile.codegen.kernels.text import module
from sfcompile.codegen.toolchain.interpreter import interpreting
from sfcompile.codegen.toolchain.loader import load_source
from sfcompile.runtime.wires.symmetric_heap import HeapSize

SOURCE = module(
    "Test.",
    """
@triton.jit
def product(a_ptr, b_ptr, c_ptr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def narrow(x_ptr, out_ptr):
    i = tl.arange(0, 16)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


@triton.jit
def largest(x_ptr):
    tl.store(x_ptr, tl.max(tl.load(x_ptr + tl.arange(0, 16)) + tl.zeros([16], tl.float32), 0))


@triton.jit
def wait(address, place_ptr):
    wait_word(address, 3, place_ptr, 0)
""",
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_right_in_every_dtype(dtype: torch.dtype) -> None:
    a, b = (torch.randn(16, 16).to(dtype) for _ in range(2))
    c = torch.empty(16, 16)
    with interpreting(Deadline(1.0)):
        load_source(SOURCE, True).product[(1,)](a, b, c)
    assert torch.allclose(c, a.float() @ b.float(), atol=1e-5)


def test_bf16_is_rounded_to_the_nearest() -> None:
    """1.998: its mantissa carries into the exponent; ties go to even."""
    x = torch.tensor([1.998, -1.998, 0.0, 1e-40, 3e38, float("inf"), 1 + 2**-8, 1 + 3 * 2**-8, *torch.randn(7), 0.1])
    out = torch.empty(16, dtype=torch.bfloat16)
    with interpreting(Deadline(1.0)):
        load_source(SOURCE, True).narrow[(1,)](x, out)
        assert torch.equal(out, x.bfloat16())
        load_source(SOURCE, True).narrow[(1,)](torch.full((16,), float("nan")), out)
    assert out.isnan().all()


def test_a_poll_in_vain_gives_up_and_what_was_patched_is_put_back() -> None:
    before = tl.max
    word = torch.tensor([2], dtype=torch.int64)
    place = torch.tensor(HeapSize(1, 64).place(1, 2, UNWATCHED.watched))
    kernels = load_source(SOURCE, True)
    with interpreting(Deadline(0.1, "the word")), pytest.raises(Exception) as caught:
        assert tl.max is not before
        kernels.wait[(1,)](word.data_ptr(), place)
    cause: BaseException | None = caught.value
    while cause is not None and not isinstance(cause, TimeoutError):
        cause = cause.__cause__
    assert cause is not None and "the word did not arrive within 0.1 s" in str(cause)
    assert tl.max is before
    word.fill_(3)
    with interpreting(Deadline(0.1)):
        kernels.wait[(1,)](word.data_ptr(), place)


def test_kernels_can_be_compiled_after_device_functions_were_interpreted() -> None:
    """Triton leaves its language swapped after a device function that uses it; then nothing would compile."""
    from sfcompile.codegen.kernels.chunks import ChunkSpec
    from sfcompile.codegen.toolchain.compiler import compile_chunks

    before = {name: value for name, value in vars(tl.tensor).items() if name.startswith("__")}
    x = torch.arange(16.0)
    with interpreting(Deadline(1.0)):
        load_source(SOURCE, True).largest[(1,)](x)
    assert x[0] == 15
    assert {name: value for name, value in vars(tl.tensor).items() if name.startswith("__")} == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_ALWAYS_COMPILE", "1")  # a compiled kernel of an older run would hide it
        assert compile_chunks("release", ChunkSpec("peer"), 90).cubin
