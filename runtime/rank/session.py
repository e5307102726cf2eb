"""One session per rank: topology, heap, transport, loaded programs, and the calls that are under way."""

from __future__ import annotations

import atexit
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar, cast

import torch

from sfcompile.errors import InternalError, StreamFusionError, UnsupportedError
from sfcompile.runtime.gpu.device_run import DeviceEngine, DeviceRun, DeviceRuns, DeviceSide
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank import recorder
from sfcompile.runtime.rank.engine import Engine, KernelAccess
from sfcompile.runtime.rank.executor import SchedulePlan, SiteRun
from sfcompile.runtime.rank.process_group import compare
from sfcompile.runtime.wires.direct import DirectTransport
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, HeapSize, Segment
from sfcompile.runtime.wires.transport import GroupTransport, Transport, notice_of

T = TypeVar("T")

_ALIGN = 4096
_COMPILE_PATIENCE = 20.0


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


class World(Protocol):
    """How ranks find each other: processes of a job, or threads of a test."""

    rank: int
    topology: Topology

    def make_segments(self, size: HeapSize, generation: int) -> Sequence[Segment | None]:
        """Collective: a new segment on every rank; those this rank can reach, by rank."""

    def make_transport(self, segments: Sequence[Segment | None]) -> Transport:
        """A transport over the segments."""

    def exchange(self, value: Any, doing: str, patience: float = 1.0) -> list[Any]:
        """Collective: every rank's value, by rank; ``doing`` says in an error what the ranks do together."""

    def reconfigure(self, transport: str, timeout_s: float) -> bool:
        """Take the options of a later compile; whether the wires must be made anew for them."""

    def announce(self, text: str) -> None:
        """Leave a failure notice where ranks of every machine find it."""

    def reset(self) -> None:
        """Collective: forget failure notices and make new connections."""

    def close(self) -> None:
        """Release what the world holds."""


class Session:
    """What this rank knows and holds. Not thread-safe: one model runs at a time on a rank."""

    def __init__(self, world: World) -> None:
        self.rank = world.rank
        self.topology = world.topology
        self._world = world
        self._programs: dict[str, list[SchedulePlan]] = {}
        self._engines: dict[str, Sequence[Engine | DeviceEngine | None]] = {}
        self._access: dict[tuple[int, ...], KernelAccess] = {}
        self._device: DeviceSide | None = None
        self._device_runs: DeviceRuns | None = None
        self._size = HeapSize(0, 0)
        self._generation = 0
        self._segments: Sequence[Segment | None] = ()
        self._transport: Transport | None = None
        self._runs: dict[tuple[str, int], SiteRun | DeviceRun] = {}
        self._opened = 0
        self._finished = 0
        self._done_early: set[int] = set()
        self._failed = False
        self.blocked_s: dict[tuple[str, int], float] = {}

    @property
    def heap_bytes(self) -> int:
        """Bytes of this rank's symmetric segment: constant in the number of layers and steps."""
        return self._size.segment_bytes if self._has_heap else 0

    def agree(self, text: str, description: dict[str, str]) -> None:
        """Make sure every rank is about to compile the same thing. After a failure, this is where ranks start afresh.

        Args:
            text: all that must be equal.
            description: what to compare in words when it is not.

        Raises:
            RankMismatchError: some rank compiles another graph, other shapes or options; raised on every rank.
            RuntimeTimeoutError: some rank does not compile at all.
        """
        digest = hashlib.sha256(text.encode()).hexdigest()
        everyone = self._world.exchange((digest, description, self._failed, self._opened), "compile a graph")
        if any(failed for _, _, failed, _ in everyone):
            if self._device is not None:
                raise UnsupportedError(
                    "a call failed before on some rank, and GPU ranks cannot start afresh",
                    "kernels that still wait for each other cannot be called back",
                    "end the job and start it again",
                    rank=self.rank,
                )
            # All ranks are here, so none is inside a call: what the failure left half done can go.
            self._opened = self._finished = max(opened for _, _, _, opened in everyone)
            self._runs.clear()
            self._done_early.clear()
            self._failed = False
            self._world.reset()
            if self._segments:
                self._make_heap()
        compare(self.rank, [(digest, words) for digest, words, _, _ in everyone])

    def reconfigure(self, transport: str, timeout_s: float) -> None:
        """Take the options of a later compile in this process.

        Raises:
            OptionError: another transport.
        """
        if self._world.reconfigure(transport, timeout_s) and self._segments:
            assert self._transport is not None
            self._transport.close()
            self._transport = self._world.make_transport(self._segments)

    def from_first(self, make: Callable[[], T]) -> T:
        """Collective: what ``make`` returns on rank 0, on every rank. If it fails there, every rank runs it and fails.

        Searches end alike on all ranks that way, and one core works where all would do the same.
        """
        made: list[T] = []
        if self.rank == 0:
            with suppress(StreamFusionError):
                made.append(make())
        shared: list[T] = self._world.exchange(made, "choose a plan", _COMPILE_PATIENCE)[0]
        if shared:
            return shared[0]
        try:
            return make()
        except StreamFusionError as error:
            error.on_every_rank = True
            raise

    def exchange(self, value: Any, doing: str) -> list[Any]:
        """Collective: every rank's value, by rank; ``doing`` says in an error what the ranks do together."""
        return self._world.exchange(value, doing, _COMPILE_PATIENCE)

    def meet(self) -> None:
        """Collective: wait until every rank has compiled, however unevenly long that takes.

        Without it the first wait of the fastest rank would count the slowest rank's compilation against ``timeout_s``.
        """
        self._world.exchange(None, "run the compiled graph", _COMPILE_PATIENCE)

    def load(
        self,
        program: str,
        schedules: Sequence[SchedulePlan],
        engines: Sequence[Engine | DeviceEngine | None] | None = None,
    ) -> None:
        """Register a program; collective when the heap has to grow.

        Args:
            engines: by site, what runs its attend phase; None: the executor.

        Raises:
            HeapError: no room for the heap.
        """
        self._programs[program] = list(schedules)
        self._engines[program] = engines or [None] * len(schedules)
        sizes = [schedule.heap_bytes for schedule in schedules]
        sizes += [engine.bank_bytes for engine in self._engines[program] if engine is not None]
        if self._device is not None:  # puts by NVSHMEM's host calls are packed in the other half of a bank
            pairs = zip(schedules, self._engines[program], strict=True)
            sizes += [2 * _aligned(schedule.heap_bytes) for schedule, engine in pairs if engine is None]
        bank_bytes = max(sizes, default=0)
        credits = self.topology.num_ranks if self._device is not None else 0
        slots = max((len(schedule.slots) for schedule in schedules), default=0)
        need = HeapSize(slots, _aligned(bank_bytes), credits)
        if schedules and not (self._has_heap and self._size.holds(need)):
            if self._runs:
                raise InternalError("the heap must grow while a call is under way", "a graph left a site unfinished")
            self._size = self._size.grown(need)
            if self._transport is not None and self._device is None:
                self._transport.finish(self._finished)
            self._make_heap()

    @property
    def _has_heap(self) -> bool:
        return bool(self._segments) or self._device_runs is not None

    def use_device(self, side: DeviceSide) -> None:
        """Collective: from now on sites run on a GPU.

        Raises:
            UnsupportedError: this process has compiled for CPU ranks before.
        """
        if self._segments:
            raise UnsupportedError(
                "a model on a GPU, in a process whose ranks already run a model on CPUs",
                "a process has one heap and one set of connections",
                "run them in processes of their own",
                rank=self.rank,
            )
        self._device = side

    @property
    def device_side(self) -> DeviceSide | None:
        """The GPU that sites run on, or None: on CPUs."""
        return self._device

    def _make_heap(self) -> None:
        """Collective: a new generation of segments, and a transport over them."""
        if self._device is not None:
            self._device_runs, self._transport = self._device.make_runs(self._size, self._opened)
            return
        if self._transport is not None:
            self._transport.close()
        self._generation += 1
        with torch.inference_mode(False):  # a heap made in it could be written in it only
            self._segments = self._world.make_segments(self._size, self._generation)
        own = self._segments[self.rank]
        assert own is not None
        own.done = self._finished
        self._access.clear()
        self._transport = self._world.make_transport(self._segments)

    @property
    def programs(self) -> dict[str, list[SchedulePlan]]:
        """Every loaded program and its schedules, in the order of loading, which is the same on every rank."""
        return dict(self._programs)

    def schedule(self, program: str, site: int) -> SchedulePlan:
        """The schedule of a loaded site."""
        return self._programs[program][site]

    # ------------------------------------------------------------------ calls from the graph

    def put(self, program: str, site: int, phase: str, tensor: torch.Tensor, part: int = -1) -> None:
        """A put phase, of one part of the tokens or (-1) of all; the first of a site opens its epoch."""
        self._run(program, site).put(phase, tensor, part)

    def put_fused(self, program: str, site: int, phase: str, sources: Sequence[torch.Tensor], rows: Any) -> None:
        """:meth:`put` of what a row program (codegen/rows/rows.py) makes of its sources: in the kernel that sends it,
        or before, where no kernel does."""
        run = self._run(program, site)
        if isinstance(run, DeviceRun):
            run.put_fused(phase, sources, rows)
        else:
            run.put(phase, rows.compute(*sources))

    def attend(self, program: str, site: int, mask: torch.Tensor | None) -> None:
        """The attend phase."""
        self._run(program, site).attend(mask)

    def output(self, program: str, site: int) -> torch.Tensor | None:
        """The tensor that a call's collect phase completes, if there is one already: kernels wrote a part of it."""
        return getattr(self._run(program, site), "output", None)

    def collect(self, program: str, site: int, out: torch.Tensor, part: int = -1) -> None:
        """The collect phase, of one part of the tokens or (-1) of all; the last part ends the site's epoch."""
        if self._run(program, site).collect(out, part):
            self._finish(program, site)

    def gather(self, program: str, site: int, out: torch.Tensor) -> None:
        """The end of an all-gather; ends the site's epoch."""
        self._run(program, site).gather(out)
        self._finish(program, site)

    def _run(self, program: str, site: int) -> SiteRun | DeviceRun:
        run = self._runs.get((program, site))
        if run is not None:
            return run
        plans = self._programs.get(program)
        if plans is None or not (self._transport is not None or self._device_runs is not None):
            raise InternalError(
                f"program {program} is not loaded on rank {self.rank}",
                "a compiled graph outlived the session that compiled it",
                "compile the model again in this process",
            )
        epoch = self._opened + 1
        if epoch - NUM_BANKS > self._finished:
            raise InternalError(
                f"site {site} opens epoch {epoch} while epoch {self._finished + 1} is still being read",
                f"there are {NUM_BANKS} banks, so at most {NUM_BANKS} sites may be open",
                "report this graph: the put schedule is wrong",
                rank=self.rank,
            )
        self._opened = epoch
        engine = self._engines[program][site]
        if self._device_runs is not None and engine is not None:
            device_run = self._device_runs.open(cast(DeviceEngine, engine), epoch)
            self._runs[program, site] = device_run
            return device_run
        own = self._segments[self.rank] if self._device_runs is None else self._device_runs.host_bank(epoch)
        assert own is not None and self._transport is not None
        plan = plans[site]
        rank, members = plan.members(self.rank)
        everyone = members == tuple(range(len(members))) and len(members) == self.topology.num_ranks
        wires: Transport = self._transport if everyone else GroupTransport(self._transport, members)
        kernel = None if engine is None else (cast(Engine, engine), self._kernel_access(members))
        make: Callable[..., SiteRun] = SiteRun
        if recorder.active is not None:
            make = recorder.active.run_of(self.rank, self.topology, list(self._programs).index(program), site)
        run = make(plan, rank, epoch, epoch % NUM_BANKS, own, wires, kernel)
        self._runs[program, site] = run
        return run

    def _kernel_access(self, members: tuple[int, ...]) -> KernelAccess:
        if members not in self._access:
            direct = getattr(self._transport, "direct", self._transport)
            if not isinstance(direct, DirectTransport):
                raise UnsupportedError(
                    "attention='triton' runs on CPU ranks with transport='c10d'",
                    "generated kernels store straight into the heaps of other ranks",
                    "use transport='auto' or 'shm', or attention='aten'",
                    rank=self.rank,
                )
            self._access[members] = KernelAccess(members, self._segments, direct)
        return self._access[members]

    def _finish(self, program: str, site: int) -> None:
        run = self._runs.pop((program, site))
        self.blocked_s[program, site] = self.blocked_s.get((program, site), 0.0) + run.blocked_s
        # `done` promises every epoch up to it: a site that ends before an older one waits for that one's end.
        self._done_early.add(run.epoch)
        while self._finished + 1 in self._done_early:
            self._finished += 1
            self._done_early.remove(self._finished)
        if self._device_runs is not None and isinstance(run, DeviceRun):
            self._device_runs.finish(self._finished)
            return
        assert self._transport is not None
        self._transport.finish(self._finished)

    # ------------------------------------------------------------------ failure and end

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Tell the other ranks if the body fails, so that none of them waits in vain."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, StreamFusionError) and error.on_every_rank:
                raise
            self._failed = True
            notice = notice_of(self.rank, error)
            # The notice first: it must be there when a peer finds its connection closed.
            self._world.announce(notice)
            if self._transport is not None:
                self._transport.abort(notice)
            raise

    def close(self) -> None:
        """Release heap and wires; never blocks on a peer."""
        if self._transport is not None:
            self._transport.close()
        self._transport = None
        self._segments = ()
        self._runs.clear()
        self._programs.clear()
        self._device_runs = None
        if self._device is not None:
            self._device.close(failed=self._failed)
        self._world.close()


_process_session: Session | None = None
_thread = threading.local()


def current_session() -> Session:
    """The session of this thread (tests), or of this process.

    Raises:
        InternalError: there is none.
    """
    session = existing_session()
    if session is None:
        raise InternalError(
            "a compiled graph runs in a process that has no session",
            "it was compiled elsewhere",
            "compile it in this process",
        )
    return session


@contextmanager
def use_session(session: Session) -> Iterator[Session]:
    """Make ``session`` this thread's session."""
    before = getattr(_thread, "session", None)
    _thread.session = session
    try:
        yield session
    finally:
        _thread.session = before


def existing_session() -> Session | None:
    """The session of this thread or process, if one was made."""
    return getattr(_thread, "session", None) or _process_session


def get_session(make_world: Callable[[], World]) -> Session:
    """The session of this process, made on first use (collective)."""
    global _process_session
    if getattr(_thread, "session", None) is not None:
        return current_session()
    if _process_session is None:
        _process_session = Session(make_world())
        atexit.register(close_session)
    return _process_session


def close_session() -> None:
    """Close the session of this process, if there is one; the next :func:`get_session` makes another (collective)."""
    global _process_session
    if _process_session is not None:
        session, _process_session = _process_session, None
        session.close()
