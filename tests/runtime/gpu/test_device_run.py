"""Epochs on the device: counted in order, two open calls apart, good for replays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deadline import Deadline
from kernel_ranks import Job, make_site
from local_ranks import LocalRanks
from random_sites import gather_site, rows

from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.toolchain.interpreter import interpreting
from sfcompile.errors import InternalError, StreamFusionError
from sfcompile.runtime.gpu.device_run import DeviceRun, DeviceRuns
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import Session
from sfcompile.runtime.rank.site_call import SiteCall
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, PLACE, HeapSize, Watched
from sfcompile.runtime.wires.transport import TAG_BITS, word_of

SIZE = HeapSize(1, 64, 1)
CPU = torch.device("cpu")


class Heap:
    size = SIZE
    table = torch.zeros(1, 3, dtype=torch.int64)
    domains = (0,)

    def chunk(self, bank: int, offset: int, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def close(self) -> None:
        """Nothing."""


class Told:
    """Release and engine that write down the epochs that their kernels would read."""

    bank_bytes = 64

    def __init__(self) -> None:
        self.released: list[int] = []
        self.seen: list[tuple[str, int]] = []
        self.signals: list[int] = []

    def run(self, heaps: torch.Tensor, place: torch.Tensor) -> None:
        self.released.append(int(place[0]))

    def view(self, table: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        assert place[2:8].tolist() == SIZE.place(0, 0, Watched(0, 0, 0))[2:8]
        self.signals.append(int(place[1]))
        return place

    def put(self, name: str, tensor: torch.Tensor, view: torch.Tensor) -> None:
        self.seen.append((name, int(view[0])))

    def start(self, tensor: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        self.seen.append(("x", int(view[0])))
        return tensor

    def put_fused(self, name: str, rows: Any, sources: Any, view: torch.Tensor) -> None:
        self.seen.append((f"{name} as {rows} of {len(sources)}", int(view[0])))

    def attend(self, mask: torch.Tensor | None, view: torch.Tensor) -> torch.Tensor:
        self.seen.append(("attend", int(view[0])))
        return torch.ones(1)

    def collect(self, out: torch.Tensor, view: torch.Tensor) -> None:
        self.seen.append(("collect", int(view[0])))

    def receive(self, out: torch.Tensor, own: torch.Tensor, view: torch.Tensor) -> None:
        self.seen.append(("receive", int(view[0])))

    members = (0,)

    def gave_up(self, slot: int, wanted: int, seen: int, limit_s: float) -> StreamFusionError:
        return StreamFusionError(f"slot {slot}", "", "")


def runs_of(told: Told, opened: int = 0) -> DeviceRuns:
    runs = DeviceRuns(Heap(), told, CPU, DeviceStatus(0, CPU, 2.0), opened)
    runs.prepare(told)
    return runs


def test_two_open_calls_read_epochs_of_their_own() -> None:
    told = Told()
    runs = runs_of(told, opened=6)
    first = runs.open(told, 7)
    second = runs.open(told, 8)
    first.put("put_q", torch.zeros(1))
    first.put_fused("put_k", [torch.zeros(1), torch.zeros(2)], "rope")
    second.put("exchange_start", torch.zeros(1))
    first.attend(None)
    assert first.output is not None
    first.collect(first.output)
    second.receive(torch.zeros(1))
    assert told.seen == [("q", 7), ("k as rope of 2", 7), ("x", 8), ("attend", 7), ("collect", 7), ("receive", 8)]
    runs.finish(8)
    assert told.released == [8]


def test_the_device_counts_on_when_the_host_does_not() -> None:
    """A replayed graph repeats the device's work with the host's numbers of the capture."""
    told = Told()
    runs = runs_of(told)
    for _ in range(3):
        run = runs.open(told, 1)
        run.put("put_v", torch.zeros(1))
        runs.finish(1)
    assert told.seen == [("v", 1), ("v", 2), ("v", 3)] and told.released == [1, 2, 3]


def test_host_epochs_keep_the_count() -> None:
    told = Told()
    runs = runs_of(told)
    assert runs.host_bank(4).chunk(0, 0, (2,), torch.int8).shape == (2,)
    run = runs.open(told, 5)
    run.attend(None)
    assert told.seen == [("attend", 5)]


def test_signals_hold_the_epoch_and_the_tag_of_the_call() -> None:
    """Whose kernels set it: a replayed graph counts on under the tag that stands outside of it."""
    told = Told()
    runs = runs_of(told, opened=4)
    for tag in (7, 2**TAG_BITS - 1, 0):
        runs.begin(tag)
        runs.open(told, 5)
        runs.open(told, 6)
    assert told.signals == [
        word_of(epoch, tag) for epoch, tag in zip(range(5, 11), (7, 7, -1, -1, 0, 0), strict=True)
    ]  # fmt: skip
    runs.begin(9)
    runs.host_bank(11)
    runs.open(told, 12)
    assert told.signals[-1] == word_of(12, 9)


GATHER = build_exchange(gather_site(2), Mesh.of(Topology.grid(1, 2), 1, 2))


def test_nothing_is_released_before_the_older_site_has_ended() -> None:
    """Sites may end in the other order; a credit for an epoch that is still read lets peers overwrite its bank."""
    told = Told()
    runs = runs_of(told)
    world: Any = SimpleNamespace(rank=0, global_rank=0, topology=Topology.grid(1, 2), group="")

    def open_site(call: SiteCall, engine: Told) -> DeviceRun:
        return runs.open(engine, call.epoch)

    session = Session(world)
    side: Any = SimpleNamespace(size=SIZE, room=lambda *of_program: SIZE, open=open_site, prepare=lambda engines: None)
    session._side = side
    session.load("p", [GATHER, GATHER, GATHER], [told, told, told])
    shard, whole = torch.zeros(2, 5, 3), torch.zeros(2, 10, 3)
    for site in (0, 1):
        session.put("p", site, "exchange_start", shard)
    session.receive("p", 1, whole, [shard])
    assert told.released == []
    session.receive("p", 0, whole, [shard])
    assert told.released == [2]  # both, in one
    session.put("p", 2, "exchange_start", shard)
    with pytest.raises(InternalError, match="1 of 1 tensors that puts of gather read lie elsewhere"):
        session.receive("p", 2, whole, [shard.clone()])
    session.receive("p", 2, whole, [shard])
    assert told.released == [2, 3]


def test_two_gathers_of_one_geometry_keep_what_is_theirs() -> None:
    """They share an engine; what belongs to a call must not lie there."""
    ranks = LocalRanks([GATHER], 2)
    wholes = [torch.randn(2, 10, 3) for _ in range(2)]
    with interpreting(Deadline(5.0)):
        opened = []
        for epoch, whole in enumerate(wholes, 1):
            runs = [of_rank.open(ranks.engines[rank][0], epoch) for rank, of_rank in enumerate(ranks.runs)]
            for rank, run in enumerate(runs):
                run.put("exchange_start", whole[:, rows(GATHER.site.owned[rank])])
            opened.append(runs)
        for epoch in (2, 1):  # and they end in the other order
            for run in opened[epoch - 1]:
                out = torch.full((2, 10, 3), torch.nan)
                run.receive(out)
                assert torch.equal(out, wholes[epoch - 1])


def storages() -> set[int]:
    """Memory of every tensor that is alive; what torch.func left of other tests wraps tensors and has none itself."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.layout is torch.strided]
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if not wrapped(tensor)}


def test_a_call_allocates_nothing_that_outlives_it() -> None:
    """The compiler's CUDA graphs check that: a table or a workspace that is made in a put would end the capture."""
    schedules = [Job("torus", 1, 2, 1, 2, make_site(70, 2)).schedule(), GATHER]
    ranks = LocalRanks(schedules, 2)
    whole = torch.randn(2, 10, 3)
    shards = [whole[:, rows(GATHER.site.owned[rank])] for rank in range(2)]
    q = torch.randn(1, 4, 70, 32)
    with interpreting(Deadline(20.0)):
        LocalRanks(schedules, 2)  # what Triton's interpreter itself keeps
        before = storages()
        for epoch in (1, 3):
            attends = [of_rank.open(ranks.engines[rank][0], epoch) for rank, of_rank in enumerate(ranks.runs)]
            for run in attends:
                for phase in ("put_q", "put_k", "put_v"):
                    run.put(phase, q)
            for run in attends:
                run.attend(None)
            for run in attends:
                assert run.output is not None
                run.collect(run.output)
            for of_rank in ranks.runs:
                of_rank.finish(epoch)
            gathers = [of_rank.open(ranks.engines[rank][1], epoch + 1) for rank, of_rank in enumerate(ranks.runs)]
            for run, shard in zip(gathers, shards, strict=True):
                run.put("exchange_start", shard)
            for run in gathers:
                out = torch.empty_like(whole)
                run.receive(out)
                assert torch.equal(out, whole)
            for of_rank in ranks.runs:
                of_rank.finish(epoch + 1)
            del attends, gathers, run, out
            assert storages() <= before


def test_limits_reach_places_that_were_made_before() -> None:
    told = Told()
    status = DeviceStatus(0, CPU, 2.0)
    runs = DeviceRuns(Heap(), told, CPU, status)
    runs.prepare(told)
    status.limit_s = 5.0
    runs.limit_waits()
    for epoch in range(1, NUM_BANKS + 1):
        runs.open(told, epoch)
        assert int(runs._places[epoch % NUM_BANKS][PLACE.index("limit_ns")]) == 5 * 10**9  # type: ignore[index]


class Side:
    """A side stream that writes down what is asked of it, between what the engine does."""

    def __init__(self, said: list[tuple[str, int]]) -> None:
        self.said = said

    @contextmanager
    def after_current(self) -> Iterator[None]:
        self.said.append(("to the side", 0))
        yield
        self.said.append(("back", 0))

    def event(self) -> int:
        return len(self.said)

    def hold_current(self, event: int) -> None:
        assert event == len(self.said)  # of all that the side stream holds by now
        self.said.append(("join", 0))


def test_puts_go_beside_and_what_reads_waits_for_them() -> None:
    told = Told()
    runs = runs_of(told)
    runs._side = Side(told.seen)  # type: ignore[assignment]
    attention, exchange = runs.open(told, 1), runs.open(told, 2)
    attention.put("put_q", torch.zeros(1))
    attention.put_fused("put_k", [torch.zeros(1)], "rope")
    exchange.put("exchange_start", torch.zeros(1))
    attention.attend(None)
    exchange.receive(torch.zeros(1))
    aside = [[("to the side", 0), put, ("back", 0)] for put in (("q", 1), ("k as rope of 1", 1), ("x", 2))]
    assert told.seen == [*chain(*aside), ("join", 0), ("attend", 1), ("join", 0), ("receive", 2)]


def test_a_capture_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replays read this heap for ever."""
    told = Told()
    runs = runs_of(told)
    runs.open(told, 1)
    assert not runs.captured
    monkeypatch.setattr("sfcompile.runtime.gpu.device_run.is_capturing", lambda device: True)
    runs.open(told, 2)
    monkeypatch.undo()
    runs.open(told, 3)
    assert runs.captured and runs.opened() == 3
