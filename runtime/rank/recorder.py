"""Records what a rank does at its communication sites: stages, attention calls, messages and waits, with their times.

Nothing is recorded unless a recorder is active (sfcompile/tracing/trace.py starts one). A site's run is then a
:class:`RecordedRun`, the ordinary run with a clock around its stages and around its wires: executor and transports know
nothing of it, and without a recorder nothing is slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from sfcompile.runtime.program.instructions import Arrival, Attend
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.engine import Engine, KernelAccess
from sfcompile.runtime.rank.executor import SiteRun
from sfcompile.runtime.rank.site_call import OwnHeap, SiteCall
from sfcompile.runtime.rank.site_tables import SiteTables
from sfcompile.runtime.wires.transport import Source, Transport

T = TypeVar("T")


class Event(NamedTuple):
    """A timed stretch of one rank's work, in seconds of this machine's monotonic clock.

    Attributes:
        lane: "stage" (a node of the graph: a put, attend, collect, an end of an exchange), or what happens inside it:
            "compute" (an attention call), "send", "network" (a message inside the machine, or to another one), "wait".
        name: the stage's name, or for people.
        peer: of a message the receiver, of a wait the sender, as ranks of the job.
        program, site, epoch: which program of the session, which of its sites, which call of any site.
    """

    rank: int
    lane: str
    name: str
    start_s: float
    stop_s: float
    nbytes: int
    peer: int | None
    program: int
    site: int
    epoch: int


class Recorder:
    """What was recorded so far, in the order in which things ended."""

    def __init__(self) -> None:
        self.events: list[Event] = []


active: Recorder | None = None
"""The recorder of this process, or None: nothing is recorded."""


class RecordedRun(SiteRun):
    """A run of a site that tells a recorder when its stages, calls, messages and waits began and ended.

    Its methods are those of :class:`SiteRun`; each is an event of the lane "stage".
    """

    def __init__(
        self,
        recorder: Recorder,
        topology: Topology,
        call: SiteCall,
        heap: OwnHeap,
        transport: Transport,
        kernel: tuple[Engine, KernelAccess] | None,
        tables: SiteTables | None = None,
    ) -> None:
        self._recorder = recorder
        self._where = (call.program, call.site, call.epoch)
        self._job_rank = call.job_rank
        rank, members = call.schedule.members(call.job_rank)
        arrivals = {arrival.slot: arrival for arrival in call.schedule.program(rank).arrivals}
        super().__init__(call, heap, _Clocked(transport, self, arrivals, members, topology), kernel, tables)

    def note(self, lane: str, name: str, start_s: float, nbytes: int = 0, peer: int | None = None) -> None:
        """Record something that began at ``start_s`` and ends now."""
        self._recorder.events.append(
            Event(self._job_rank, lane, name, start_s, time.perf_counter(), nbytes, peer, *self._where)
        )

    def put(self, phase: str, tensor: torch.Tensor, part: int = -1) -> None:
        start = time.perf_counter()
        super().put(phase, tensor, part)
        self.note("stage", phase if part == -1 else f"{phase} part {part}", start)

    def attend(self, mask: torch.Tensor | None) -> None:
        start = time.perf_counter()
        super().attend(mask)
        self.note("stage", "attend", start)

    def collect(self, out: torch.Tensor, part: int = -1) -> bool:
        start = time.perf_counter()
        done = super().collect(out, part)
        self.note("stage", "collect" if part == -1 else f"collect part {part}", start)
        return done

    def receive(self, out: torch.Tensor) -> None:
        start = time.perf_counter()
        super().receive(out)
        self.note("stage", "exchange_finish", start)

    def read(self, part: int, reader: Callable[[torch.Tensor], T]) -> tuple[T, bool]:
        start = time.perf_counter()

        def noted(weight: torch.Tensor) -> T:  # what is computed with it is no part of the stage
            self.note("stage", "exchange_finish" if part == -1 else f"exchange_finish part {part}", start)
            return reader(weight)

        return super().read(part, noted)

    def _attend(self, step: Attend, mask: torch.Tensor | None) -> None:
        start = time.perf_counter()
        super()._attend(step, mask)
        self.note("compute", str(step), start)


class _Clocked:
    """A run's transport with a clock: messages and waits are recorded by what they carry."""

    def __init__(
        self,
        wires: Transport,
        run: RecordedRun,
        arrivals: dict[int, Arrival],
        members: Sequence[int],
        topology: Topology,
    ) -> None:
        self._wires = wires
        self._run = run
        self._arrivals = arrivals
        self._members = members
        self._topology = topology

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        self._wires.open(epoch, arrivals, tag)

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        # The programs of all ranks are alike, so the slot's own arrival says what the chunk is.
        start = time.perf_counter()
        self._wires.put(dst, slot, offset, chunk, epoch, source)
        peer = self._members[dst]
        near = self._topology.same_machine(self._run._job_rank, peer)
        name = f"{self._arrivals[slot].tensor} -> rank {peer}"
        self._run.note("send" if near else "network", name, start, chunk.nbytes, peer)

    def wait(self, src: int, slot: int, epoch: int) -> None:
        start = time.perf_counter()
        self._wires.wait(src, slot, epoch)
        peer = self._members[src]
        self._run.note("wait", f"{self._arrivals[slot].tensor} from rank {peer}", start, peer=peer)

    def finish(self, epoch: int) -> None:
        self._wires.finish(epoch)

    def notice(self) -> str | None:
        return self._wires.notice()

    def abort(self, text: str) -> None:
        self._wires.abort(text)

    def close(self) -> None:
        self._wires.close()
