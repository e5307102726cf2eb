"""What travels comes back within the stated bounds, in as many bytes as are priced."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wire_bounds import most_off

from sfcompile.options import AS_IT_IS, Wire
from sfcompile.runtime.program.formats import (
    BF16,
    FP8,
    SAME,
    decode,
    encode,
    form,
    smaller,
    travel_bytes,
    words,
)
from sfcompile.runtime.program.sites import nbytes

SHAPE = (2, 3, 5, 7)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def there_and_back(values: torch.Tensor, written: str) -> torch.Tensor:
    return decode(encode(values, written), written, tuple(values.shape), values.dtype)


@pytest.mark.parametrize("written", [BF16, FP8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.0, 3.0, 12.0])
def test_every_element_comes_back_within_the_bound(written: str, dtype: torch.dtype, spread: float) -> None:
    """Rows of one magnitude, and rows whose elements differ by many powers of two."""
    torch.manual_seed(0)
    values = (torch.randn(4, 3, 50, 16) * torch.exp2(spread * torch.randn(4, 3, 50, 16))).clamp(-6e4, 6e4).to(dtype)
    off = (there_and_back(values, written).double() - values.double()).abs()
    rounding = torch.finfo(dtype).eps * values.double().abs()  # of the result, to a dtype that is no wider
    if dtype == torch.float16:  # what is below its smallest number is rounded to that
        rounding = rounding + 2.0**-25
    assert bool((off <= most_off(values, written) + rounding).all())
    assert float((off / values.double().abs().clamp(min=1e-30)).median()) > 0.0 or written == BF16 != dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_came_back_comes_back_unchanged(dtype: torch.dtype) -> None:
    values = torch.randn(2, 3, 40, 24).to(dtype)
    once = there_and_back(values, FP8)
    assert torch.equal(there_and_back(once, FP8), once)
    assert not torch.equal(once, values)


@given(st.floats(2.0**-100, 2.0**127, width=32), st.integers(0, 2**32 - 1))
def test_a_row_of_any_magnitude(largest: float, seed: int) -> None:
    """The factor is a power of two, and the largest comes into (224, 448]."""
    values = (torch.rand(8, generator=torch.Generator().manual_seed(seed)) * largest).view(1, 8)
    values[0, 0] = -largest
    packed = encode(values, FP8)
    scale = float(packed[8:].view(torch.float32))
    assert math.frexp(scale)[0] == 0.5
    assert 224 < largest / scale <= 448
    off = (there_and_back(values, FP8).double() - values.double()).abs()
    assert bool((off <= most_off(values, FP8)).all())


def test_numbers_next_to_nothing_stay_next_to_nothing() -> None:
    """No factor is smaller than the smallest normal number, so that nothing is divided by zero."""
    values = torch.tensor([[2.0**-126, -(2.0**-130), 0.0, 2.0**-149]])
    assert float((there_and_back(values, FP8) - values).abs().max()) <= 2.0**-126


def test_the_factor_leaves_e4m3_no_number_that_is_too_large() -> None:
    """448 is its largest; 1.75 times a power of two is the last that falls on it."""
    for largest, want in ((1.75, 2.0**-8), (math.nextafter(1.75, 2), 2.0**-8), (1.7500001, 2.0**-7), (1.0, 2.0**-8)):
        packed = encode(torch.tensor([[largest, 0.0, 0.0, 0.0]]), FP8)
        assert float(packed[4:].view(torch.float32)) == want
        assert torch.isfinite(there_and_back(torch.tensor([[largest, 0.0, 0.0, 0.0]]), FP8)).all()


def test_zeros_stay_zeros_and_what_is_no_number_is_seen() -> None:
    values = torch.ones(5, 8)
    values[0] = 0.0
    values[1, 3], values[2, 0], values[3, 7] = float("nan"), float("inf"), float("-inf")
    back = there_and_back(values, FP8)
    assert torch.equal(back[0], values[0])
    assert bool(back[1:4].isnan().all())
    assert torch.equal(back[4], values[4])


def test_nothing_is_rounded_beyond_the_largest_number() -> None:
    """65504 would become 65536, which fp16 does not have."""
    values = torch.tensor([[65504.0, -65504.0, 1.0, 0.0]], dtype=torch.float16)
    assert there_and_back(values, FP8)[0, :2].tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("written", [SAME, BF16, FP8])
@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 3, 1), (2, 0, 4, 8), (1, 2, 0, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_has_the_form_that_is_said_and_the_bytes_that_are_priced(
    written: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    values = torch.randn(shape).to(dtype)
    travels = encode(values, written)
    assert (tuple(travels.shape), travels.dtype) == form(written, shape, dtype)
    assert travels.nbytes == nbytes(*form(written, shape, dtype))
    assert travels.nbytes == travel_bytes(written, math.prod(shape[:-1]), shape[-1], dtype)
    back = decode(travels, written, shape, dtype)
    assert (tuple(back.shape), back.dtype) == (shape, dtype)


def test_as_it_is_means_untouched() -> None:
    values = torch.randn(SHAPE)
    assert encode(values, SAME) is values and decode(values, SAME, SHAPE, values.dtype) is values


def test_an_encoding_shares_no_memory_with_what_it_was_made_from() -> None:
    values = torch.randn(SHAPE).bfloat16()
    assert encode(values, BF16).data_ptr() != values.data_ptr()


def test_strided_chunks_are_read_through_their_strides() -> None:
    values = torch.randn(2, 9, 4, 8).transpose(1, 2)[:, 1:3]
    assert torch.equal(encode(values, FP8), encode(values.contiguous(), FP8))


@pytest.mark.parametrize("shape", [(2, 5, 700, 64), (1, 3, 5000, 40), (2, 300, 9, 64)])
def test_large_chunks_are_coded_piece_by_piece_and_alike(shape: tuple[int, ...]) -> None:
    """Several heads at a time, or some tokens of one: the same values as row by row."""
    values = torch.randn(shape)
    back = there_and_back(values, FP8)
    for at in ((0, 0, 0), (-1, -1, -1), (0, shape[1] // 2, shape[2] // 2)):
        assert torch.equal(back[at], there_and_back(values[at].view(1, -1), FP8)[0])
    assert bool(((back - values).abs() <= most_off(values, FP8)).all())


def test_what_makes_nothing_smaller_travels_as_it_is() -> None:
    fp8, bf16 = Wire(*["fp8"] * 4), Wire(*["bf16"] * 4)
    assert smaller(fp8, torch.float32, 64, 64) == fp8 and smaller(bf16, torch.float32, 64, 64) == bf16
    assert smaller(bf16, torch.bfloat16, 64, 64) == smaller(bf16, torch.float16, 64, 64) == AS_IT_IS
    # A row of 4 bf16 is 8 bytes; in fp8 it would be 4 and a factor of 4.
    assert smaller(fp8, torch.bfloat16, 4, 64) == Wire(v="fp8", o="fp8")


def test_the_bound_in_words() -> None:
    assert words(Wire(k="fp8", v="fp8", q="bf16")) == (
        "Q as bf16; K, V as fp8, off by at most 2^-8 of an element (bf16); 2^-4 of an element or 2^-17 of its row's "
        "largest (fp8)"
    )
