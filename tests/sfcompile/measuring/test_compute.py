"""Rates of compute: found on any device, however long a call takes; the user's random numbers stay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sfcompile.measuring import compute
from sfcompile.measuring.compute import WINDOWS, compute_rates

CPU = torch.device("cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_rate_has_a_value_and_ranks_meet_once() -> None:
    met: list[None] = []
    own = compute_rates(CPU, torch.float32, lambda: None, lambda: met.append(None))
    assert set(own.rates) == {"flops_per_s", "attention_flops_per_s", "memory_bytes_per_s"}
    assert own.launch_s is not None and 0.0 < own.launch_s < 1.0 and 0.0 < own.turns <= 1.0
    assert all(len(stretches) == WINDOWS and min(stretches) > 1e3 for stretches in own.rates.values())
    assert len(met) == 1, "no rank rests while others compute"


class TwoOnACore:
    """Clocks of a rank that has every second millisecond of a core, in which a call takes a quarter of one."""

    def __init__(self) -> None:
        self.core_s = 0.0

    def call(self) -> None:
        self.core_s += 0.25e-3

    def thread_time(self) -> float:
        return self.core_s

    def perf_counter(self) -> float:
        return self.core_s + int(self.core_s / 1e-3) * 1e-3


@pytest.mark.parametrize(("threads", "calls_per_s", "turns"), [(1, 4000.0, 0.5), (2, 2000.0, 1.0)])
def test_turns_of_a_core_are_told_from_how_fast_it_is(
    threads: int, calls_per_s: float, turns: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = TwoOnACore()
    monkeypatch.setattr(compute, "time", clocks)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    windows = compute._Windows(CPU, torch.float32, lambda: None)
    assert windows.calls_per_s(clocks.call) == pytest.approx(calls_per_s, rel=0.06)
    for _ in range(5):
        windows.calls_per_s(clocks.call)
    assert windows.turns == pytest.approx(turns, rel=0.06)


@pytest.mark.usefixtures("one_thread")
def test_half_precision_is_measured_as_it_is_computed() -> None:
    assert compute_rates(CPU, torch.bfloat16, lambda: None, lambda: None).rates["flops_per_s"][0] > 1e3


def test_the_users_random_numbers_stay_what_they_were() -> None:
    torch.manual_seed(3)
    want = torch.randn(4)
    torch.manual_seed(3)
    compute_rates(CPU, torch.float32, lambda: None, lambda: None)
    assert torch.equal(torch.randn(4), want)
