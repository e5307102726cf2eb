"""Networks that are cut or slow, and strangers: at the store, at a rank's listener, in the store."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from model_cases import Plain, tokens

from torture.faults.out_of_step import ATTEND, another
from torture.job import Job
from torture.rank import Rank
from torture.table import fault

MEETING = "sfcompile.runtime.rank.process_group:ProcessWorld.exchange"


def _cut(job: Job, machine: int, heals_after_s: float | None = None) -> None:
    job.await_mark("cut me")
    job.uplink(machine, up=False)
    job.happens()
    job.mark("cut")
    if heals_after_s is not None:
        time.sleep(heals_after_s)
        job.uplink(machine, up=True)


def calls_after_a_cut(rank: Rank, must: str = "error") -> None:
    """A good call; the cable is drawn; two more calls."""
    run, model = rank.warm()
    rank.meet("warm")
    rank.mark("cut me")
    rank.await_mark("cut")
    rank.call("next", run, model, must=must)
    rank.call("and again", run, model, must=must)


@fault("an error on both within the timeout", machines=(0, 1), rate="1gbit", limit_s=60.0,
       outside=lambda job: _cut(job, 1))  # fmt: skip
def the_network_is_cut_between_calls(rank: Rank) -> None:
    """Machine 1 loses its network; nothing is reset."""
    calls_after_a_cut(rank)


@fault("an error on all within the timeout", ranks=3, machines=(0, 1, 2), rate="1gbit", limit_s=60.0,
       outside=lambda job: _cut(job, 0))  # fmt: skip
def the_store_hosts_network_is_cut(rank: Rank) -> None:
    """Machine 0, whose rank keeps the store, loses its network; the others reach each other."""
    calls_after_a_cut(rank)


@fault("an error on all within the timeout", ranks=3, machines=(0, 0, 1), rate="1gbit", limit_s=60.0,
       outside=lambda job: _cut(job, 1))  # fmt: skip
def the_network_is_cut_in_a_call(rank: Rank) -> None:
    """Machine 1 loses its network in the middle of a call."""
    run, model = rank.warm()
    rank.meet("warm")
    if rank.number == 2:
        rank.before(ATTEND, lambda: (rank.mark("cut me"), rank.await_mark("cut")), nth=1)
    rank.call("cut", run, model, must="error")


@fault("an error on all within the timeout", ranks=3, machines=(0, 0, 1), rate="1gbit", limit_s=60.0,
       outside=lambda job: _cut(job, 1))  # fmt: skip
def the_network_is_cut_in_a_compile(rank: Rank) -> None:
    """Machine 1 loses its network while all compile a second model."""
    run, model = rank.warm()
    rank.meet("warm")
    second = another()
    if rank.number == 2:
        rank.before("sfcompile.backend:run_passes", lambda: (rank.mark("cut me"), rank.await_mark("cut")))
    rank.call("second", rank.compiled(second), second, must="error")


@fault("exact", machines=(0, 1), rate="1gbit", limit_s=60.0, timeout_s=10.0, outside=lambda job: _cut(job, 1, 1.0))
def the_network_comes_back(rank: Rank) -> None:
    """Machine 1 is without network for a second."""
    calls_after_a_cut(rank, must="exact")


@fault("exact", machines=(0, 1), rate="2mbit", limit_s=80.0, timeout_s=20.0)
def a_slow_network(rank: Rank) -> None:
    """Two megabit per second between the machines."""
    model = Plain()
    run = rank.compiled(model)
    for step in range(3):
        rank.call(f"step {step}", run, model, tokens() + step)


# ---------------------------------------------------------------------- strangers


def _strangers_at(port: int, kind: str, until: Job) -> None:
    """Connect again and again: scan, send garbage, or say nothing and stay."""
    kept = []
    while not until.over.is_set():
        with suppress(OSError):
            link = socket.create_connection(("127.0.0.1", port), timeout=0.5)
            if kind == "garbage":
                link.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 8)
            if kind == "silent" and len(kept) < 50:
                kept.append(link)
            else:
                link.close()
        time.sleep(0.05)


def at_the_store(job: Job, kind: str) -> None:
    """Strangers at the port of the job's store."""
    job.await_mark("ready")
    _strangers_at(job.port, kind, job)


def at_every_listener(job: Job, kind: str) -> None:
    """Strangers at every port on which the ranks listen, as a port scanner finds them."""
    while not job.over.is_set():
        for port in sorted(_listening(job.pids) - {job.port}):
            with suppress(OSError):
                link = socket.create_connection(("127.0.0.1", port), timeout=0.2)
                if kind == "garbage":
                    link.sendall(bytes(range(256)))
                    link.close()
                elif kind == "scan":
                    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    link.close()
                else:
                    _silent.append(link)
        time.sleep(2e-3)
    _silent.clear()


_silent: list[socket.socket] = []


def _listening(pids: list[int]) -> set[int]:
    """The TCP ports on which these processes listen."""
    ports = set()
    for pid in pids:
        inodes = set()
        with suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    target = str(fd.readlink())
                    inodes |= {target[8:-1]} if target.startswith("socket:[") else set()
        for table in ("tcp", "tcp6"):
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == "0A" and fields[9] in inodes:
                        ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def _steps(rank: Rank) -> None:
    rank.mark("ready")
    model = Plain()
    run = rank.compiled(model)
    for step in range(5):
        rank.call(f"step {step}", run, model, tokens() + step)


for _kind in ("garbage", "silent", "scan"):
    fault("exact", name=f"strangers at the store: {_kind}", timeout_s=15.0,
          outside=lambda job, kind=_kind: at_the_store(job, kind))(_steps)  # fmt: skip
    fault("exact", name=f"strangers at the listeners: {_kind}", machines=(0, 1), timeout_s=15.0,
          outside=lambda job, kind=_kind: at_every_listener(job, kind))(_steps)  # fmt: skip


def _spoil(job: Job, value: bytes) -> None:
    """A stranger at the store writes into every key of ours."""
    job.await_mark("warm")
    with suppress(RuntimeError):  # the job may be over
        store = dist.TCPStore(job.address, job.port, is_master=False, wait_for_workers=False)
        job.mark("spoiled")
        job.happens()
        end = time.monotonic() + 6.0
        while not job.over.is_set() and time.monotonic() < end:
            for key in store.list_keys():
                if "sfcompile" in key:
                    store.set(key, value)


class Opens:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def _pickle_spoils(job: Job) -> None:
    import base64
    import pickle

    for encode in (base64.b64encode, bytes):
        evil = encode(pickle.dumps(Opens(str(job.folder / "a stranger's code ran"))))
        _spoil(job, evil)


@fault("exact or an error on both, and no code of the stranger's runs", outside=_pickle_spoils)
def a_strangers_pickle_in_the_store(rank: Rank) -> None:
    """Who reaches MASTER_PORT writes pickles under our prefix while ranks compile."""
    _compiles_meanwhile(rank)


@fault("exact or an error on both", outside=lambda job: _spoil(job, b"\x00garbage\xff"))
def garbage_in_the_store(rank: Rank) -> None:
    """Who reaches MASTER_PORT writes garbage under our prefix while ranks compile."""
    _compiles_meanwhile(rank)


def _compiles_meanwhile(rank: Rank) -> None:
    rank.warm()
    rank.meet("warm")
    rank.mark("warm")
    rank.await_mark("spoiled")
    for number in range(3):
        second = another(100 * number)
        rank.call(f"compile {number}", rank.compiled(second), second, must="either")
        rank.meet(f"compiled {number}")
