"""From times to constants: arithmetic alone, no clock and no ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
ENOUGH_BYTES = 2.5e6
"""What a shaped link saves up while ranks do not get their turns (seldom more than 256 KiB) is a tenth of this."""

UNEQUAL = 0.6
"""Of the median: a rank or machine that is slower is slow, one between these was unlucky."""


def line(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """``(start, seconds a byte)`` of the straight line through times by size, near in relative terms.

    Args:
        sizes: bytes.
        times: seconds.
    """
    weights = 1.0 / np.array(times)
    slope, start = np.polyfit(np.array(sizes), np.array(times), 1, w=weights)
    if start <= 0.0:
        start = 0.5 * float(min(times))
    return float(start), float(max(slope, 0.0))


def rates_in(marks: Sequence[tuple[float, float]], begin_s: float, end_s: float, count: int) -> list[float]:
    """Bytes per second in ``count`` equal slices of a stretch of time.

    Args:
        marks: ``(seconds, bytes that had come)``, ascending; between two marks bytes are taken to come evenly.
        begin_s, end_s: the stretch.
    """
    times, came = zip(*marks, strict=True)
    edges = np.interp(np.linspace(begin_s, end_s, count + 1), times, came)
    return [float(rate) for rate in np.diff(edges) / max((end_s - begin_s) / count, 1e-12)]


def link_rate(rates: Matrix, machine_of: Sequence[int], slice_s: float) -> tuple[float, float]:
    """What the slowest machine's link carries, and how far that may be off.

    Args:
        slice_s: seconds of a slice.
        rates: [ranks, slices], bytes per second that came to each rank in the same slices of time; a rank to which
            nothing was sent has zeros.

    Returns:
        Bytes per second in the best stretch of the slices that carries ENOUGH_BYTES, or is three quarters of them; and
        the part of it by which all slices together are slower. (0, 1) if nothing came anywhere.
    """
    machines = np.array(machine_of)
    rates_and_spreads: list[tuple[float, float]] = []
    for machine in sorted(set(machine_of)):
        rate = rates[machines == machine].sum(axis=0)
        if rate.any():
            enough = math.ceil(ENOUGH_BYTES / max(float(rate.mean()) * slice_s, 1e-12))
            best = _best_stretch(rate, min(max(enough, 2), 3 * len(rate) // 4))
            rates_and_spreads.append((best, 1.0 - float(rate.mean()) / best))
    return min(rates_and_spreads, default=(0.0, 1.0))


def evened(rates: Matrix, machine_of: Sequence[int], sources: Sequence[int | None]) -> tuple[Matrix, int]:
    """As if to every machine as many ranks had sent as use the busiest link, which all had to wait for.

    Args:
        rates: of messages that ranks send in step with each other, [ranks, slices], as they came to each.
        sources: by rank, who sends to it; None: nobody.

    Returns:
        The rates, and how many share the busiest link, in one of its directions.
    """
    into = Counter(machine_of[rank] for rank, src in enumerate(sources) if src is not None)
    out = Counter(machine_of[src] for src in sources if src is not None)
    most = max((*into.values(), *out.values()), default=1)
    times = np.array([most / max(into[machine], 1) for machine in machine_of])
    return rates * times[:, None], most


def compute_rate(rates: Matrix) -> float:
    """What a rank computes a second, while all do.

    What is left of luck in a stretch makes the slowest rank of it an unlucky one. So the median rank counts, unless the
    slowest is further from it than such luck: then the ranks are unequal, and the slowest counts. Of the stretches the
    best does: other work only takes away.

    Args:
        rates: [ranks, stretches], in FLOPs or bytes a second, of the same stretches on all ranks.

    Returns:
        One rate, in the same unit.
    """
    return float(_usual(rates).max())


def core_share(turns: Sequence[float], machine_of: Sequence[int]) -> float:
    """The part of the time in which a rank has a core, while all compute.

    What one rank of a machine has more of, another has less: of a machine the mean counts. Of machines the median does,
    unless one is far below it (:data:`UNEQUAL`).

    Args:
        turns: by rank, between 0 and 1.
    """
    machines = np.array(machine_of)
    means = [[float(np.array(turns)[machines == machine].mean())] for machine in sorted(set(machine_of))]
    return float(_usual(np.array(means))[0])


def _usual(values: Matrix) -> NDArray[np.float64]:
    """By column, the median, or the least value where that is far from it."""
    middle, least = np.median(values, axis=0), values.min(axis=0)
    return np.where(least < UNEQUAL * middle, least, middle)


def _best_stretch(values: NDArray[np.float64], least: int) -> float:
    """The largest mean of at least so many neighbours."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    count = len(values)
    means = [(sums[j] - sums[i]) / (j - i) for i in range(count) for j in range(i + least, count + 1)]
    return float(max(means))
