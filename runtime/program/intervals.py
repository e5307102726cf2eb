"""Runs of consecutive integers: which tokens of a dim a rank holds or wants, and what two such sets have in common."""

from __future__ import annotations

Positions = tuple[tuple[int, int], ...]
"""Global token positions one rank owns: runs ``(first, length)`` in local order."""


def count(positions: Positions) -> int:
    """Number of tokens in some positions."""
    return sum(length for _, length in positions)


def cut(positions: Positions, start: int, stop: int) -> Positions:
    """The ``start``-th to ``stop``-th of some positions."""
    runs = []
    at = 0
    for first, length in positions:
        low, high = max(start - at, 0), min(stop - at, length)
        if low < high:
            runs.append((first + low, high - low))
        at += length
    return tuple(runs)


def overlap(a: Positions, b: Positions) -> Positions:
    """Positions of both; each ascending."""
    common = []
    i = j = 0
    while i < len(a) and j < len(b):
        low, high = max(a[i][0], b[j][0]), min(sum(a[i]), sum(b[j]))
        if low < high:
            common.append((low, high - low))
        i, j = (i + 1, j) if sum(a[i]) < sum(b[j]) else (i, j + 1)
    return tuple(common)


def places(some: Positions, within: Positions) -> Positions:
    """Where ``some`` of the positions ``within`` lie among them; both ascending."""
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
