"""What calls of a site look up: worked out once, and what the schedule says."""

from __future__ import annotations

import pytest
import torch
from random_sites import gather_site, random_case
from rank_workers import schedules_of

from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.runtime.program.phases import PUTS
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.site_call import is_attention
from sfcompile.runtime.rank.site_tables import SiteTables, cut_out
from sfcompile.runtime.wires.symmetric_heap import HeapSize, local_segment


@pytest.mark.parametrize("seed", range(12))
def test_messages_are_the_schedules(seed: int) -> None:
    schedule = schedules_of(random_case(seed, ranks=4))[0]
    assert is_attention(schedule)
    heap = local_segment(HeapSize(len(schedule.slots), schedule.heap_bytes))
    for rank in range(4):
        tables = SiteTables(schedule, rank, heap)
        for name, phase in PUTS.items():
            whole = torch.randn(schedule.site.local_shape(name, rank))
            heads = schedule.heads if name == "q" else schedule.kv_heads
            sends = tables.sends(phase, -1)
            assert tables.sends(phase, -1) is sends
            for send, step in zip(sends, tables.program.phases[phase], strict=True):
                chunk = cut_out(whole, send.cut)
                (arrival,) = (a for a in schedule.program(step.dst).arrivals if a.slot == step.slot)
                assert tuple(chunk.shape) == schedule.shape(step.dst, arrival)
                (first, last), (start, stop) = heads(step.dst), schedule.rows(name, arrival.chunk)
                assert torch.equal(chunk, whole[:, first:last, start:stop])
            first, last = heads(rank)
            assert torch.equal(cut_out(whole, tables.stays(name)), whole[:, first:last])


def test_views_of_both_banks_are_the_heaps() -> None:
    schedule = build_exchange(gather_site(2), Mesh.of(Topology.grid(1, 2), 1, 2))
    heap = local_segment(HeapSize(len(schedule.slots), schedule.heap_bytes))
    tables = SiteTables(schedule, 1, heap)
    for bank in (0, 1):
        views, arrivals = tables.bank(bank)
        assert tables.bank(bank).views is views and [view for _, view in arrivals] == list(views.values())
        for slot, view in views.items():
            at = view.data_ptr() - heap.address
            assert at == heap.size.bank_at(bank) + schedule.slots[slot].offset
    assert [send.cut for send in tables.sends("exchange_start", -1)] == [()]


def test_parts_are_sent_by_themselves() -> None:
    schedule = schedules_of(random_case(3, ranks=2))[0]
    heap = local_segment(HeapSize(len(schedule.slots), schedule.heap_bytes))
    tables, site = SiteTables(schedule, 0, heap), schedule.site
    parts = {step.part for step in tables.program.phases["put_k"]}
    by_part = [send for part in sorted(parts) for send in tables.sends("put_k", part)]
    assert sorted(send.slot for send in by_part) == sorted(send.slot for send in tables.sends("put_k", -1))
    if site.parts == len(parts):
        assert all(dim == 1 for send in by_part for dim, *_ in send.cut), "a part comes alone: no tokens are cut"
