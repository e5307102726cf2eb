"""What a session stands on: how its ranks meet (a world), and where its sites run (a side: CPUs, or a GPU).

The session counts epochs and knows which calls are open; a side owns the heap and makes the runs of single calls. Both
sides are behind these protocols: cpu_side.py, and runtime/gpu/device_side.py for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from sfcompile.errors import HeapError, InternalError, StreamFusionError
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank import recorder
from sfcompile.runtime.rank.engine import Engine, KernelAccess
from sfcompile.runtime.rank.executor import SiteRun
from sfcompile.runtime.rank.site_call import OwnHeap, SiteCall, SiteSchedule
from sfcompile.runtime.rank.site_tables import SiteTables
from sfcompile.runtime.wires.direct import DirectTransport
from sfcompile.runtime.wires.symmetric_heap import HeapSize, Segment
from sfcompile.runtime.wires.transport import GroupTransport, MessageTransport, Transport

_ALIGN = 4096
T = TypeVar("T")


class Wires(NamedTuple):
    """What carries chunks on CPUs.

    Attributes:
        transport: reaches every rank.
        stores: the part of it that stores into other ranks' heaps, as kernels do; None: messages only.
        messages: the part of it that sends messages; None: stores only.
    """

    transport: Transport
    stores: DirectTransport | None
    messages: MessageTransport | None = None


class World(Protocol):
    """How ranks find each other: processes of a job, or threads of a test.

    Attributes:
        rank: this one's place among the ranks that compute together.
        global_rank: in the whole job.
        group: a name for files, if those are not the whole job; else empty.
    """

    rank: int
    global_rank: int
    topology: Topology
    group: str

    def make_segments(self, size: HeapSize) -> Sequence[Segment | None]:
        """Collective: a new segment on every rank; those this rank can reach, by rank."""

    def make_wires(self, segments: Sequence[Segment | None]) -> Wires:
        """What carries chunks between the segments."""

    def exchange(self, value: Any, doing: str, patience: float = 1.0, afresh: bool = False) -> list[Any]:
        """Collective: every rank's value, by rank; ``doing`` says in an error what the ranks do together. Where they
        start ``afresh`` after a failure, its notice does not keep them from meeting."""

    def reconfigure(self, transport: str, timeout_s: float) -> bool:
        """Take the options of a later compile; whether the wires must be made anew for them."""

    def trouble(self) -> str | None:
        """What other ranks' hosts tell of a failure: a notice, or that a process has ended. Any thread may ask."""

    def announce(self, text: str) -> None:
        """Leave a failure notice where ranks of every machine find it."""

    def tell_call(self, text: str, peer: int | None, limit_s: float) -> dict[int, str]:
        """After a failure: leave the name of this rank's call and read those of others, until ``peer`` (None: any) has
        left its own, for ``limit_s`` at most."""

    @property
    def life(self) -> int:
        """How often this rank has started afresh."""

    def reset(self, life: int) -> None:
        """Collective: begin a new life, which all ranks agreed on: without failure notices, with new connections."""

    def close(self) -> None:
        """Release what the world holds."""


class SiteEngine(Protocol):
    """What runs phases of a site as kernels. The rest of it is between the side and who made the engine for it."""

    @property
    def bank_bytes(self) -> int:
        """Bytes of a bank: the schedule's slots and what the kernels keep beside them."""


EngineT = TypeVar("EngineT", bound=SiteEngine, contravariant=True)


class RunningSite(Protocol):
    """One call of one site, phase by phase.

    Attributes:
        epoch: of the call.
        blocked_s: seconds that the host has spent waiting for peers; ``waited_s`` by rank of the job.
        output: the tensor that :meth:`collect` completes, if there is one already: kernels wrote a part of it.
        late_reads: addresses of tensors that puts may still read although they have returned, until :meth:`attend` or
            :meth:`receive`.
    """

    epoch: int
    blocked_s: float
    waited_s: dict[int, float]
    output: torch.Tensor | None
    late_reads: Collection[int]

    def put(self, phase: str, tensor: torch.Tensor, part: int = -1) -> None:
        """A put phase, of one part of the tokens or (-1) of all."""

    def put_fused(self, phase: str, sources: Sequence[torch.Tensor], rows: Any) -> None:
        """:meth:`put` of what a row program (codegen/rows/rows.py) makes of its sources."""

    def attend(self, mask: torch.Tensor | None) -> None:
        """The attend phase, after the puts of q, k and v; what it makes is collected."""

    def collect(self, out: torch.Tensor, part: int = -1) -> bool:
        """The collect phase, of one part of the tokens or (-1) of all; whether everything has been collected."""

    def receive(self, out: torch.Tensor) -> None:
        """The end of an exchange."""

    def read(self, part: int, reader: Callable[[torch.Tensor], T]) -> tuple[T, bool]:
        """What a reader makes of a weight that came together in the bank of a CPU rank; whether all have been read."""

    def finish(self, epoch: int) -> None:
        """Tell all ranks that this one has read everything of ``epoch`` and of all epochs before."""


class Side(Protocol[EngineT]):
    """Where a rank's sites run: its heap, and calls on it. At most two calls are open at a time.

    Epochs are given to a side because it may have to write them into a new heap: nothing of them lies there any more.

    Attributes:
        carried_by: what carries chunks between GPU ranks, and why, for reports; "" on CPUs.
        no_kernels: why generated kernels cannot put from there; "" if they can.
        on_gpu: whether it is a GPU's; the host does not take part in what is sent there.
    """

    carried_by: str
    no_kernels: str
    on_gpu: bool

    @property
    def device(self) -> torch.device:
        """Where the tensors of sites lie."""

    @property
    def domains(self) -> Sequence[int]:
        """By rank of the job: only ranks of equal number may reach each other's memory by load and store."""

    @property
    def size(self) -> HeapSize | None:
        """Of the heap; None: there is none yet, or no longer."""

    def room(self, schedules: Sequence[SiteSchedule], engines: Sequence[EngineT | None]) -> HeapSize:
        """The heap that a program needs; ``engines`` by site, None: the executor runs it."""

    def make_heap(self, size: HeapSize, epoch: int) -> None:
        """Collective: a heap in place of the old one; all calls up to ``epoch`` have ended and no other is open."""

    def prepare(self, engines: Sequence[EngineT | None]) -> None:
        """Make what calls of a program's sites need beside the heap: after it was loaded, and in every new heap."""

    def epochs_opened(self, counted: int) -> int:
        """How many epochs were opened, of which the host has ``counted`` some: it takes no part in a replay of what it
        has captured. No site is open."""

    def begin(self, tag: int) -> None:
        """A call of a program begins, whose sites will be opened; ``tag`` (calls.py) tells it from others."""

    def end(self) -> None:
        """It has ended: all its sites have.

        Raises:
            RankMismatchError: a chunk of another call came, and nobody looked at it before.
        """

    def settle(self) -> None:
        """A call has ended, well or not: the memory that it did not write to may change from now on."""

    def open(self, call: SiteCall, engine: EngineT | None) -> RunningSite:
        """Begin a call of a site."""

    def restart(self, epoch: int, life: int) -> None:
        """Collective: after a failure drop all calls, which had epochs up to ``epoch``, and connect anew.

        Args:
            life: of the world, see :meth:`World.reset`.

        Raises:
            UnsupportedError: this side cannot.
        """

    def rewire(self, timeout_s: float) -> None:
        """The world's options have changed, its longest wait too: make anew what depends on them."""

    def notice(self) -> str | None:
        """What is known here of another rank's failure, without asking anyone; None: nothing."""

    def explained(self, error: BaseException) -> StreamFusionError | None:
        """The error of ours behind one of the device's own, which says no more than that it has stopped; None: there is
        none."""

    def abort(self, notice: str) -> None:
        """This rank failed: wake whoever waits for it."""

    def close(self, failed: bool) -> None:
        """Release heap and wires; nothing collective if something ``failed``."""


def lost_heap(program: str, rank: int) -> HeapError:
    """The error of a loaded program whose side has no heap any more."""
    return HeapError(
        f"the model of program {program} has lost its heap on rank {rank}",
        "a later one needed a larger heap, for which there was no room, and this one's could not be had again",
        "start the job again, with less to hold beside it",
    )


def not_loaded(program: str, rank: int) -> InternalError:
    """The error of a program that this process's session does not know."""
    return InternalError(
        f"program {program} is not loaded on rank {rank}",
        "a compiled graph outlived the session that compiled it",
        "compile the model again in this process",
    )


def aligned(nbytes: int) -> int:
    """Up to whole pages."""
    return -(-nbytes // _ALIGN) * _ALIGN


def bank_room(schedules: Sequence[SiteSchedule], engines: Sequence[SiteEngine | None]) -> HeapSize:
    """What every side needs for a program: slots for each site, bytes for its chunks and for what its kernels keep."""
    slots = max((len(schedule.slots) for schedule in schedules), default=0)
    sizes = [schedule.heap_bytes for schedule in schedules]
    sizes += [engine.bank_bytes for engine in engines if engine is not None]
    return HeapSize(slots, aligned(max(sizes, default=0)))


def run_on_host(
    call: SiteCall,
    topology: Topology,
    heap: OwnHeap,
    transport: Transport,
    kernel: tuple[Engine, KernelAccess] | None = None,
    tables: SiteTables | None = None,
) -> SiteRun:
    """A call whose steps the host takes one by one; it is recorded if a recorder is active.

    Args:
        heap: this rank's own segment.
        transport: of the job.
        kernel: runs the attend phase, and what it sees of the heaps.
        tables: of the call's schedule in this heap, if its calls share them.
    """
    _, members = call.schedule.members(call.job_rank)
    everyone = len(members) == topology.num_ranks and members == tuple(range(topology.num_ranks))
    wires = transport if everyone else GroupTransport(transport, members)
    if recorder.active is not None:
        return recorder.RecordedRun(recorder.active, topology, call, heap, wires, kernel, tables)
    return SiteRun(call, heap, wires, kernel, tables)
