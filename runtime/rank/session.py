"""One session per rank: the programs that were loaded, and the calls that are under way, each with its epoch.

Every call of a site gets the next epoch, the same on all ranks, for all run the same program. The heap has two banks,
so two calls may be open. ``finish(e)`` promises that this rank has read everything of all epochs up to e: the end of a
call is told when every older one has ended too.

Where sites run, on CPUs or on a GPU, is behind :class:`~sfcompile.runtime.rank.sides.Side`.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import torch

from sfcompile.errors import InternalError, StreamFusionError, UnsupportedError
from sfcompile.runtime.rank.calls import Calls, Guard, fingerprint
from sfcompile.runtime.rank.cpu_side import CpuSide
from sfcompile.runtime.rank.fit import check_end, check_fused, check_held, check_put
from sfcompile.runtime.rank.forks import Forked
from sfcompile.runtime.rank.process_group import compare
from sfcompile.runtime.rank.sides import RunningSite, Side, SiteEngine, World, lost_heap, not_loaded
from sfcompile.runtime.rank.site_call import SiteCall, SiteSchedule
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS
from sfcompile.runtime.wires.transport import notice_of, peer_failed, with_calls
from sfcompile.torch_private import keep_for_ever

T = TypeVar("T")

_COMPILE_PATIENCE = 20.0
_TELL_S = 1.0
"""So long a rank that is out of step waits for another to say which call it is in."""


class _Loaded(NamedTuple):
    """A program that this session can run, and what runs its sites (None: the executor)."""

    number: int
    schedules: list[SiteSchedule]
    engines: Sequence[SiteEngine | None]


class Session:
    """What this rank knows and holds. Calls and compiles of several threads queue (:meth:`call`, :meth:`turn`).

    Attributes:
        rank: this one's place among the ranks that compute together.
        global_rank: in the whole job.
        group: a name for files, if those are not the whole job; else empty.
    """

    def __init__(self, world: World) -> None:
        self.rank = world.rank
        self.global_rank = world.global_rank
        self.topology = world.topology
        self._world = world
        self.group = world.group
        # Any: who loads a program makes its engines for the side that the session has then (sfcompile/device.py).
        self._side: Side[Any] = CpuSide(world)
        self._programs: dict[str, _Loaded] = {}
        self._runs: dict[tuple[str, int], RunningSite] = {}
        self._opened = 0
        self._finished = 0
        self._done_early: set[int] = set()
        self._failed = False
        self._lasting: frozenset[int] = frozenset()
        self._calls = Calls()
        self.blocked_s: dict[tuple[str, int], float] = {}
        self.waited_s: dict[int, float] = {}  # of the call under way or the last one, by the rank waited for

    @property
    def heap_bytes(self) -> int:
        """Bytes of this rank's symmetric segment: constant in the number of layers and steps."""
        size = self._side.size
        return 0 if size is None else size.segment_bytes

    def agree(self, text: str, description: dict[str, str]) -> None:
        """Make sure every rank is about to compile the same thing. After a failure, this is where ranks start afresh.

        Args:
            text: all that must be equal.
            description: what to compare in words when it is not.

        Raises:
            RankMismatchError: some rank compiles another graph, other shapes or options; raised on every rank.
            RuntimeTimeoutError: some rank does not compile at all.
            UnsupportedError: some rank failed before, and this side cannot start afresh.
        """
        digest = hashlib.sha256(text.encode()).hexdigest()
        failed = self._failed or (self._side.on_gpu and self._side.notice() is not None)  # kernels fail behind the host
        everyone = self._world.exchange((digest, description, failed, self._place()), "compile a graph", afresh=True)
        if any(failed for _, _, failed, _ in everyone):
            self._restart([place for *_, place in everyone])
        compare(self.rank, [(digest, words) for digest, words, *_ in everyone])

    def _place(self) -> tuple[int, int, int]:
        """How far this rank has come: epochs opened, calls begun, lives."""
        return self._opened, self._calls.count, self._world.life

    def _restart(self, places: Sequence[tuple[int, int, int]]) -> None:
        """Collective. All ranks are here, so none is inside a call: what a failure left half done can go.

        Args:
            places: of all ranks; they go on from the furthest.
        """
        epoch, calls, life = (max(numbers) for numbers in zip(*places, strict=True))
        self._side.restart(epoch, life + 1)
        self._opened = self._finished = epoch
        self._calls.restart(calls)
        self._runs.clear()
        self._done_early.clear()
        self._failed = False

    def reconfigure(self, transport: str, timeout_s: float) -> None:
        """Take the options of a later compile in this process.

        Raises:
            OptionError: another transport.
        """
        if self._world.reconfigure(transport, timeout_s):
            self._side.rewire(timeout_s)

    def from_first(self, make: Callable[[], T]) -> T:
        """Collective: what ``make`` returns on rank 0, on every rank. If it fails there, every rank runs it and fails.

        Searches end alike on all ranks that way, and one core works where all would do the same.
        """
        first: list[T] = []
        if self.rank == 0:
            with suppress(StreamFusionError):
                first.append(make())
        shared: list[T] = self._world.exchange(first, "choose a plan", _COMPILE_PATIENCE)[0]
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

    @torch.inference_mode(False)  # what is made in it could be written in it only
    def load(
        self,
        program: str,
        schedules: Sequence[SiteSchedule],
        engines: Sequence[SiteEngine | None] | None = None,
    ) -> None:
        """Register a program; collective when the heap has to grow.

        Args:
            engines: by site, what runs its kernels, as this session's side wants it; None: the executor.

        Raises:
            HeapError: no room for the heap.
        """
        known = self._programs.get(program)
        number = len(self._programs) if known is None else known.number
        loaded = _Loaded(number, list(schedules), engines or [None] * len(schedules))
        size, need = self._side.size, self._side.room(loaded.schedules, loaded.engines)
        if schedules and (size is None or not size.holds(need)):
            if self._runs:
                raise InternalError("the heap must grow while a call is under way", "a graph left a site unfinished")
            self._catch_up()
            try:
                self._side.make_heap(need if size is None else size.grown(need), self._finished)
            finally:  # where there is no room, too: a heap like the old one may be another one
                for other in self._programs.values() if self._side.size is not None else ():
                    self._side.prepare(other.engines)
        self._programs[program] = loaded
        if schedules:
            self._side.prepare(loaded.engines)

    def forget(self, program: str) -> None:
        """Drop the program that was loaded last, if it is there; the heap keeps its size."""
        self._programs.pop(program, None)

    def trouble(self) -> str | None:
        """What the other ranks' hosts tell of a failure; any thread may ask."""
        return self._world.trouble()

    @property
    def side(self) -> Side[Any]:
        """Where sites run."""
        return self._side

    def use_side(self, side: Side[Any]) -> None:
        """Collective: from now on sites run there, on a GPU.

        Raises:
            UnsupportedError: this process has compiled for CPU ranks before.
        """
        if self._side.size is not None:
            raise UnsupportedError(
                "a model on a GPU, in a process whose ranks already run a model on CPUs",
                "a process has one heap and one set of connections",
                "run them in processes of their own",
                rank=self.rank,
            )
        self._side = side

    @property
    def programs(self) -> dict[str, list[SiteSchedule]]:
        """Every loaded program and its schedules, in the order of loading, which is the same on every rank."""
        return {program: loaded.schedules for program, loaded in self._programs.items()}

    def schedule(self, program: str, site: int) -> SiteSchedule:
        """The schedule of a loaded site."""
        return self._programs[program].schedules[site]

    # ------------------------------------------------------------------ calls of compiled graphs

    def turn(self) -> AbstractContextManager[object]:
        """For what must not happen while another thread's call is under way: a compile."""
        return self._calls.turn

    @contextmanager
    def call(
        self, name: str, inputs: Sequence[torch.Tensor], talks: bool = True, lasting: Sequence[torch.Tensor] = ()
    ) -> Iterator[None]:
        """One call of a compiled graph, from its first op to its last; if it ends early, it ends for everybody.

        After a failed call this is where ranks meet and start afresh: with new connections, from one epoch.

        Args:
            name: of what is called, the same on every rank.
            inputs: those that must be equal on all ranks, or none; see calls.fingerprint.
            talks: whether it has sites; if not, it needs no other rank, and one that has gone is no matter.
            lasting: tensors that nobody writes to before it has ended, so that puts need not copy them.

        Raises:
            RankMismatchError: (from the body) a rank is in another call, or was given other inputs.
            PeerFailedError: another rank's call failed since this rank's last one.
            RuntimeTimeoutError: not every rank came to start afresh.
            UnsupportedError: some rank failed before, and this side cannot start afresh.
        """
        with self.guard():  # it may be the first to read what a GPU that has stopped should have computed
            mark = fingerprint(inputs)
        with self._calls.under_way(name, mark):
            notice = self._side.notice() if talks and not self._failed else None
            if notice is not None:  # this rank was between calls: it learns of the failure here, as the others did
                self._failed = True
                self._side.abort(notice)  # who waits for this rank may be out of the failed one's reach
                raise self._named(peer_failed(self.rank, notice))
            if self._failed:
                self._restart(self._world.exchange(self._place(), "start afresh after a failed call", afresh=True))
            self.waited_s = {}
            with self.guard(), use_session(self), self._unchanged(lasting):
                assert self._calls.current is not None
                self._side.begin(self._calls.current.tag())
                yield
                if self._runs:
                    sites = ", ".join(f"{site} of {program}" for program, site in self._runs)
                    raise InternalError(f"a call ended and left sites open: {sites}", "every site that begins must end")
                self._side.end()

    @contextmanager
    def _unchanged(self, lasting: Sequence[torch.Tensor]) -> Iterator[None]:
        """Around a call in which nobody writes to some tensors; behind it, also where it fails, their owner may."""
        self._lasting = frozenset(tensor.data_ptr() for tensor in lasting)
        try:
            yield
        finally:
            if lasting:
                self._lasting = frozenset()
                self._side.settle()

    # ------------------------------------------------------------------ sites, from the graph

    def put(self, program: str, site: int, phase: str, tensor: torch.Tensor, part: int = -1) -> None:
        """A put phase, of one part of the tokens or (-1) of all; the first of a site opens its epoch."""
        check_put(self._loaded(program).schedules[site], self.rank, phase, tensor, part)
        self._run(program, site).put(phase, tensor, part)

    def put_fused(self, program: str, site: int, phase: str, sources: Sequence[torch.Tensor], rows: Any) -> None:
        """:meth:`put` of what a row program (codegen/rows/rows.py) makes of its sources: in the kernel that sends it,
        or before, where no kernel does."""
        check_fused(self._loaded(program).schedules[site], self.rank, phase, sources, rows)
        self._run(program, site).put_fused(phase, sources, rows)

    def attend(self, program: str, site: int, mask: torch.Tensor | None, held: Sequence[torch.Tensor] = ()) -> None:
        """The attend phase; ``held``: what the site's puts read."""
        run = self._run(program, site)
        check_held(run, self._programs[program].schedules[site], self.rank, held)
        run.attend(mask)

    def output(self, program: str, site: int) -> torch.Tensor | None:
        """The tensor that a call's collect phase completes, if there is one already: kernels wrote a part of it."""
        return self._run(program, site).output

    def collect(self, program: str, site: int, out: torch.Tensor, part: int = -1) -> None:
        """The collect phase, of one part of the tokens or (-1) of all; the last part ends the site's epoch."""
        check_end(self._loaded(program).schedules[site], self.rank, out, part)
        if self._run(program, site).collect(out, part):
            self._finish(program, site)

    def receive(self, program: str, site: int, out: torch.Tensor, held: Sequence[torch.Tensor] = ()) -> None:
        """The end of an exchange; ends the site's epoch. ``held``: what its start read."""
        check_end(self._loaded(program).schedules[site], self.rank, out)
        run = self._run(program, site)
        check_held(run, self._programs[program].schedules[site], self.rank, held)
        run.receive(out)
        self._finish(program, site)

    def read(self, program: str, site: int, part: int, reader: Callable[[torch.Tensor], T]) -> T:
        """What a reader makes of a weight that came together in the bank; the last of a site's parts ends its epoch."""
        value, ended = self._run(program, site).read(part, reader)
        self._finish(program, site) if ended else None
        return value

    def _run(self, program: str, site: int) -> RunningSite:
        run = self._runs.get((program, site))
        return self._open(program, site) if run is None else run

    def _loaded(self, program: str) -> _Loaded:
        loaded = self._programs.get(program)
        if loaded is not None and self._side.size is None:
            raise lost_heap(program, self.rank)
        if loaded is None:
            raise not_loaded(program, self.rank)
        return loaded

    def _open(self, program: str, site: int) -> RunningSite:
        loaded = self._loaded(program)
        if loaded.engines[site] is None and not self._runs:  # the host gives the call its number
            self._catch_up()
        epoch = self._opened + 1
        if epoch - NUM_BANKS > self._finished:
            raise InternalError(
                f"site {site} opens epoch {epoch} while epoch {self._finished + 1} is still being read",
                f"there are {NUM_BANKS} banks, so at most {NUM_BANKS} sites may be open",
                "report this graph: the put schedule is wrong",
                rank=self.rank,
            )
        self._opened = epoch
        tag = 0 if self._calls.current is None else self._calls.current.tag(site)
        call = SiteCall(self.rank, loaded.number, site, loaded.schedules[site], epoch, tag, self._lasting)
        run = self._runs[program, site] = self._side.open(call, loaded.engines[site])
        return run

    def _catch_up(self) -> None:
        """Go on from where replays of CUDA graphs have got to; no site is open."""
        self._opened = self._finished = self._side.epochs_opened(self._opened)

    def _finish(self, program: str, site: int) -> None:
        run = self._runs.pop((program, site))
        self.blocked_s[program, site] = self.blocked_s.get((program, site), 0.0) + run.blocked_s
        for src, waited in run.waited_s.items():
            self.waited_s[src] = self.waited_s.get(src, 0.0) + waited
        # `done` promises every epoch up to it: a site that ends before an older one waits for that one's end, and
        # tells nobody anything: on a GPU a credit names the epoch of a bank, and the older bank is still being read.
        before = self._finished
        self._done_early.add(run.epoch)
        while self._finished + 1 in self._done_early:
            self._finished += 1
            self._done_early.remove(self._finished)
        if self._finished > before:
            run.finish(self._finished)

    # ------------------------------------------------------------------ failure and end

    def guard(self) -> AbstractContextManager[None]:
        """Tell the other ranks if the body fails, so that none of them waits in vain."""
        return Guard(self.fail)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks of an error of this rank's own; raises it by another name, if it has one."""
        own = error if isinstance(error, StreamFusionError) else self._side.explained(error) or error
        everybodys = isinstance(own, StreamFusionError) and own.on_every_rank
        if not self._failed and not everybodys:  # else it was told already
            self._failed = True
            notice = notice_of(self.rank, own)
            # The notice first: it must be there when a peer finds its connection closed.
            self._world.announce(notice)
            self._side.abort(notice)
            own = self._named(own)
        if own is not error:
            raise own from error

    def _named(self, error: BaseException) -> BaseException:
        """An error of ranks out of step, with their calls by name; waits a moment for the others to say theirs."""
        call = self._calls.current
        if call is None or with_calls(error, {}) is None:
            return error
        peer = error.peer if isinstance(error, StreamFusionError) else None
        calls = {self.rank: str(call), **self._world.tell_call(str(call), peer, _TELL_S)}
        return with_calls(error, calls) or error

    def leave_to_parent(self) -> None:
        """In a process that was forked from this rank: every use of the session is an error from now on."""
        keep_for_ever(self._world, self._side, self._calls, self._runs)
        gone: Any = Forked(self.rank)
        self._world = self._side = self._calls = self._runs = gone
        self._failed = True  # there is nobody to tell

    def close(self) -> None:
        """Release heap and wires; never blocks on a peer."""
        if isinstance(self._world, Forked):
            return
        self._runs.clear()
        self._programs.clear()
        self._side.close(self._failed)
        self._world.close()


Members = tuple[int, ...]
"""A group's ranks of the whole job, in the group's order."""

_sessions: dict[Members | None, Session] = {}
"""Of this process; None: that of the whole job."""
_thread = threading.local()


def current_session() -> Session:
    """The session whose call or compile is under way on this thread; else that of the whole job; else the first made.

    Raises:
        InternalError: there is none.
    """
    session = existing_session() or next(iter(_sessions.values()), None)
    if session is None:
        raise InternalError(
            "a compiled graph runs in a process that has no session",
            "it was compiled elsewhere",
            "compile it in this process",
        )
    return session


@contextmanager
def use_session(session: Session) -> Iterator[Session]:
    """Make ``session`` this thread's session: a process may be in several groups of ranks."""
    before = getattr(_thread, "session", None)
    _thread.session = session
    try:
        yield session
    finally:
        _thread.session = before


def existing_session(members: Members | None = None) -> Session | None:
    """This thread's session, else this process's in a group of ranks (None: the whole job), if it was made."""
    mine: Session | None = getattr(_thread, "session", None)
    return _sessions.get(members) if mine is None else mine


def get_session(make_world: Callable[[], World], members: Members | None = None) -> Session:
    """This process's session in a group of ranks (None: the whole job), made on first use (collective there)."""
    if getattr(_thread, "session", None) is not None:
        return current_session()
    if _forked:
        raise _forked[0].error()
    if members not in _sessions:
        if not _sessions:
            atexit.register(close_session)
        _sessions[members] = Session(make_world())
    return _sessions[members]


def sessions() -> list[Session]:
    """Of this process: one for every group of ranks that it has computed with."""
    return list(_sessions.values())


def _after_fork() -> None:
    """In the child: what it inherited stays the parent's, and its end closes nothing."""
    for session in sessions():
        session.leave_to_parent()
        _forked.append(Forked(session.rank))
    atexit.unregister(close_session)


_forked: list[Forked] = []
"""In a process that was forked from a rank: what its sessions are there."""
os.register_at_fork(after_in_child=_after_fork)


def close_session() -> None:
    """Close the sessions of this process; the next :func:`get_session` makes another (collective)."""
    atexit.unregister(close_session)
    while _sessions:
        _sessions.popitem()[1].close()
