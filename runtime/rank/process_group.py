"""Processes: the default group under torchrun, which ranks share a machine, agreement before anything collective."""

from __future__ import annotations

import base64
import contextlib
import datetime
import itertools
import logging
import os
import pickle
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
from sfcompile.runtime.rank.sides import Wires
from sfcompile.runtime.wires.c10d import C10dTransport
from sfcompile.runtime.wires.direct import DirectTransport, require_x86
from sfcompile.runtime.wires.shared_segments import share
from sfcompile.runtime.wires.symmetric_heap import HeapSize, Segment, local_segment
from sfcompile.runtime.wires.tcp import TcpTransport
from sfcompile.runtime.wires.tcp_links import connect
from sfcompile.runtime.wires.transport import MessageTransport, RoutedTransport, peer_failed
from sfcompile.torch_private import job_store

_log = logging.getLogger("sfcompile")
_worlds = itertools.count()
_LINGER_S = 1.0


def ensure_process_group(timeout_s: float) -> bool:
    """Create the default process group from torchrun's environment if there is none.

    Returns:
        Whether it was created here (then it is ours to destroy).
    """
    if dist.is_initialized():
        return False
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=max(timeout_s, 60.0)))
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
    """Ranks are processes of a torch.distributed job.

    Python values and failure notices travel through the job's key-value store, not through a collective: a rank that is
    missing can then be named, and one that fails can tell ranks of any machine.

    Args:
        transport: "auto" (stores inside a machine, messages between), "shm" (one machine only) or "c10d".
        timeout_s: longest wait on a peer.

    Raises:
        UnsupportedError: transport "shm" with several machines.
    """

    def __init__(self, transport: str, timeout_s: float) -> None:
        self._own_group = ensure_process_group(timeout_s)
        self.rank = dist.get_rank()
        self._timeout_s = timeout_s
        self._transport = transport
        self._num_ranks = dist.get_world_size()
        # Ranks make their worlds in the same order, so the number tells a process's second world from its first.
        prefix = f"sfcompile/{next(_worlds)}"
        self._store = job_store(prefix)
        self._exchanges = 0
        self._lives = 0
        self._announced = False
        self._group: dist.ProcessGroup | None = None
        self._messages: MessageTransport | None = None
        facts = self.exchange((machine_identity(), os.getpid()), "start a session")
        identities = [machine for machine, _ in facts]
        numbers = {machine: i for i, machine in enumerate(dict.fromkeys(identities))}
        self.topology = Topology(tuple(numbers[machine] for machine in identities))
        self._pids = [pid for _, pid in facts]
        if transport == "shm" and self.topology.num_machines > 1:
            raise UnsupportedError(
                f"transport='shm' with {self.topology.num_machines} machines",
                "ranks of different machines share no memory",
                "use transport='auto' (shared memory inside a machine, TCP between) or 'c10d'",
                rank=self.rank,
            )
        self._messages_only = transport == "c10d"

    def _connected(self) -> MessageTransport:
        """Collective, at first: the wires to ranks of other machines, one set for all heaps."""
        if self._messages is None:
            problem = "asked for" if self._messages_only else None
            if problem is None:
                peers = [r for r in range(self._num_ranks) if not self.topology.same_machine(r, self.rank)]
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
        timeout = datetime.timedelta(seconds=self._timeout_s)
        group = dist.new_group(list(range(self._num_ranks)), backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)  # this rank is in it
        return group

    # ------------------------------------------------------------------ control

    def reconfigure(self, transport: str, timeout_s: float) -> bool:
        """Take the options of a later compile; whether the wires must be made anew for them.

        Raises:
            OptionError: another transport than the one this process runs on.
        """
        if transport != self._transport:
            raise OptionError(
                f"transport={transport!r}, but this process already runs on transport={self._transport!r}",
                "all graphs of a process share one heap and one set of connections",
                "use the same transport for every model of a process",
            )
        changed = timeout_s != self._timeout_s
        self._timeout_s = timeout_s
        if self._messages is not None:
            self._messages.timeout_s = timeout_s
        return changed

    def exchange(self, value: Any, doing: str, patience: float = 1.0) -> list[Any]:
        """All-gather of picklable values: every rank's, by rank.

        Args:
            value: this rank's.
            doing: what the ranks do together, for the error: "compile a graph".
            patience: how many times ``timeout_s`` to wait.

        Raises:
            RuntimeTimeoutError: names the ranks that did not come.
            PeerFailedError: another rank failed before it came.
            PeerDiedError: rank 0 has gone, and the store with it.
        """
        # A meeting is counted when it has come about: ranks that failed in one, or in different ones, meet at it again.
        key = f"{doing}/{self._exchanges + 1}"
        try:
            self._store.set(f"{key}/{self.rank}", base64.b64encode(pickle.dumps(value)).decode())
            self._await_all(key, doing, patience * self._timeout_s)
            raw = [self._store.get(f"{key}/{rank}") for rank in range(self._num_ranks)]
            self._store.add(f"{key}/read", 1)
            if self.rank == 0:
                self._keep_store(f"{key}/read")
        except dist.DistError as error:
            raise PeerDiedError(
                f"rank {self.rank} was about to {doing} and found the job's store gone ({str(error).splitlines()[0]})",
                "rank 0, or the launcher, keeps the store and has ended",
                "look at the log of rank 0",
                rank=self.rank,
                peer=0,
            ) from error
        except BaseException:
            with contextlib.suppress(dist.DistError):  # who comes later must not take it for a rank that waits
                self._store.delete_key(f"{key}/{self.rank}")
            raise
        self._exchanges += 1
        return [pickle.loads(base64.b64decode(text)) for text in raw]

    def _await_all(self, key: str, doing: str, limit_s: float) -> None:
        known = self.notice()  # an old failure: ranks that all got over it may meet again
        missing = list(range(self._num_ranks))
        start, nap = time.monotonic(), 1e-3
        while True:
            notice = self.notice()
            missing = [rank for rank in missing if not self._store.check([f"{key}/{rank}"])]
            if not missing:
                return
            # The notice was read before the look round: who failed after this meeting cannot have ended it.
            if notice is not None and known is None:
                raise peer_failed(self.rank, notice)
            if time.monotonic() - start > limit_s:
                raise RuntimeTimeoutError(
                    f"rank {self.rank} is ready to {doing} (step {self._exchanges}), but not every rank came along "
                    f"within {limit_s:g} s: {_ranks(missing)} did not",
                    "every rank must call the model with inputs of the same shapes; a rank that was called with other "
                    "shapes compiles anew while the others run",
                    f"give every rank the same inputs; look at the log of rank {missing[0]}",
                    rank=self.rank,
                    peer=missing[0],
                )
            time.sleep(nap)
            nap = min(1.5 * nap, 0.05)

    def _keep_store(self, counter: str) -> None:
        """The store may end with this process: stay, for a moment, until every rank has read what it came for."""
        deadline = time.monotonic() + _LINGER_S
        while self._store.add(counter, 0) < self._num_ranks and time.monotonic() < deadline:
            time.sleep(1e-3)

    def announce(self, text: str) -> None:
        """Leave a failure notice for all ranks; the first one stays."""
        with contextlib.suppress(dist.DistError):  # the store has gone with rank 0: nobody is left to tell through it
            self._store.compare_set(f"failed/{self._lives}", "", text)
            self._store.add(f"told/{self._lives}", 1)
            self._announced = True

    def notice(self) -> str | None:
        """The first failure notice, if any."""
        key = f"failed/{self._lives}"
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except dist.DistError:
            return None

    def reset(self) -> None:
        """Collective: forget the failure notices, and make new connections in place of those that a failure closed."""
        self._lives += 1
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
        return Wires(RoutedTransport(stores, messages, direct), stores)

    def close(self) -> None:
        """Close the wires, and the default group if it was made here."""
        if self._messages is not None:
            self._messages.disconnect()
        self._messages = None
        if self._own_group and self._announced and self.rank == 0:
            with contextlib.suppress(dist.DistError):
                self._keep_store(f"told/{self._lives}")
        if self._own_group and dist.is_initialized():
            dist.destroy_process_group()


def _ranks(some: Sequence[int]) -> str:
    listed = ", ".join(map(str, some[:8]))
    return f"rank {listed}" if len(some) == 1 else f"ranks {listed}" + (" ..." if len(some) > 8 else "")


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
        for key in keys[:3]:
            mine, its = reference.get(key, "nothing"), theirs.get(key, "nothing")
            differences.append(f"{key} is {mine} on rank 0 and {its} on rank {other}")
        if not keys:
            differences.append(f"rank {other} traced other code than rank 0 for inputs of the same shapes")
    raise RankMismatchError(
        f"{_ranks(odd)} would compile something else than rank 0: {'; '.join(differences)}",
        "the ranks compute one model together, so all must call it with the same inputs and options",
        "give every rank the same inputs, weights' shapes and options",
        rank=rank,
        world_size=len(everyone),
    )


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
