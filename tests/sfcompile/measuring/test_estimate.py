"""Estimates from made-up times: links of known rate, shaped or shared, in good order and with ranks that lose turns."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from sfcompile.measuring.estimate import UNEQUAL, compute_rate, core_share, evened, line, link_rate, rates_in
from sfcompile.measuring.quick import LATER, SLICES

Marks = list[tuple[float, float]]


def stream(rate: float, seconds: float, chunk: float, burst: float = 0.0, stalls: float = 0.0, seed: int = 0) -> Marks:
    """Arrivals of one rank behind a token bucket of its own; ``stalls``: how likely a chunk has to wait."""
    turns = random.Random(seed)
    tokens, now, came, marks = burst, 0.0, 0.0, [(0.0, 0.0)]
    while now < seconds:
        if turns.random() < stalls:
            idle = 0.01 * turns.random()
            now, tokens = now + idle, min(burst, tokens + rate * idle)
        free = min(tokens, chunk)
        tokens -= free
        now, came = now + (chunk - free) / rate, came + chunk
        marks.append((now, came))
    return marks


def estimate(streams: list[Marks], machine_of: list[int]) -> tuple[float, float]:
    """As quick.py estimates."""
    end = min(marks[-1][0] for marks in streams)
    return link_rate(
        np.array([rates_in(marks, LATER * end, end, SLICES) for marks in streams]),
        machine_of,
        (1 - LATER) * end / SLICES,
    )


@pytest.mark.parametrize(("mbit", "burst"), list(itertools.product([10, 100, 1000, 10000], [0, 128 << 10, 1 << 20])))
def test_what_a_shaped_link_lets_through_at_first_does_not_count(mbit: float, burst: int) -> None:
    rate = mbit * 1e6 / 8
    if burst > 0.1 * rate:
        burst = int(0.1 * rate)  # gone in the first third of the stream
    found, spread = estimate([stream(rate, 0.3, max(16 << 10, rate * 0.015), burst), [(0.0, 0.0), (1.0, 0.0)]], [0, 1])
    assert found == pytest.approx(rate, rel=0.15) and spread < 0.15


@pytest.mark.parametrize("seed", range(20))
def test_turns_that_ranks_lose_hardly_count(seed: int) -> None:
    rate = 100e6 / 8
    found, _ = estimate([stream(rate, 0.3, 64 << 10, 128 << 10, stalls=0.15, seed=seed)], [0])
    assert found == pytest.approx(rate, rel=0.15)


def test_ranks_of_a_machine_share_its_link_and_the_slowest_machine_counts() -> None:
    shared, alone = stream(5e6, 0.3, 16 << 10), stream(2e7, 0.3, 16 << 10)
    found, spread = estimate([shared, shared, alone], [0, 0, 1])
    assert found == pytest.approx(1e7, rel=0.05) and spread < 0.05


def test_a_machine_to_which_nothing_was_sent_is_no_slow_one() -> None:
    assert link_rate(np.array([[5.0] * SLICES, [0.0] * SLICES]), [0, 1], 1.0) == (5.0, 0.0)
    assert link_rate(np.zeros((2, SLICES)), [0, 1], 1.0) == (0.0, 1.0)


def test_machines_that_share_the_busiest_link_unevenly_count_as_if_they_did_not() -> None:
    """Two ranks of machine 0 talk with one of machine 1 and one of machine 2, at half of the link each."""
    rates, streams = evened(np.full((4, SLICES), 5.0), (0, 0, 1, 2), (2, 3, 0, 1))
    assert streams == 2 and link_rate(rates, (0, 0, 1, 2), 1e7) == (10.0, 0.0)
    rates, streams = evened(np.zeros((2, SLICES)), (0, 1), (None, None))
    assert streams == 1 and not rates.any()


def test_the_spread_says_that_a_link_was_not_steady() -> None:
    rates = np.array([[1.0, 1.0] + [10.0] * 6])
    assert link_rate(rates, [0], 0.02) == (10.0, pytest.approx(0.225))


def test_a_fast_link_may_lose_most_of_its_turns() -> None:
    rates = np.array([[1.0, 1.0, 10.0, 10.0, 1.0, 1.0, 1.0, 1.0]])
    assert link_rate(1e7 * rates, [0], 0.1) == (1e8, pytest.approx(0.675))
    assert link_rate(1e4 * rates, [0], 0.1)[0] < 5e4  # it may have saved that up


def test_bytes_between_two_marks_come_evenly() -> None:
    assert rates_in([(0.0, 0.0), (1.0, 8.0), (2.0, 12.0)], 0.5, 1.5, 2) == pytest.approx([8.0, 4.0])


def test_a_line_through_times() -> None:
    sizes = [4.0 * size for size in (1 << 10, 1 << 14, 1 << 20)]
    start, slope = line(sizes, [2e-3 + size / 1e9 for size in sizes])
    assert start == pytest.approx(2e-3) and 1.0 / slope == pytest.approx(1e9)


def test_a_line_that_would_start_before_zero_starts_at_half_the_least() -> None:
    assert line([1.0, 2.0], [1.0, 3.0])[0] == 0.5


def turns(seed: int, cores: int, window_s: float = 0.01, slice_s: float = 0.003) -> list[float]:
    """The part of a core that each of two ranks a core has in a window, in turns of about ``slice_s``
    that begin anywhere."""
    drawn, parts = random.Random(seed), list[float]()
    for _ in range(cores):
        now, first, mine = -slice_s * drawn.random(), drawn.random() < 0.5, 0.0
        while now < window_s:
            end = min(now + slice_s * (0.7 + 0.6 * drawn.random()), window_s)
            mine += (end - max(now, 0.0)) if first else 0.0
            now, first = end, not first
        parts += [mine / window_s, 1.0 - mine / window_s]
    return parts


@pytest.mark.parametrize("machine_of", [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 2, 3)], ids=str)
def test_a_rank_has_half_of_a_core_that_two_share(machine_of: tuple[int, ...]) -> None:
    """Ranks of one core come one after the other; where each says to be a machine, luck of 60 ms is left."""
    shares = [core_share(turns(seed, 2, window_s=0.06), machine_of) for seed in range(200)]
    assert 0.48 < float(np.mean(shares)) < 0.52
    assert max(abs(one - 0.5) for one in shares) < (0.06 if len(set(machine_of)) == 4 else 1e-9)


def test_a_machine_whose_cores_do_other_work_counts() -> None:
    assert core_share([0.5, 0.5, 0.4, 0.4], (0, 0, 1, 1)) == pytest.approx(0.45)
    assert core_share([0.5, 0.5, 0.1, 0.2], (0, 0, 1, 1)) == pytest.approx(0.15)


def test_a_slow_rank_counts_and_a_stall_does_not() -> None:
    assert compute_rate(np.array([[1.0, 0.9], [1.0, 1.0], [0.9 * UNEQUAL, 0.4]])) == pytest.approx(0.9 * UNEQUAL)
    assert compute_rate(np.array([[1.0, 0.3], [1.1, 0.2], [1.0, 0.3]])) == 1.0
