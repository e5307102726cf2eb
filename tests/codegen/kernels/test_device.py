"""Device functions in the interpreter: arrival counters, copies, waits that give up."""

from __future__ import annotations

import pytest
import torch
from deadline import Deadline

from sfcompile.codegen.kernels import device as kernel_device
from sfcompile.codegen.kernels.text import module
from sfcompile.codegen.toolchain.interpreter import interpreting
from sfcompile.codegen.toolchain.loader import load_source

BODY = """
@triton.jit
def count(counters_ptr, seen_ptr, programs):
    tl.store(seen_ptr + tl.program_id(0), last_of(counters_ptr, programs).to(tl.int32))


@triton.jit
def copy(to, src, words):
    copy_words(to, src, words, tl.program_id(0), tl.num_programs(0), 8)


@triton.jit
def wait(address, epoch, report_ptr, slot):
    wait_word_bounded(address, epoch.to(tl.int64), report_ptr, slot)
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


def test_a_bounded_wait_reports_once_and_everybody_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    source = module("Test.", BODY).replace("SPINS = tl.constexpr(1 << 26)", "SPINS = tl.constexpr(1 << 3)")
    assert "1 << 3" in source and kernel_device.SPINS.value == 1 << 26
    kernels = load_source(source, True)
    word, report = torch.tensor([4], dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    with interpreting(lambda: None):
        kernels.wait[(1,)](word.data_ptr(), 5, report, torch.tensor(7).item())
        assert report.tolist() == [1, 7, 5, 4]
        kernels.wait[(1,)](word.data_ptr(), 9, report, 8)
        assert report[1:].tolist() == [7, 5, 4]  # the first report stays
        word.fill_(9)
        report.zero_()
        kernels.wait[(1,)](word.data_ptr(), 9, report, 8)
        assert report.tolist() == [0, 0, 0, 0]
