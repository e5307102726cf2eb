"""What a call of a site is given: the site's schedule, this rank's own heap, and the call's numbers.

Schedules are codegen's, which stands above this room: here is what the runtime reads of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch

from sfcompile.runtime.program.instructions import Arrival, Chunk, Heads, RankProgram
from sfcompile.runtime.program.sites import AttentionSite, ExchangeSite


class SlotPlace(Protocol):
    """Where a slot lies in a bank."""

    @property
    def offset(self) -> int:
        """Bytes from the start of the bank."""


class SiteSchedule(Protocol):
    """What the executor reads of a schedule (codegen hands it in)."""

    @property
    def site(self) -> Any:
        """What the site asks for (runtime/program/sites.py)."""

    @property
    def slots(self) -> Sequence[SlotPlace]:
        """Every slot of a bank."""

    @property
    def heap_bytes(self) -> int:
        """Bytes of one bank, up to the end of its last slot."""

    @property
    def assembled(self) -> bool:
        """Whether weights come together in the bank, where this rank's own rows lie too."""

    @property
    def parts(self) -> int:
        """In how many parts what it moves comes and goes."""

    def place(self, rank: int, slot: int) -> int:
        """Where a slot lies at a rank: bytes from the start of the bank."""

    def members(self, rank: int) -> tuple[int, tuple[int, ...]]:
        """Which rank of the schedule a rank of the job is, and the job's ranks of its group."""

    def program(self, rank: int) -> RankProgram:
        """One rank's instructions."""

    def shape(self, rank: int, arrival: Arrival) -> tuple[int, ...]:
        """Shape of what arrives at a rank."""

    def form(self, rank: int, arrival: Arrival) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of it as it travels (runtime/program/formats.py)."""


class AttentionSiteSchedule(SiteSchedule, Protocol):
    """What it reads of an attention's schedule beyond that."""

    @property
    def site(self) -> AttentionSite:
        """The attention."""

    def heads(self, rank: int) -> Heads:
        """The query heads that a rank computes."""

    def kv_heads(self, rank: int) -> Heads:
        """The key and value heads that a rank computes with."""

    def rows(self, tensor: str, chunk: Chunk) -> tuple[int, int]:
        """Which of its rank's local tokens a chunk is."""

    def positions(self, tensor: str, chunk: Chunk) -> tuple[tuple[int, int], ...]:
        """The global token positions of a chunk."""


class AssembledSchedule(SiteSchedule, Protocol):
    """What it reads of the schedule of weights that come together in the bank, each a part of it."""

    @property
    def site(self) -> ExchangeSite:
        """All of their elements."""

    def share(self, rank: int, part: int) -> tuple[int, ...]:
        """Shape of what a rank holds of a weight."""

    def whole(self, part: int) -> tuple[int, tuple[int, ...]]:
        """Where a weight lies in the bank, in bytes, and its shape."""

    def own_place(self, rank: int, part: int) -> int:
        """Where a rank's own rows of a weight lie: bytes from the start of the bank."""


def is_assembled(schedule: SiteSchedule) -> TypeGuard[AssembledSchedule]:
    """Whether a schedule is that of weights that come together in the bank."""
    return schedule.assembled


def is_attention(schedule: SiteSchedule) -> TypeGuard[AttentionSiteSchedule]:
    """Whether a schedule is an attention's: the site says so, schedules are codegen's and unknown here."""
    return isinstance(schedule.site, AttentionSite)


class OwnHeap(Protocol):
    """This rank's own heap segment."""

    def chunk(self, bank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of ``shape`` at ``offset`` bytes of a bank, in the segment's own memory."""


class SiteCall(NamedTuple):
    """A site begins, in a call of its program (calls.py).

    Attributes:
        program, site: numbers: which program of the session, which of its sites.
        epoch: how-manieth site of the job this is to begin.
        tag: of the program's call.
        lasting: addresses of tensors that nobody writes to before the program's call has ended.
    """

    job_rank: int
    program: int
    site: int
    schedule: SiteSchedule
    epoch: int
    tag: int = 0
    lasting: Collection[int] = ()
