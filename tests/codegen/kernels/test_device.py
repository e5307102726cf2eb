"""Device functions in the interpreter: arrival counters, copies, waits that give up."""

from __future__ import annotations

import torch
from deadline import Deadline
from watched import Watch

from sfcompile.codegen.kernels import device as kernel_device
from sfcompile.codegen.kernels.text import module
from sfcompile.codegen.toolchain.interpreter import interpreting
from sfcompile.codegen.toolchain.loader import load_source
from sfcompile.runtime.program.formats import FP8, decode, encode
from sfcompile.runtime.wires.symmetric_heap import PLACE, STATUS, HeapSize
from sfcompile.runtime.wires.transport import TAG_BITS

BODY = """
@triton.jit
def count(counters_ptr, seen_ptr, programs):
    tl.store(seen_ptr + tl.program_id(0), last_of(counters_ptr, programs).to(tl.int32))


@triton.jit
def copy(to, src, words):
    copy_words(to, src, words, tl.program_id(0), tl.num_programs(0), 8)


@triton.jit
def wait(address, epoch, place_ptr, slot):
    wait_word(address, epoch.to(tl.int64), place_ptr, slot)


@triton.jit
def there_and_back(x_ptr, codes_ptr, factors_ptr, back_ptr, W: tl.constexpr):
    at = tl.program_id(0) * W + tl.arange(0, W)[None, :]
    x = tl.load(x_ptr + at)
    factor = factor_of(x)
    codes = e4m3_of(x * inverse_of(factor)[:, None]).to(tl.uint8)
    tl.store(codes_ptr + at, codes)
    tl.store(factors_ptr + tl.program_id(0) + tl.arange(0, 1), factor)
    back = from_e4m3(codes) * factor.to(tl.float32, bitcast=True)[:, None]
    tl.store(back_ptr + at, at_most(back, 3.4028234663852886e38))
"""


def test_the_last_program_is_told_and_sets_the_counter_back() -> None:
    kernels = load_source(module("Test.", BODY), True)
    counters, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with interpreting(Deadline(1.0)):
        for _ in range(2):
            kernels.count[(4,)](counters, seen, 4)
            assert seen.tolist() == [0, 0, 0, 1] and counters.item() == 0


def test_copies_whole_words_and_nothing_else() -> None:
    kernels = load_source(module("Test.", BODY), True)
    source, target = torch.arange(40, dtype=torch.int32), torch.full((40,), -1, dtype=torch.int32)
    with interpreting(Deadline(1.0)):
        kernels.copy[(3,)](target.data_ptr(), source.data_ptr(), 37)
    assert torch.equal(target[:37], source[:37]) and (target[37:] == -1).all()


def test_fp8_is_the_same_bytes_as_the_hosts() -> None:
    """Every magnitude that fp32 has, halves between two numbers of e4m3, zeros, and what is no number."""
    torch.manual_seed(0)
    x = torch.randn(64, 32) * torch.exp2(torch.linspace(-140.0, 126.0, 64))[:, None]
    x[0], x[1] = 0.0, torch.arange(32.0)
    x[2] = torch.arange(32) / 16 + 1 / 32  # halfway between two, in every second place
    x[3] = torch.exp2(-torch.arange(32.0))  # down to numbers that e4m3 has no more
    x[4] = 3.4e38
    x[62, 3], x[63, 7] = float("nan"), float("-inf")
    codes, factors = torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(64, dtype=torch.int32)
    back = torch.zeros(64, 32)
    kernels = load_source(module("Test.", BODY), True)
    with interpreting(Deadline(1.0)):
        kernels.there_and_back[(64,)](x, codes, factors, back, 32)
    want = encode(x, FP8)
    assert torch.equal(factors[:62].view(torch.float32), want[64 * 32 :].view(torch.float32)[:62])
    assert torch.equal(codes[:62], want[: 64 * 32].view(64, 32)[:62])
    assert torch.equal(back[:62], decode(want, FP8, (64, 32), torch.float32)[:62])
    assert bool(back[62:].isnan().all())


def test_a_wait_reports_once_and_everybody_gives_up() -> None:
    kernels = load_source(module("Test.", BODY), True)
    word, watch = torch.tensor([4], dtype=torch.int64), Watch(limit_s=0.02)
    place = torch.tensor(HeapSize(1, 64).place(1, 2, watch.watched, 3))
    with interpreting(lambda: None):
        kernels.wait[(1,)](word.data_ptr(), 4, place, 8)
        assert not watch.words.any()  # it is there
        kernels.wait[(1,)](word.data_ptr(), 5, place, 7)
        report = watch.words[2:].tolist()
        assert watch.status["gave_up"] and report == [3, 7, 5, 4]
        place[PLACE.index("limit_ns")] = 1 << 60  # who comes later does not wait at all
        kernels.wait[(3,)](word.data_ptr(), 9, place, 8)
        assert watch.words[2:].tolist() == report  # the first report stays


def test_constants_are_those_of_the_heap() -> None:
    for name in ("status", "abort", "limit_ns", "site"):
        assert getattr(kernel_device, name.upper()).value == PLACE.index(name)
    assert kernel_device.GAVE_UP.value == 8 * STATUS.index("gave_up")
    assert STATUS[STATUS.index("gave_up") :] == ("gave_up", "site", "slot", "wanted", "seen")
    assert kernel_device.TAG_BITS.value == TAG_BITS
