"""Exchanges and credits as kernels, all ranks in one process, one after the other."""

from __future__ import annotations

import pytest
import torch
from deadline import Deadline
from emulated_nvshmem import DeviceCalls
from random_sites import even, rows
from watched import Watch

from sfcompile.codegen.engines.launch import HeapView
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.engines.transfers import ReleaseKernel, TransferKernels
from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.toolchain.interpreter import interpreting
from sfcompile.runtime.program.sites import ExchangeSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.wires.symmetric_heap import HeapSize, Segment, local_segment
from sfcompile.runtime.wires.transport import word_of

CPU = torch.device("cpu")
RANKS = 3
MESH = Mesh.of(Topology.grid(3, 1), 3, 1)


def run(
    schedule: Schedule,
    shards: list[torch.Tensor],
    shape: list[tuple[int, ...]],
    machine_of: tuple[int, ...],
    stranger: int = 7,
) -> list[torch.Tensor]:
    """Three epochs of a site on all ranks, in calls of tag 7, but rank 0 the last time; the outputs of the last."""
    segments: list[Segment] = []
    watch = Watch()
    poll = Deadline(1.0)

    def target(rank: int) -> KernelTarget:
        base = [segment.address for segment in segments]
        return KernelTarget(CPU, calls=DeviceCalls(lambda address, pe: address - base[rank] + base[pe]).names())

    unused = KernelTarget(CPU, calls={})
    sizes = {TransferKernels(schedule, rank, unused, machine_of).bank_bytes for rank in range(RANKS)}
    (bank_bytes,) = sizes
    size = HeapSize(len(schedule.slots), bank_bytes, RANKS)
    segments += [local_segment(size) for _ in range(RANKS)]
    kernels = [TransferKernels(schedule, rank, target(rank), machine_of) for rank in range(RANKS)]
    releases = [ReleaseKernel(rank, RANKS, target(rank), machine_of) for rank in range(RANKS)]
    outs = [torch.full(shape[rank], -1.0) for rank in range(RANKS)]
    with interpreting(poll):
        for epoch in (1, 2, 3):
            views = []
            for rank in range(RANKS):
                table = torch.tensor([(s.address, pe, segments[rank].address) for pe, s in enumerate(segments)])
                table[:, 0] = torch.where(
                    torch.tensor([machine_of[p] == machine_of[rank] for p in range(RANKS)]), table[:, 0], 0
                )
                receivers = torch.tensor([other for other in range(RANKS) if other != rank])
                signal = word_of(epoch, stranger if (epoch, rank) == (3, 0) else 7)
                views.append(HeapView(table, torch.tensor(size.place(epoch, signal, watch.watched)), receivers))
            sign = 1 if epoch == 3 else -1
            own = [kernels[rank].put(shards[rank] * sign, views[rank]) for rank in range(RANKS)]
            for rank in range(RANKS):
                kernels[rank].receive(outs[rank], own[rank], views[rank])
                releases[rank].run(views[rank].heaps, views[rank].place)
    assert watch.status["stranger"] in ({word_of(3, 7), word_of(3, stranger)} if stranger != 7 else {0})
    return outs


@pytest.mark.parametrize("machine_of", [(0, 0, 0), (0, 1, 2), (0, 0, 1)], ids=["peer", "nvshmem", "mixed"])
def test_a_rank_in_another_call_is_noted(machine_of: tuple[int, ...]) -> None:
    """Rank 0 is in another call in the last epoch: chunks come, with the wrong tag."""
    whole = torch.randn(2, 6, 5)
    gather = build_exchange(ExchangeSite.gather("g", (2, 6, 5), torch.float32, 1, even(6, RANKS)), MESH)
    shards = [whole[:, rows(owned)] for owned in even(6, RANKS)]
    run(gather, shards, [(2, 6, 5)] * 3, machine_of, stranger=9)


@pytest.mark.parametrize("machine_of", [(0, 0, 0), (0, 1, 2), (0, 0, 1)], ids=["peer", "nvshmem", "mixed"])
def test_a_gather_and_a_switch(machine_of: tuple[int, ...]) -> None:
    """Uneven shards, a rank without any, odd bytes at the ends of chunks."""
    whole = torch.randn(2, 11, 5)
    owners = (((0, 4),), (), ((4, 7),))
    gather = build_exchange(ExchangeSite.gather("g", (2, 11, 5), torch.float32, 1, owners), MESH)
    for out in run(gather, [whole[:, rows(owned)] for owned in owners], [(2, 11, 5)] * 3, machine_of):
        assert torch.equal(out, whole)
    wanted = even(5, RANKS)
    switch = build_exchange(ExchangeSite("r", (2, 11, 5), torch.float32, 1, 1, 1, owners, 2, wanted), MESH)
    shapes = [(2, 11, len(rows(want))) for want in wanted]
    for out, want in zip(run(switch, [whole[:, rows(o)] for o in owners], shapes, machine_of), wanted, strict=True):
        assert torch.equal(out, whole[:, :, rows(want)])


@pytest.mark.parametrize("machine_of", [(0, 0, 0), (0, 1, 2), (0, 0, 1)], ids=["peer", "nvshmem", "mixed"])
def test_what_all_tell_and_rows_for_some_in_one_exchange(machine_of: tuple[int, ...]) -> None:
    """A line of which ranks own several stretches: two elements for all, and rows of 5 for a neighbour (halo.py)."""
    whole = torch.randn(21)
    owners = (((0, 2), (6, 5)), ((2, 2), (11, 10)), ((4, 2),))
    wanted = (((0, 6), (11, 5)), ((0, 11),), ((0, 6), (16, 5)))
    line = build_exchange(ExchangeSite("l", (21,), torch.float32, 0, 1, 1, owners, 0, wanted), MESH)
    shapes = [(len(rows(want)),) for want in wanted]
    for out, want in zip(run(line, [whole[rows(o)] for o in owners], shapes, machine_of), wanted, strict=True):
        assert torch.equal(out, whole[rows(want)])
