"""Rates of compute: found on any device, however long a call takes; the user's random numbers stay."""

from __future__ import annotations

import torch

from sfcompile.measuring.compute import WINDOWS, compute_rates

CPU = torch.device("cpu")


def test_every_rate_has_a_value_and_ranks_meet_before_each() -> None:
    met: list[None] = []
    rates = compute_rates(CPU, torch.float32, lambda: None, lambda: met.append(None))
    assert set(rates) == {"flops_per_s", "attention_flops_per_s", "memory_bytes_per_s", "launch_s"}
    assert 0.0 < rates.pop("launch_s")[0] < 1.0
    assert all(len(stretches) == WINDOWS and min(stretches) > 1e3 for stretches in rates.values())
    assert len(met) == 3


def test_half_precision_is_measured_as_it_is_computed() -> None:
    assert compute_rates(CPU, torch.bfloat16, lambda: None, lambda: None)["flops_per_s"][0] > 1e3


def test_the_users_random_numbers_stay_what_they_were() -> None:
    torch.manual_seed(3)
    want = torch.randn(4)
    torch.manual_seed(3)
    compute_rates(CPU, torch.float32, lambda: None, lambda: None)
    assert torch.equal(torch.randn(4), want)
