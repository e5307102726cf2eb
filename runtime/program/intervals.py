"""Vectors of integers as runs of consecutive ones: which tokens a rank holds or wants, and which labels they carry.

A sequence has 10^5 tokens and a rank's share of it a handful of runs.
"""

from __future__ import annotations

from collections.abc import Iterable

Runs = tuple[tuple[int, int], ...]
"""A vector of integers: runs ``(first, length)`` of consecutive ones, in order. Ascending only where it is said."""


def count(runs: Runs) -> int:
    """How many integers."""
    return sum(length for _, length in runs)


def join(runs: Iterable[tuple[int, int]]) -> Runs:
    """The same vector: neighbouring runs that continue one another are one, empty ones are none."""
    joined: list[tuple[int, int]] = []
    for first, length in runs:
        if length == 0:
            continue
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((first, length))
    return tuple(joined)


def stretch(runs: Runs, start: int, stop: int, step: int = 1) -> Runs:
    """The integers at ``start, start + step, ...`` below ``stop`` (``0 <= start``, ``step >= 1``)."""
    picked: list[tuple[int, int]] = []
    at = 0
    for first, length in runs:
        low, high = max(start, at), min(stop, at + length)
        if step > 1 and low < high:
            low += -(low - start) % step
            picked += [(first + place - at, 1) for place in range(low, high, step)]
        elif low < high:
            picked.append((first + low - at, high - low))
        at += length
    return join(picked)


def flip(runs: Runs) -> Runs:
    """The vector read backwards."""
    return join((first + i, 1) for first, length in reversed(runs) for i in reversed(range(length)))


def overlap(a: Runs, b: Runs) -> Runs:
    """What is in both; each ascending."""
    common = []
    i = j = 0
    while i < len(a) and j < len(b):
        low, high = max(a[i][0], b[j][0]), min(sum(a[i]), sum(b[j]))
        if low < high:
            common.append((low, high - low))
        i, j = (i + 1, j) if sum(a[i]) < sum(b[j]) else (i, j + 1)
    return tuple(common)


def union(runs: Iterable[tuple[int, int]]) -> Runs:
    """What is in any of the runs, ascending."""
    merged: list[tuple[int, int]] = []
    for first, length in sorted(runs):
        if merged and first <= sum(merged[-1]):
            start = merged[-1][0]
            merged[-1] = (start, max(sum(merged[-1]), first + length) - start)
        elif length:
            merged.append((first, length))
    return tuple(merged)


def beyond(a: Runs, b: Runs) -> Runs:
    """What is in ``a`` and not in ``b``; each ascending."""
    left: list[tuple[int, int]] = []
    for first, length in a:
        at = first
        for start, n in overlap(((first, length),), b):
            left.append((at, start - at))
            at = start + n
        left.append((at, first + length - at))
    return join(left)


def places(some: Runs, within: Runs) -> Runs:
    """Where ``some`` of the integers ``within`` lie among them; both ascending."""
    runs = []
    before = i = 0
    for first, length in some:
        while sum(within[i]) <= first:
            before += within[i][1]
            i += 1
        runs.append((before + first - within[i][0], length))
    return tuple(runs)


def slice_of(total: int, parts: int, index: int) -> tuple[int, int]:
    """The ``index``-th of ``parts`` contiguous slices of ``total`` things, sizes within one of each other."""
    base, extra = divmod(total, parts)
    start = index * base + min(index, extra)
    return start, start + base + (index < extra)
