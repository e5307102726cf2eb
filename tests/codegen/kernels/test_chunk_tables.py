"""Tables of an exchange: every chunk with bytes is sent, received and packed once; banks are equal."""

from __future__ import annotations

import torch
from random_sites import even

from sfcompile.codegen.kernels.chunk_tables import make_chunk_tables
from sfcompile.codegen.kernels.chunks import RECEIVE, SEND
from sfcompile.codegen.kernels.tables import BANK_ALIGN
from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.runtime.program.sites import ExchangeSite, nbytes
from sfcompile.runtime.program.topology import Topology

RANKS = 3
OWNED = (((0, 4),), (), ((4, 7),))
SCHEDULE = build_exchange(
    ExchangeSite("x", (2, 11, 5), torch.float16, 1, 1, 1, OWNED, 2, even(5, RANKS)), Mesh.of(Topology.grid(3, 1), 3, 1)
)


def test_what_one_sends_another_receives() -> None:
    every = [make_chunk_tables(SCHEDULE, rank, (0, 0, 1)) for rank in range(RANKS)]
    sent, received = set(), set()
    for rank, tables in enumerate(every):
        for row, chunk in zip(tables.sends.tolist(), tables.outgoing, strict=True):
            send = dict(zip(SEND, row, strict=True))
            assert (send["dst"], send["slot"], send["from_at"]) == (chunk.rank, chunk.slot, chunk.at)
            assert send["net"] == ((rank == 2) != (chunk.rank == 2))
            sent.add((rank, send["dst"], send["slot"], send["to_at"], send["nbytes"]))
        for row, chunk in zip(tables.receives.tolist(), tables.incoming, strict=True):
            receive = dict(zip(RECEIVE, row, strict=True))
            assert (receive["slot"], receive["to_at"]) == (chunk.slot, chunk.at)
            received.add((chunk.rank, rank, receive["slot"], receive["at"], receive["nbytes"]))
    assert sent == received and len(sent) == 4  # rank 1 owns nothing: it sends nothing


def test_chunks_lie_apart_and_banks_are_equal() -> None:
    for machines, staged in (((0, 0, 0), False), ((0, 1, 2), True)):
        every = [make_chunk_tables(SCHEDULE, rank, machines) for rank in range(RANKS)]
        assert len({tables.bank_bytes for tables in every}) == 1
        assert (every[0].bank_bytes > SCHEDULE.heap_bytes + BANK_ALIGN) == staged
        for tables in every:
            for chunks, total in ((tables.outgoing, tables.out_bytes), (tables.incoming, tables.in_bytes)):
                ends = [chunk.at + nbytes(chunk.shape, torch.float16) for chunk in chunks]
                assert all(chunk.at % BANK_ALIGN == 0 for chunk in chunks)
                assert all(end <= chunk.at for end, chunk in zip(ends, chunks[1:], strict=False))
                assert max(ends, default=0) <= total
            staging = [row[SEND.index("staging")] for row in tables.sends.tolist()]
            assert len(set(staging)) == len(staging) if staged else set(staging) <= {0}
