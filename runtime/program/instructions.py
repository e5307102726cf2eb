"""What a schedule tells one rank to do: the instruction set of the executor.

The same frozen objects are checked for all ranks (codegen/proof/checker.py), timed (codegen/plan/simulator.py) and run
(runtime/rank/executor.py); there is no second description of the algorithm. *Slots* are numbered places in every rank's
symmetric heap, each with a signal word that holds the epoch of its last arrival.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

Heads = tuple[int, int]
"""A head slice ``[start, stop)``."""


class Chunk(NamedTuple):
    """Part ``part`` of the tokens that rank ``src`` owns, as its schedule cuts them.

    A tuple, for the sake of its hash: chunks are the keys of most tables that a step looks into.
    """

    src: int
    part: int = 0

    def __str__(self) -> str:
        return f"{self.src}" if self.part == 0 else f"{self.src}.{self.part}"


@dataclass(frozen=True)
class Put:
    """Copy a part of this rank's own ``tensor`` (the heads that ``dst`` computes) into ``slot`` of ``dst``; signal."""

    tensor: str
    part: int
    dst: int
    slot: int

    def __str__(self) -> str:
        suffix = f".{self.part}" if self.part else ""
        return f"put {self.tensor}{suffix} -> rank {self.dst} slot {self.slot}"


@dataclass(frozen=True)
class Forward:
    """Copy what arrived in ``slot`` on to ``to_slot`` of rank ``dst`` and signal it (one hop of the ring)."""

    slot: int
    dst: int
    to_slot: int

    def __str__(self) -> str:
        return f"forward slot {self.slot} -> rank {self.dst} slot {self.to_slot}"


@dataclass(frozen=True)
class Wait:
    """Block until ``slot`` holds this epoch's chunk, sent by rank ``src``."""

    slot: int
    src: int

    def __str__(self) -> str:
        return f"wait slot {self.slot} from rank {self.src}"


@dataclass(frozen=True)
class Attend:
    """Attend every query chunk of ``q`` against every key chunk of ``kv`` in one call; accumulate per query chunk.

    ``q_slots``, ``k_slots``, ``v_slots`` say where each chunk lies; None is this rank's own tensor.
    """

    q: tuple[Chunk, ...]
    kv: tuple[Chunk, ...]
    q_slots: tuple[int | None, ...]
    k_slots: tuple[int | None, ...]
    v_slots: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"attend Q{{{','.join(map(str, self.q))}}} x KV{{{','.join(map(str, self.kv))}}}"


@dataclass(frozen=True)
class Push:
    """Send the finished output of query chunk ``q`` home into ``slot`` of rank ``q.src``."""

    q: Chunk
    slot: int

    def __str__(self) -> str:
        return f"push O{self.q} -> rank {self.q.src} slot {self.slot}"


Instruction = Put | Forward | Wait | Attend | Push


class Arrival(NamedTuple):
    """A chunk that this rank receives once per epoch: in which slot, from whom, and what it is.

    ``tensor`` is "q", "k", "v", "o" (an output coming home) or "x" (what an exchange moves).
    """

    slot: int
    src: int
    tensor: str
    chunk: Chunk

    def __str__(self) -> str:
        return f"{self.tensor}{self.chunk} in slot {self.slot} from rank {self.src}"


@dataclass(frozen=True)
class RankProgram:
    """One rank's part of a schedule: instructions by phase, and everything that will arrive."""

    rank: int
    phases: dict[str, tuple[Instruction, ...]] = field(hash=False)
    arrivals: tuple[Arrival, ...] = ()

    def __str__(self) -> str:
        lines = [f"rank {self.rank}"]
        for phase, instructions in self.phases.items():
            lines += [f"  {phase:<15} {instruction}" for instruction in instructions]
        return "\n".join(lines)
