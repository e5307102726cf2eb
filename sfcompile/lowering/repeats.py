"""Where a sequence repeats itself: stretches of one period, and the places at which to cut them.

What is repeated is a model's block, as letters: equal letters stand for calls that are equal as far as a call by itself
shows (regions.py). Any rotation of a block is a period as well. Which one is taken decides what is handed from one
repetition to the next: the place with the fewest bytes, which is where one block of the model ends.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEAST = 24
"""Letters of the shortest period that is looked for: shorter pieces cost more by themselves than they spare."""
WORTH = 64
"""Letters that a repeat has to spare to be cut."""
_NEAR = 1.25
"""A cut that hands on up to so many times the fewest bytes is as good, if it gives more repetitions."""


class Repeat(NamedTuple):
    """A stretch in which every letter equals the one a period later, as far as that lies in the stretch."""

    start: int
    length: int
    period: int

    @property
    def spared(self) -> int:
        """Letters that are there already, one or more periods before."""
        return (self.length // self.period - 1) * self.period


def cuts(letters: Sequence[int], costs: Sequence[float], least: int = LEAST, worth: int = WORTH) -> list[int]:
    """Positions at which to cut a sequence so that as many pieces as can be are repetitions; ends are not among them.

    Args:
        costs: of a cut before each letter, and after the last: infinite where there can be none.
        least: letters of the shortest period.
        worth: letters that a repeat has to spare.
    """
    places: set[int] = set()
    known: set[bytes] = set()
    values = np.asarray(letters, dtype=np.int64)
    todo = [(0, len(letters))]
    while todo:
        first, stop = todo.pop()
        repeat = longest_repeat(values[first:stop], least)
        if repeat is None or repeat.spared < worth:
            continue
        repeat = repeat._replace(start=repeat.start + first)
        chosen = _best_cuts(repeat, costs, values, known)
        known.update(values[place : place + repeat.period].tobytes() for place in chosen[:1])
        # What cannot be cut at all is gone through once more on either side of its middle.
        here = chosen or [repeat.start + repeat.length // 2]
        places.update(chosen)
        todo += [(first, here[0]), (here[-1], stop)]
    return sorted(places - {0, len(letters)})


def longest_repeat(values: NDArray[np.int64], least: int = LEAST) -> Repeat | None:
    """The one that spares most letters, of the shortest period of at least ``least``; None if nothing repeats."""
    best: Repeat | None = None
    for period in range(least, len(values) // 2 + 1):
        if best is not None and len(values) - period <= best.spared:
            break  # what a repeat spares is all but one period at most
        equal = values[period:] == values[:-period]
        if np.count_nonzero(equal) <= (best.spared if best else 0):
            continue  # nor more letters than are equal to the one a period before, wherever they lie
        differs = np.flatnonzero(~equal)
        edges = np.concatenate([[-1], differs, [len(values) - period]])
        lengths = np.diff(edges) - 1
        longest = int((lengths // period).argmax())  # the first of those that spare as much
        repeat = Repeat(int(edges[longest]) + 1, int(lengths[longest]) + period, period)
        if repeat.spared > (best.spared if best else 0):
            best = repeat
    return best


def _best_cuts(
    repeat: Repeat, costs: Sequence[float], values: NDArray[np.int64], known: Collection[bytes]
) -> list[int]:
    """The ends of its repetitions, cut where least is handed on, into ``known`` ones where that is no worse; none if it
    cannot be cut."""
    ways: dict[tuple[int, ...], float] = {}
    for shift in range(min(repeat.period, repeat.length - 2 * repeat.period + 1)):
        count = (repeat.length - shift) // repeat.period
        places = tuple(repeat.start + shift + i * repeat.period for i in range(count + 1))
        ways[places] = sum(costs[place] for place in places) / len(places)
    fewest = min(ways.values())
    if math.isinf(fewest):
        return []
    near: list[tuple[int, ...]] = [places for places, cost in ways.items() if cost <= _NEAR * fewest]

    def order(way: int) -> tuple[bool, int, float, int]:
        places = near[way]
        new = values[places[0] : places[1]].tobytes() not in known
        return new, -len(places), ways[places], way

    return list(near[min(range(len(near)), key=order)])
