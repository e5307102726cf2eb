"""One job under one fault: its ranks are started, watched and ended, and their records read."""

from __future__ import annotations

import atexit
import json
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from emulated_machines import Cluster, emulated_machines
from processes import fork_server, free_port, preload, rank_env

from torture import places
from torture.rank import Rank
from torture.table import Fault, fault_modules

preload("torture.job", "torture.rank", "torture.programs", *fault_modules())


@dataclass
class RankRecord:
    """How a rank's process ended, and what it wrote down.

    Attributes:
        exit_code: negative: the signal that ended it; None: it still ran at the limit.
        ended_at: on time.monotonic's clock.
    """

    number: int
    exit_code: int | None
    ended_at: float
    lines: list[dict[str, Any]]
    log: str


@dataclass
class JobRecord:
    """All that is known of a job when it has ended.

    Attributes:
        struck: victim -> when the harness killed or stopped it.
        outside_error: what went wrong in the fault's own outside part.
    """

    fault: Fault
    began_at: float
    ranks: list[RankRecord]
    left: list[str]
    struck: dict[int, float] = field(default_factory=dict)
    faults_at: list[float] = field(default_factory=list)
    outside_error: str = ""


class Job:
    """The running job, for what is done to it from outside.

    Attributes:
        pids: of the ranks.
        port, address: of the job's store.
        cluster: the emulated machines, if the fault asked for some.
        folder: the job's own.
    """

    def __init__(self, fault: Fault, base: Path, cluster: Cluster | None, keeper: int | None) -> None:
        self.fault = fault
        self.base = base
        self.control, self.folder, self.temporary = (base / name for name in ("control", "out", "tmp"))
        for folder in (self.control, self.folder, self.temporary):
            folder.mkdir()
        self.cluster = cluster
        self._keeper = keeper
        self.port = free_port()
        self.address = "127.0.0.1" if cluster is None else f"10.{cluster.net}.0.1"
        self.began_at = time.monotonic()
        self.pids: list[int] = []
        self.over = threading.Event()
        self.struck: dict[int, float] = {}
        self.faults_at: list[float] = []
        self._processes: list[Any] = []

    def start_all(self) -> None:
        """Start every rank; the job's time begins when the server that forks them is ready."""
        if not self.fault.programs:
            fork_server().Process(target=os.getpid).start()
        self.began_at = time.monotonic()
        for rank in range(self.fault.ranks):
            self.start(rank)

    def start(self, rank: int) -> None:
        """Start a rank: forked from the server that has imported everything, or as a program."""
        homes = self.fault.machines or (0,) * self.fault.ranks
        env = rank_env(rank, homes) | {
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "TMPDIR": str(self.temporary),
            "TORCHINDUCTOR_CACHE_DIR": str(self.base / "inductor"),
            **self.fault.env,
        }
        network = None
        if self.cluster is not None:
            network = f"{self.cluster.prefix}{homes[rank]}"
            env |= {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"}
        work = self.fault.work
        called = f"{work.__module__}:{work.__name__}"
        told = Start(
            rank, self.fault.ranks, str(self.control), str(self.folder), self.fault.timeout_s, env, network,
            self._keeper, self.fault.own_shm, called, self.fault.args,
        )  # fmt: skip
        if self.fault.programs:
            # A process with threads cannot change its namespace, and torch makes some when it is imported.
            enter = (
                []
                if self._keeper is None
                else ["nsenter", f"--mount=/proc/{self._keeper}/ns/mnt", f"--wd={os.getcwd()}"]
            )
            command = [*enter, sys.executable, "-m", "torture.programs", json.dumps(told.__dict__ | {"room": None})]
            variables = os.environ | env | {"PYTHONPATH": os.pathsep.join(sys.path)}
            process: Any = subprocess.Popen(command, env=variables, start_new_session=True)
        else:
            process = fork_server().Process(target=run_rank, args=(told,), daemon=True)
            process.start()
        self._processes.append(process)
        self.pids.append(process.pid)

    def exit_code(self, rank: int) -> int | None:
        """None: it runs."""
        process = self._processes[rank]
        return process.poll() if self.fault.programs else process.exitcode  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ for what is done from outside

    def strike(self, rank: int, number: int = signal.SIGKILL, victim: bool = True) -> None:
        """Send a signal to a rank."""
        now = time.monotonic()
        if victim:
            self.struck[rank] = now
        self.faults_at.append(now)
        with suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def happens(self) -> None:
        """The fault happens now, to no rank in particular."""
        self.faults_at.append(time.monotonic())

    def mark(self, name: str) -> None:
        """Leave a mark for ranks that wait for it."""
        (self.control / name).touch()

    def await_mark(self, name: str, limit_s: float = 30.0) -> None:
        """Wait for a rank's mark.

        Raises:
            TimeoutError: it did not come.
        """
        end = time.monotonic() + limit_s
        while not (self.control / name).exists():
            if time.monotonic() > end or self.over.is_set():
                raise TimeoutError(f"no rank came to {name!r}")
            time.sleep(2e-3)

    def uplink(self, machine: int, up: bool) -> None:
        """Plug a machine's network cable in or out; nobody is told, no connection is reset."""
        assert self.cluster is not None
        near = self.cluster.prefix.replace("sfe", "sfv") + str(machine)
        subprocess.run(["ip", "link", "set", near, "up" if up else "down"], check=True)

    # ------------------------------------------------------------------ its end

    def wait(self) -> list[RankRecord]:
        """Until all ranks have ended or the limit has passed; no process is left behind."""
        ended: dict[int, float] = {}
        try:
            self._watch(ended)
        finally:
            records = self._end(ended)
        return records

    def _watch(self, ended: dict[int, float]) -> None:
        limit = self.began_at + self.fault.limit_s
        count = self.fault.ranks
        # A victim that is stopped for good is not waited for.
        while not set(range(count)) <= {*ended, *self.struck} and time.monotonic() < limit:
            for rank in range(count):
                if rank not in ended and self.exit_code(rank) is not None:
                    ended[rank] = time.monotonic()
            running = [self._processes[rank] for rank in range(count) if rank not in ended]
            if running and not self.fault.programs:
                multiprocessing.connection.wait([process.sentinel for process in running], timeout=0.1)
            elif running:
                time.sleep(0.02)

    def _end(self, ended: Mapping[int, float]) -> list[RankRecord]:
        """Kill what still runs, after it wrote down where; read the records."""
        self.over.set()
        codes = [self.exit_code(rank) for rank in range(len(self._processes))]
        hanging = [rank for rank, code in enumerate(codes) if code is None and rank not in self.struck]
        for rank in hanging:  # into its log, where it hangs
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGUSR1)
        time.sleep(0.3 if hanging else 0.0)
        records = []
        for rank, code in enumerate(codes):
            with suppress(ProcessLookupError, PermissionError):  # also what it forked
                os.killpg(self.pids[rank], signal.SIGKILL)
            self._processes[rank].kill()
            self._processes[rank].wait() if self.fault.programs else self._processes[rank].join()
            lines = read_lines(self.control / f"rank{rank}.jsonl")
            log = self.control / f"rank{rank}.log"
            text = log.read_text(errors="replace") if log.exists() else ""
            records.append(RankRecord(rank, code, ended.get(rank, time.monotonic()), lines, text))
        return records


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A rank's record; the last line may be cut off by its death."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def run_fault(fault: Fault) -> JobRecord:
    """Run one fault's job to its end."""
    base = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        with _machines(fault) as cluster, places.room(fault.small_shm) as keeper:
            before = places.shared_memory_names(keeper)
            job = Job(fault, base, cluster, keeper)
            errors: list[str] = []

            def outside() -> None:
                assert fault.outside is not None
                try:
                    fault.outside(job)
                except BaseException:
                    errors.append(traceback.format_exc())

            job.start_all()
            thread = threading.Thread(target=outside, daemon=True) if fault.outside is not None else None
            if thread is not None:
                thread.start()
            records = job.wait()
            if thread is not None:
                thread.join(10.0)
            left = places.leftovers(keeper, before, job.temporary, job.folder, fault.outputs)
            return JobRecord(fault, job.began_at, records, left, job.struck, job.faults_at, errors[0] if errors else "")
    finally:
        shutil.rmtree(base, ignore_errors=True)


@contextmanager
def _machines(fault: Fault) -> Iterator[Cluster | None]:
    if fault.rate is None:
        yield None
        return
    homes = fault.machines or (0,) * fault.ranks
    with emulated_machines(max(homes) + 1, fault.rate) as cluster:
        yield cluster


# ---------------------------------------------------------------------- in the rank's process


@dataclass(frozen=True)
class Start:
    """What a rank's process is told."""

    rank: int
    ranks: int
    control: str
    folder: str
    timeout_s: float
    env: dict[str, str]
    network: str | None
    room: int | None
    own_shm: bool
    work: str
    args: tuple[Any, ...]


def run_rank(told: Start) -> None:
    """The life of a rank, its exit handlers included."""
    import faulthandler
    import importlib

    with suppress(PermissionError):
        os.setsid()
    os.environ |= told.env
    tempfile.tempdir = None
    log = os.open(f"{told.control}/rank{told.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if told.network is not None:
        places.enter_network(told.network)
    if told.room is not None:
        places.enter_room(told.room)
    if told.own_shm:
        places.own_mounts()
        places.mount_memory(places.SHM)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have children
    multiprocessing.set_start_method("fork", force=True)  # as in a program; the server that forked us has set its own
    torch.set_num_threads(1)
    rank = Rank(told.rank, told.ranks, Path(told.control), Path(told.folder), told.timeout_s)
    rank.note("start")
    module, _, name = told.work.partition(":")
    code = 0
    try:
        with torch.no_grad():
            getattr(importlib.import_module(module), name)(rank, *told.args)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        traceback.print_exc()
        rank.note("uncaught", error=type(error).__name__, text=str(error)[:500])
        code = 1
    finish(rank, code)


def finish(rank: Rank, code: int) -> None:
    """End as a program does: its threads, its exit handlers."""
    rank.note("over")
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    rank.note("exit")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
