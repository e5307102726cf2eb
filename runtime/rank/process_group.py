"""Processes: the ranks of a torch.distributed job, or a group of them, and what they share.

Python values and failure notices travel through the job's key-value store, not through a collective: a rank that is
missing can then be named, and one that fails can tell ranks of any machine. job_store.py asks the store, meetings.py
is how ranks agree, presence.py knows who is still there.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from sfcompile.errors import (
    OptionError,
    PeerDiedError,
    RankMismatchError,
    RuntimeTimeoutError,
    TopologyError,
    UnsupportedError,
)
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.bounded import within
from sfcompile.runtime.rank.job_store import JobStore, StoreLostError
from sfcompile.runtime.rank.meetings import Meetings, ranks_in_words
from sfcompile.runtime.rank.presence import Presence, how_it_ended
from sfcompile.runtime.rank.sides import Wires
from sfcompile.runtime.wires.c10d import C10dTransport
from sfcompile.runtime.wires.direct import DirectTransport, require_x86
from sfcompile.runtime.wires.shared_segments import share
from sfcompile.runtime.wires.symmetric_heap import HeapSize, Segment, local_segment
from sfcompile.runtime.wires.tcp import TcpTransport
from sfcompile.runtime.wires.tcp_links import connect
from sfcompile.runtime.wires.transport import MessageTransport, RoutedTransport
from sfcompile.torch_private import default_store

_log = logging.getLogger("sfcompile")
_SHORT_S = 2.0
"""Limit of what an error, or the end of the process, waits for."""
_TOLD = 4
"""Calls of so many other ranks are named when ranks are out of step."""

_NEIGHBOURS = 8
"""Each rank looks after so many others while its kernels run."""

_NAMED = 8
"""So many ranks of a group are named one by one."""

_worlds: dict[tuple[int, ...], int] = {}
"""By global ranks, how many worlds of theirs this process has been in: tells a second one's keys from the first's."""


def group_name(members: Sequence[int]) -> str:
    """A name for files of a group of ranks, and for its keys in the store: "ranks-0-1", of many a digest."""
    if len(members) <= _NAMED:
        return f"ranks-{'-'.join(map(str, members))}"
    digest = hashlib.sha256(repr(tuple(members)).encode()).hexdigest()[:12]
    return f"ranks-{members[0]}-and-{len(members) - 1}-more-{digest}"


def ensure_process_group(timeout_s: float) -> bool:
    """Create the default process group from torchrun's environment if there is none.

    Returns:
        Whether it was created here (then it is ours to destroy).

    Raises:
        RuntimeTimeoutError: not every rank of the job came within ``timeout_s``.
        UnsupportedError: the environment describes no job.
    """
    if dist.is_initialized():
        return False
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    rank = os.environ.get("RANK", "?")
    limit = datetime.timedelta(seconds=timeout_s)
    try:  # torch keeps the limit in each of several steps
        within(timeout_s + 1.0, lambda: dist.init_process_group(backend, timeout=limit))
    except ValueError as error:
        raise UnsupportedError(
            f"no job can be joined: {str(error).splitlines()[0]}",
            "ranks find each other through torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)",
            "start the ranks with torchrun, or call torch.distributed.init_process_group first",
        ) from error
    except (RuntimeError, TimeoutError) as error:
        raise RuntimeTimeoutError(
            f"rank {rank} could not join the job of {os.environ.get('WORLD_SIZE', '?')} ranks at "
            f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')} within {timeout_s:g} s "
            f"({str(error).splitlines()[0]})",
            "every rank must start within timeout_s of the others and reach that address",
            "look at the logs of the other ranks; raise options={'timeout_s': ...} if they only start late",
        ) from error
    return True


def machine_identity() -> str:
    """What tells this machine from others: torchrun's GROUP_RANK, never the hostname.

    Containers and emulated machines share hostnames and even /dev/shm. Without torchrun: the kernel's boot id and the
    network namespace.
    """
    group_rank = os.environ.get("GROUP_RANK")
    if group_rank is not None:
        return f"torchrun node {group_rank}"
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot:
            return f"{boot.read().strip()} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()


class ProcessWorld:
    """Ranks are processes of a torch.distributed job: all of them, or a group; ``rank`` is this one's place there.

    Args:
        transport: "auto" (stores inside a machine, messages between), "shm" (one machine only) or "c10d".
        timeout_s: longest wait on a peer.
        members: the group's ranks of the whole job, this one among them, in the group's order; None: all.

    Attributes:
        global_rank: in the whole job.
        group: a name for files; empty for the whole job.
        life: how often this rank has started afresh; failure notices belong to a life.

    Raises:
        UnsupportedError: transport "shm" with several machines.
        RuntimeTimeoutError, PeerDiedError: not every rank came.
    """

    def __init__(self, transport: str, timeout_s: float, members: tuple[int, ...] | None = None) -> None:
        self._own_group = ensure_process_group(timeout_s)
        self._members = members if members is not None else tuple(range(dist.get_world_size()))
        self.rank = self._members.index(dist.get_rank())
        self.global_rank = dist.get_rank()
        self.group = "" if members is None else group_name(members)
        self._timeout_s = timeout_s
        self.life = 0
        self._announced = False
        self._group: dist.ProcessGroup | None = None
        self._messages: MessageTransport | None = None
        number = _worlds.get(self._members, 0)
        name = f"sfcompile/{self.group or 'job'}/{number}"
        self._kept, own = default_store(name)
        self._store = JobStore(own, name)
        try:
            facts = self._meet_first()
        except BaseException:
            self._store.close()  # the heart of a world that never was
            raise
        _worlds[self._members] = number + 1
        self._store.bind([nonce for *_, nonce in facts])
        identities = [machine for machine, *_ in facts]
        numbers = {machine: i for i, machine in enumerate(dict.fromkeys(identities))}
        self.topology = Topology(tuple(numbers[machine] for machine in identities))
        self._pids = [pid for _, pid, _ in facts]
        self._settled = False
        self._use(transport)

    def _meet_first(self) -> list[tuple[str, int, str]]:
        """Collective: every rank's machine, process id and nonce."""
        try:
            self._presence = Presence(self._store, self.rank, self._timeout_s)
        except StoreLostError as error:
            raise PeerDiedError(
                f"rank {self.rank} cannot reach the job's store: {error}",
                "rank 0, or the launcher, keeps the store and has ended, was stopped, or is cut off",
                "look at the log of rank 0, and at the network between the machines",
                rank=self.rank,
            ) from error
        self._meetings = Meetings(
            self._store, self.rank, len(self._members), self._presence, self._timeout_s, self.notice
        )
        return self.exchange((machine_identity(), os.getpid(), secrets.token_hex(16)), "start a session")

    def _connected(self) -> MessageTransport:
        """Collective, at first: the wires to ranks of other machines, one set for all heaps."""
        if self._messages is None:
            problem = "asked for" if self._messages_only else None
            if problem is None:
                peers = [r for r in range(len(self._members)) if not self.topology.same_machine(r, self.rank)]
                links = connect(self.rank, peers, self.exchange, self._timeout_s)
                if isinstance(links, str):
                    problem = links
                    if self.rank == 0:
                        _log.warning("gloo carries the messages between machines, slower: %s", problem)
                else:
                    self._messages = TcpTransport(self.rank, links, self._timeout_s, self.notice)
            if problem is not None:
                self._group = self._group or self._new_group()
                self._messages = C10dTransport(self.rank, self._group, self._timeout_s, self.notice)
        assert self._messages is not None
        return self._messages

    def _new_group(self) -> dist.ProcessGroup:
        limit = datetime.timedelta(seconds=self._timeout_s)

        def make() -> Any:
            return dist.new_group(list(self._members), backend="gloo", timeout=limit, use_local_synchronization=True)

        try:
            group = within(self._timeout_s + 1.0, make)
        except (RuntimeError, TimeoutError) as error:
            raise RuntimeTimeoutError(
                f"rank {self.rank} could not make a gloo group of {len(self._members)} ranks within "
                f"{self._timeout_s:g} s ({str(error).splitlines()[0]})",
                "gloo carries the messages between ranks that share no memory",
                "look at the logs of the other ranks and at the network between them (GLOO_SOCKET_IFNAME)",
                rank=self.rank,
            ) from error
        assert isinstance(group, dist.ProcessGroup)  # this rank is in it
        return group

    # ------------------------------------------------------------------ control

    def reconfigure(self, transport: str, timeout_s: float) -> bool:
        """Take the options of a compile; whether the wires must be made anew for them.

        The first that is not refused settles the transport: a world may have been made by one that was.

        Raises:
            OptionError: another transport than the one this process runs on.
        """
        if transport != self._transport and self._settled:
            raise OptionError(
                f"transport={transport!r}, but this process already runs on transport={self._transport!r}",
                "all graphs of a process share one heap and one set of connections",
                "use the same transport for every model of a process",
            )
        self._use(transport)
        self._settled = True
        changed = timeout_s != self._timeout_s
        self._timeout_s = self._meetings.timeout_s = self._presence.timeout_s = timeout_s
        if self._messages is not None:
            self._messages.timeout_s = timeout_s
        return changed

    def _use(self, transport: str) -> None:
        """What carries chunks from now on; nothing has been made for another transport."""
        if transport == "shm" and self.topology.num_machines > 1:
            raise UnsupportedError(
                f"transport='shm' with {self.topology.num_machines} machines",
                "ranks of different machines share no memory",
                "use transport='auto' (shared memory inside a machine, TCP between) or 'c10d'",
                rank=self.rank,
            )
        self._transport, self._messages_only = transport, transport == "c10d"

    def exchange(self, value: Any, doing: str, patience: float = 1.0, afresh: bool = False) -> list[Any]:
        """All-gather: every rank's value, by rank. See :meth:`Meetings.exchange`."""
        return self._meetings.exchange(value, doing, patience, afresh)

    def announce(self, text: str) -> None:
        """Leave a failure notice for all ranks; the first one stays. Never waits long: the error comes first."""
        with contextlib.suppress(StoreLostError):  # then nobody is left to tell, or cannot be told
            self._store.first(f"failed/{self.life}", text, _SHORT_S)
            self._store.add(f"told/{self.life}", 1, _SHORT_S)
            self._announced = True

    def tell_call(self, text: str, peer: int | None, limit_s: float) -> dict[int, str]:
        """See :class:`~sfcompile.runtime.rank.sides.World`; a store that is lost tells nothing."""
        others = [rank for rank in range(self.topology.num_ranks) if rank != self.rank]
        end, known = time.monotonic() + limit_s, dict[int, str]()
        with contextlib.suppress(StoreLostError):
            self._store.set(f"call/{self.life}/{self.rank}", text, _SHORT_S)
            while not known or (peer is not None and peer not in known):
                there = self._store.present([f"call/{self.life}/{rank}" for rank in others], _SHORT_S)
                for rank in [rank for rank, is_there in zip(others, there, strict=True) if is_there][:_TOLD]:
                    known[rank] = self._store.get(f"call/{self.life}/{rank}", _SHORT_S) or ""
                if time.monotonic() > end:
                    break
                time.sleep(0.02)
        return known

    def notice(self) -> str | None:
        """The first failure notice, if any."""
        try:
            return self._store.get(f"failed/{self.life}", _SHORT_S)
        except StoreLostError:
            return None

    def trouble(self) -> str | None:
        """A notice, or the first of the ranks after this one that has gone; a store that is lost tells nothing."""
        count = len(self._members)
        neighbours = [(self.rank + i) % count for i in range(1, min(count, 1 + _NEIGHBOURS))]
        try:
            notice = self._store.get(f"failed/{self.life}", _SHORT_S)
            # Not by silence: a rank may rest between calls. Whoever waits for one that was cut off has a limit.
            gone = self._presence.gone(neighbours, _SHORT_S, silence=False) if notice is None else None
        except StoreLostError:
            return None
        if gone is not None:
            notice = f"rank {gone[0]}: {gone[1]}"
            self.announce(notice)  # others may not look at that rank
        return notice

    def reset(self, life: int) -> None:
        """Collective: a new life knows no failure notices, and has new connections in place of those that were closed.

        Args:
            life: its number, greater than that of any rank so far.
        """
        self.life = life
        self._announced = False
        if self._messages is not None:
            self._messages.disconnect()
        self._messages = self._group = None

    # ------------------------------------------------------------------ heap and wires

    def make_segments(self, size: HeapSize) -> Sequence[Segment | None]:
        """Shared segments of this machine's ranks; all ranks fail together if one cannot."""
        ranks = range(self.topology.num_ranks)
        if self._messages_only:
            return [local_segment(size) if rank == self.rank else None for rank in ranks]
        require_x86()
        neighbours = [rank for rank in ranks if rank != self.rank and self.topology.same_machine(rank, self.rank)]
        segments = share(self.rank, neighbours, size, self.exchange)
        return [segments.get(rank) for rank in ranks]

    def make_wires(self, segments: Sequence[Segment | None]) -> Wires:
        """Stores where memory is shared, messages elsewhere."""
        direct = [segment is not None and not self._messages_only for segment in segments]
        stores = None
        if any(direct):
            stores = DirectTransport(self.rank, segments, self._timeout_s, self._pids)
        messages = None if all(direct) else self._connected()
        return Wires(RoutedTransport(stores, messages, direct), stores, messages)

    def close(self) -> None:
        """Close the wires, and the default group if it was made here; say to the others that this rank ends."""
        if self._messages is not None:
            self._messages.disconnect(how_it_ended())
        self._messages = None
        with contextlib.suppress(StoreLostError):
            self._presence.leave(_SHORT_S)
            if self._own_group and self._announced and self.rank == 0:
                self._meetings.linger(f"told/{self.life}")
        self._store.close()
        if self._own_group and dist.is_initialized():
            dist.destroy_process_group()


def compare(rank: int, everyone: Sequence[tuple[str, dict[str, str]]]) -> None:
    """Raise on every rank unless all ``(digest, description)`` agree.

    Raises:
        RankMismatchError: says which ranks differ from rank 0, and in what.
    """
    digest, reference = everyone[0]
    odd = [other for other, (theirs, _) in enumerate(everyone) if theirs != digest]
    if not odd:
        return
    differences = []
    for other in odd[:4]:
        theirs = everyone[other][1]
        keys = [key for key in dict.fromkeys([*reference, *theirs]) if reference.get(key) != theirs.get(key)]
        keys = ["outcome"] if "outcome" in keys else keys  # the options of who refused are not those that it was given
        for key in keys[:3]:
            mine, its = reference.get(key, "nothing"), theirs.get(key, "nothing")
            differences.append(f"{key} is {mine} on rank 0 and {its} on rank {other}")
        if not keys:
            differences.append(f"rank {other} traced other code than rank 0, or has other constants, for equal shapes")
    error = RankMismatchError(
        f"{ranks_in_words(odd)} would compile something else than rank 0: {'; '.join(differences)}",
        "the ranks compute one model together, so all must call it with the same inputs and options",
        "give every rank the same inputs, weights' shapes and options",
        rank=rank,
        world_size=len(everyone),
    )
    error.on_every_rank = True
    raise error


def check_ranks(topology: Topology, num_ranks: int) -> None:
    """Refuse a topology of another size than the job.

    Raises:
        TopologyError: the numbers differ.
    """
    if topology.num_ranks != num_ranks:
        raise TopologyError(
            f"the topology has {topology.num_ranks} ranks, the job has {num_ranks}",
            "every rank of the job has a place in the topology",
            "describe exactly the machines that run",
        )
