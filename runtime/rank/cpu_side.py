"""Sites on CPU ranks: segments of memory, transports over them, and the executor (or a kernel in the interpreter)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.rank.engine import Engine, KernelAccess
from sfcompile.runtime.rank.executor import SiteRun
from sfcompile.runtime.rank.presence import how_it_ended
from sfcompile.runtime.rank.sides import Wires, World, bank_room, run_on_host
from sfcompile.runtime.rank.site_call import SiteCall, SiteSchedule
from sfcompile.runtime.rank.site_tables import SiteTables
from sfcompile.runtime.wires.symmetric_heap import HeapSize, Segment


class CpuSide:
    """A session's CPU. Of every world there is one: a process has one heap and one set of connections."""

    carried_by = ""
    no_kernels = ""
    on_gpu = False

    def __init__(self, world: World) -> None:
        self._world = world
        self._size: HeapSize | None = None
        self._segments: Sequence[Segment | None] = ()
        self._wires: Wires | None = None
        self._access: dict[tuple[int, ...], KernelAccess] = {}
        self._tables: dict[int, SiteTables] = {}  # by the id of a schedule, which its tables keep alive

    @property
    def device(self) -> torch.device:
        """Where the tensors of all sites lie."""
        return torch.device("cpu")

    @property
    def domains(self) -> Sequence[int]:
        """Ranks of a machine may share memory; none do with transport='c10d'."""
        return self._world.topology.machine_of

    @property
    def size(self) -> HeapSize | None:
        """Of every rank's segment."""
        return self._size

    def room(self, schedules: Sequence[SiteSchedule], engines: Sequence[Engine | None]) -> HeapSize:
        """Slots and banks; nobody needs credits, who writes to a rank reads its ``done`` word."""
        return bank_room(schedules, engines)

    def make_heap(self, size: HeapSize, epoch: int) -> None:
        """Collective: new segments, and wires over them.

        Raises:
            HeapError: no room for them; the old ones stay.
        """
        if self._wires is not None:
            self._wires.transport.finish(epoch)
        self._make_heap(size, epoch)

    def _make_heap(self, size: HeapSize, epoch: int) -> None:
        with torch.inference_mode(False):  # a heap made in it could be written in it only
            segments = self._world.make_segments(size)
        own = segments[self._world.rank]
        assert own is not None
        own.done = epoch
        self._connect(segments)
        self._size = size

    def _connect(self, segments: Sequence[Segment | None]) -> None:
        wires = self._world.make_wires(segments)
        if self._wires is not None:  # not before: where the new heap or its wires cannot be made, the old ones go on
            self._wires.transport.close()
        self._access.clear()
        self._tables.clear()
        self._segments, self._wires = segments, wires

    def prepare(self, engines: Sequence[Engine | None]) -> None:
        """Engines make what they need when they are called."""

    def epochs_opened(self, counted: int) -> int:
        """The host opens every site."""
        return counted

    def begin(self, tag: int) -> None:
        """Every site is told when it is opened."""

    def end(self) -> None:
        """Every wait has looked at what came."""

    def settle(self) -> None:
        """Stores have been made when a put returns; messages may still be leaving."""
        if self._wires is not None and self._wires.messages is not None:
            self._wires.messages.settle()

    def open(self, call: SiteCall, engine: Engine | None) -> SiteRun:
        """Begin a call: the host runs it, or ``engine`` its attend phase.

        Raises:
            UnsupportedError: an engine, and heaps that its kernels cannot reach.
        """
        own = self._segments[self._world.rank]
        assert own is not None and self._wires is not None
        tables = self._tables.get(id(call.schedule))
        if tables is None:
            tables = self._tables[id(call.schedule)] = SiteTables(call.schedule, call.job_rank, own)
        kernel = None if engine is None else (engine, self._kernel_access(tables.members))
        return run_on_host(call, self._world.topology, own, self._wires.transport, kernel, tables)

    def _kernel_access(self, members: tuple[int, ...]) -> KernelAccess:
        assert self._wires is not None
        if self._wires.stores is None:
            raise UnsupportedError(
                "attention='triton' runs on CPU ranks with transport='c10d'",
                "generated kernels store straight into the heaps of other ranks",
                "use transport='auto' or 'shm', or attention='aten'",
                rank=self._world.rank,
            )
        if members not in self._access:
            self._access[members] = KernelAccess(members, self._segments, self._wires.stores)
        return self._access[members]

    def restart(self, epoch: int, life: int) -> None:
        """Collective: new connections, and segments that no failed call has written to and that carry no notice."""
        self._world.reset(life)
        if self._size is not None:
            self._make_heap(self._size, epoch)

    def rewire(self, timeout_s: float) -> None:
        """New wires over the same segments; the world gives them its longest wait."""
        if self._wires is not None:
            self._connect(self._segments)

    def notice(self) -> str | None:
        """What the segment's notice or a lost connection says."""
        return None if self._wires is None else self._wires.transport.notice()

    def explained(self, error: BaseException) -> None:
        """A CPU has no errors of its own."""

    def abort(self, notice: str) -> None:
        """Write the notice into every segment in reach, close connections to the others."""
        if self._wires is not None:
            self._wires.transport.abort(notice)

    def close(self, failed: bool) -> None:
        """Never blocks on a peer. Ranks that still wait for this one read in its segment how it ended."""
        if self._wires is not None:
            self._wires.transport.close()
            own = self._segments[self._world.rank]
            assert own is not None
            own.leave(how_it_ended())
        self._tables.clear()
        self._wires, self._segments, self._size = None, (), None
