"""What a schedule tells one rank to do: the instruction set of the executor.

The same frozen objects are checked for all ranks (codegen/checker.py) and run (executor.py); there is no second
description of the algorithm. A chunk is named by the rank whose tokens it holds; *slots* are numbered places in every
rank's symmetric heap, each with a signal word that holds the epoch of its last arrival.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Heads = tuple[int, int]
"""A head slice ``[start, stop)``."""


@dataclass(frozen=True)
class Put:
    """Copy heads ``heads`` (None: all) of this rank's own ``tensor`` into ``slot`` of rank ``dst`` and signal it."""

    tensor: str
    heads: Heads | None
    dst: int
    slot: int

    def __str__(self) -> str:
        part = "" if self.heads is None else f"[h{self.heads[0]}:{self.heads[1]}]"
        return f"put {self.tensor}{part} -> rank {self.dst} slot {self.slot}"


@dataclass(frozen=True)
class Forward:
    """Copy what arrived in ``slot`` on to the same slot of rank ``dst`` and signal it (one hop of the ring)."""

    dst: int
    slot: int

    def __str__(self) -> str:
        return f"forward slot {self.slot} -> rank {self.dst}"


@dataclass(frozen=True)
class Wait:
    """Block until ``slot`` holds this epoch's chunk, sent by rank ``src``."""

    slot: int
    src: int

    def __str__(self) -> str:
        return f"wait slot {self.slot} from rank {self.src}"


@dataclass(frozen=True)
class Attend:
    """Attend the queries of rank ``q_src`` against the keys of rank ``kv_src``; accumulate under ``q_src``.

    Slots are None for chunks that are this rank's own tensors.
    """

    q_src: int
    kv_src: int
    q_slot: int | None
    k_slot: int | None
    v_slot: int | None

    def __str__(self) -> str:
        return f"attend Q{self.q_src} x KV{self.kv_src}"


@dataclass(frozen=True)
class Push:
    """Send the finished output of ``q_src``'s queries home into ``slot``."""

    q_src: int
    slot: int

    def __str__(self) -> str:
        return f"push O -> rank {self.q_src} slot {self.slot}"


Instruction = Put | Forward | Wait | Attend | Push


@dataclass(frozen=True)
class Arrival:
    """A chunk that this rank receives once per epoch: from whom, how large, in which slot."""

    slot: int
    src: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RankProgram:
    """One rank's part of a schedule: instructions by phase, and everything that will arrive.

    ``heads[r]`` is the head slice that rank r computes for this rank's queries (attention only; includes this rank).
    """

    rank: int
    phases: dict[str, tuple[Instruction, ...]] = field(hash=False)
    arrivals: tuple[Arrival, ...] = ()
    heads: dict[int, Heads] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        lines = [f"rank {self.rank}"]
        for phase, instructions in self.phases.items():
            lines += [f"  {phase:<13} {instruction}" for instruction in instructions]
        return "\n".join(lines)
