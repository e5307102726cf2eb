"""What the kernels that move whole chunks read to follow an exchange's schedule, and where the chunks lie in buffers.

A rank packs what it sends into one buffer and unpacks what it gets from another; the kernels move bytes between these
and the slots. As in tables.py, chunks without bytes are neither sent nor awaited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sfcompile.codegen.kernels.chunks import RECEIVE, SEND
from sfcompile.codegen.kernels.tables import BANK_ALIGN, Table, table_of
from sfcompile.codegen.schedule.exchange import ExchangeSchedule
from sfcompile.runtime.program.instructions import Put, Wait
from sfcompile.runtime.program.phases import EXCHANGE_FINISH, EXCHANGE_START
from sfcompile.runtime.program.sites import align, nbytes


@dataclass(frozen=True)
class PackedChunk:
    """A chunk in a buffer, ``at`` bytes from its start: of a slot, for or from ``rank``."""

    rank: int
    slot: int
    at: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ChunkTables:
    """One rank's tables.

    Attributes:
        sends, receives: rows for the kernels (chunks.py).
        outgoing, incoming: the chunks in the buffers, of ``out_bytes`` and ``in_bytes``, in the order of the rows.
        bank_bytes: bytes of the bank, the same on every rank: the schedule's slots, and room to stage what leaves by
            NVSHMEM.
    """

    sends: Table
    receives: Table
    outgoing: tuple[PackedChunk, ...]
    incoming: tuple[PackedChunk, ...]
    out_bytes: int
    in_bytes: int
    bank_bytes: int


def make_chunk_tables(schedule: ExchangeSchedule, rank: int, machine_of: Sequence[int]) -> ChunkTables:
    """Tables of a rank of the mesh.

    Args:
        machine_of: machine of each rank of the mesh.
    """
    site, slots, program = schedule.site, schedule.slots, schedule.program(rank)
    puts = [step for step in program.phases[EXCHANGE_START] if isinstance(step, Put)]
    waits = [step for step in program.phases[EXCHANGE_FINISH] if isinstance(step, Wait)]
    bank_bytes = align(schedule.heap_bytes, BANK_ALIGN)
    staging: dict[int, int] = {}  # of every slot, whatever this rank sends: banks are the same on every rank
    if len(set(machine_of)) > 1:
        for step in puts:
            staging[step.slot] = bank_bytes
            bank_bytes += align(slots[step.slot].nbytes, BANK_ALIGN)
    outgoing, out_bytes = _packed(
        [(step.dst, step.slot, site.chunk_shape(rank, step.dst)) for step in puts], site.dtype
    )
    incoming, in_bytes = _packed(
        [(step.src, step.slot, site.chunk_shape(step.src, rank)) for step in waits], site.dtype
    )
    sends, receives = [], []
    for chunk in outgoing:
        slot, size = chunk.slot, nbytes(chunk.shape, site.dtype)
        net = int(machine_of[chunk.rank] != machine_of[rank])
        sends.append([chunk.rank, slot, chunk.at, slots[slot].offset, size, net, staging.get(slot, 0)])
    for chunk in incoming:
        receives.append([chunk.slot, slots[chunk.slot].offset, chunk.at, nbytes(chunk.shape, site.dtype)])
    return ChunkTables(
        table_of(sends, SEND), table_of(receives, RECEIVE), outgoing, incoming, out_bytes, in_bytes, bank_bytes
    )


def _packed(
    chunks: Sequence[tuple[int, int, tuple[int, ...]]], dtype: torch.dtype
) -> tuple[tuple[PackedChunk, ...], int]:
    """``(rank, slot, shape)`` of chunks, laid one after the other where they have bytes; and the bytes of all."""
    packed, at = [], 0
    for rank, slot, shape in chunks:
        if 0 not in shape:
            packed.append(PackedChunk(rank, slot, at, shape))
            at += align(nbytes(shape, dtype), BANK_ALIGN)
    return tuple(packed), at
