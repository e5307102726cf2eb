"""Which rows of a weight each rank holds, where ranks hold the large weights of a model in shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from sfcompile.errors import OptionError
from sfcompile.runtime.program.intervals import Runs, slice_of

LARGE_BYTES = 1 << 16
"""A weight of so many bytes or more is shared or cut; below that, pages, files and exchanges cost more than they save.
"""


def can_be_cut(shape: Sequence[int], strides: Sequence[int], item_bytes: int, ranks: int) -> bool:
    """Whether a weight is large, has a row for each of so many ranks, and lies row after row."""
    dense, step = True, 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        dense, step = dense and (stride == step or size == 1), step * size
    return bool(shape) and shape[0] >= ranks and dense and step * item_bytes >= LARGE_BYTES


@dataclass(frozen=True)
class WeightRows:
    """A weight of a whole ``shape``, cut along its first dim into stretches of rows, of which every rank holds one.

    Attributes:
        places: by rank, the how-manieth stretch it holds (:func:`places_of`).
    """

    shape: tuple[int, ...]
    places: tuple[int, ...]

    def rows(self, rank: int) -> tuple[int, int]:
        """A rank's rows: ``[start, stop)``."""
        return slice_of(self.shape[0], self.count, self.places[rank])

    @cached_property
    def count(self) -> int:
        """How many stretches there are: one for every rank, or for every rank of a machine."""
        return count_of(self.places)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of what a rank holds."""
        start, stop = self.rows(rank)
        return stop - start, *self.shape[1:]

    @cached_property
    def owned(self) -> tuple[Runs, ...]:
        """Every rank's rows, as runs."""
        return tuple(((start, stop - start),) for start, stop in map(self.rows, range(len(self.places))))


def count_of(places: Sequence[int]) -> int:
    """How many stretches there are."""
    return max(places) + 1


def places_of(machine_of: Sequence[int], by_machine: bool = False) -> tuple[int, ...]:
    """By rank its place among the stretches: ranks that have one place in their machines hold neighbouring stretches,
    so that a weight can come from other machines first, each row once, and then go round inside each.

    Machines with unequal numbers of ranks: in the order of the ranks.

    Args:
        by_machine: each machine holds all stretches, one by each of its ranks; machines are alike.
    """
    members: dict[int, list[int]] = {}
    for rank, machine in enumerate(machine_of):
        members.setdefault(machine, []).append(rank)
    if by_machine:
        return tuple(members[machine].index(rank) for rank, machine in enumerate(machine_of))
    if len({len(ranks) for ranks in members.values()}) > 1:
        return tuple(range(len(machine_of)))
    places = [0] * len(machine_of)
    for number, ranks in enumerate(members.values()):
        for local, rank in enumerate(ranks):
            places[rank] = local * len(members) + number
    return tuple(places)


def held_in_shares(weights: str, on_gpu: bool, machine_of: Sequence[int]) -> tuple[int, ...] | None:
    """By rank which stretch of rows it holds of a large weight (:func:`places_of`); None: ranks keep no shares.

    GPU ranks keep shares wherever they are; CPU ranks of a machine one copy together, in memory that they share.

    Args:
        weights: the option of that name.
        on_gpu: whether they are GPU ranks.

    Raises:
        OptionError: GPU ranks, whose machines are not alike, shall hold all weights on each machine.
    """
    by_machine = weights == "sharded-by-machine"
    if weights == "whole" or (not on_gpu and (by_machine or len(set(machine_of)) == 1)):
        return None
    if by_machine and len(set(Counter(machine_of).values())) > 1:
        raise OptionError(
            f"weights={weights!r} with GPU ranks, and machines of unequal numbers of ranks",
            "the GPUs of a machine hold all weights in shares, and shares are alike on all machines",
            "use weights='sharded': all ranks together hold them once",
        )
    places = places_of(machine_of, by_machine)
    return places if count_of(places) > 1 else None
