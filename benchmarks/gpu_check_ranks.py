"""Sections of benchmarks/gpu_check.py: ranks that are processes of one GPU, each with a session of its own, through
torch.compile to what Inductor makes of their graphs; the same in CUDA graphs.

A GPU goes from one process's kernels to another's and back, so that a kernel that waits holds up nobody for ever: the
grid may be the whole GPU's, as in a job with a GPU for each rank. What is not as there: links, and ranks side by side.
"""

from __future__ import annotations

import copy
import datetime
import multiprocessing
import multiprocessing.connection
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gpu_check_report import Bench, distance, name_of
from gpu_check_speed import Model
from torch import nn

import sfcompile
from sfcompile.backend import last_report, streamfusion_backend
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.engines.transfers import ReleaseKernel, WaitKernel
from sfcompile.groups import session_for
from sfcompile.options import ASSUMED, Options
from sfcompile.runtime.gpu.device_side import NvshmemSide
from sfcompile.runtime.gpu.nvshmem import SIGNAL_SET, Nvshmem
from sfcompile.runtime.rank.session import Session, close_session

TIMEOUT_S = 90.0
"""A wait's: at a first call a rank may still compile the kernel that another one waits for."""
REPLAYS = 8
"""Calls of a model in CUDA graphs: the first runs as it is, the second is captured, later ones are replayed."""
Share = Callable[[int], list[torch.Tensor]]
"""Collective: memory of so many bytes (uint8) on every rank, by rank, as this process reaches it."""
Work = Callable[[Session, Bench], None]


# ---------------------------------------------------------------------- ranks


class OneGpu:
    """Both modules of nvshmem4py in one object, for processes that share a GPU: NVSHMEM itself, as NCCL and torch's
    symmetric memory, wants a GPU for each rank.

    Puts and signals are copies on the current stream, which is the one that they are asked for.
    """

    def __init__(self, rank: int, share: Share) -> None:
        self._rank, self._share = rank, share
        self._mapped: dict[int, list[torch.Tensor]] = {}  # by the address of this rank's own

    def get_unique_id(self, empty: bool) -> Any:
        """Nobody reads it."""
        return SimpleNamespace(_data=np.zeros(128, np.uint8))

    def init(self, **told: object) -> None:
        """The ranks have met already."""

    def get_version(self) -> Any:
        """None of NVSHMEM's."""
        return SimpleNamespace(libnvshmem_version="none (processes of one GPU)")

    def tensor(self, shape: tuple[int], dtype: torch.dtype) -> torch.Tensor:
        """Collective."""
        everyone = self._share(shape[0])
        self._mapped[everyone[self._rank].data_ptr()] = everyone
        return everyone[self._rank]

    def free_tensor(self, tensor: torch.Tensor) -> None:
        """Collective."""
        del self._mapped[tensor.data_ptr()]

    def finalize(self) -> None:
        """Nothing to leave."""

    def ptr(self, address: int, pe: int) -> int:
        """Everybody's memory is in reach."""
        return self._at(address, 1, pe).data_ptr()

    def putmem_signal_nbi_on_stream(
        self, dst: int, src: int, nbytes: int, signal: int, value: int, op: int, pe: int, stream: int
    ) -> None:
        """The signal follows the data in the order of the stream."""
        self._at(dst, nbytes, pe).copy_(self._at(src, nbytes, self._rank))
        self.signal_op_on_stream(signal, value, op, pe, stream)

    def signal_op_on_stream(self, signal: int, value: int, op: int, pe: int, stream: int) -> None:
        """One store of a word."""
        assert op == SIGNAL_SET
        self._at(signal, 8, pe).view(torch.int64).fill_(value)

    def _at(self, address: int, nbytes: int, pe: int) -> torch.Tensor:
        """What lies in a rank's memory where this one's own has ``address``."""
        for base, everyone in self._mapped.items():
            if base <= address < base + everyone[pe].numel():
                return everyone[pe][address - base : address - base + nbytes]
        raise ValueError(f"address {address:#x} is not of memory that the ranks share")


class _Job(Nvshmem):
    def _current_device(self) -> Any:
        """Of this thread; nvshmem4py's own notion of a device is not wanted."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)


def memory_of(session: Session, bench: Bench) -> Share:
    """Memory that the processes map: by CUDA's handles, in a dry run from files."""
    count = 0

    def on_gpu(nbytes: int) -> list[torch.Tensor]:
        own = torch.empty(nbytes, dtype=torch.uint8, device=bench.device)
        handles = session.exchange(tuple(own.untyped_storage()._share_cuda_()), "share memory of the GPU")
        everyone = []
        for rank, handle in enumerate(handles):
            if rank == session.rank:
                everyone.append(own)
            else:
                storage = torch.UntypedStorage._new_shared_cuda(*handle)
                everyone.append(torch.empty(0, dtype=torch.uint8, device=bench.device).set_(storage)[:nbytes])
        session.exchange(None, "map each other's memory")  # a rank that ends now takes nobody's away
        return everyone

    def in_files(nbytes: int) -> list[torch.Tensor]:
        nonlocal count
        count += 1
        paths = [f"{bench.lines}-{session.topology.num_ranks}-{count}-{r}" for r in range(session.topology.num_ranks)]
        Path(paths[session.rank]).write_bytes(os.urandom(nbytes))
        session.exchange(None, "share memory")
        return [torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8) for path in paths]

    return in_files if bench.dry else on_gpu


def join(session: Session, bench: Bench) -> None:
    """The session runs on the GPU from now on, over the side that NVSHMEM's ranks have."""
    rank, topology = session.rank, session.topology
    modules = OneGpu(rank, memory_of(session, bench))
    joined = _Job(rank, topology.num_ranks, bench.device, session.exchange, (modules, modules), TIMEOUT_S)
    target = KernelTarget(bench.device)

    def kernels(domains: Sequence[int]) -> tuple[ReleaseKernel, WaitKernel]:
        return ReleaseKernel(rank, topology.num_ranks, target, domains), WaitKernel(rank, target)

    side = NvshmemSide(
        joined, topology, session.exchange, kernels, TIMEOUT_S, session.trouble, leave=lambda failed: None
    )
    side.carried_by = "stores between processes of one GPU"
    session.use_side(side)


def on_ranks(bench: Bench, ranks: int, work: Work, limit_s: float) -> None:
    """``work`` on every rank of a job of processes; what goes wrong on one is told.

    A dry run forks them from this process, which has imported everything; where CUDA has been started that cannot be.
    """
    context: Any = multiprocessing.get_context("fork" if bench.dry else "spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running: dict[Any, tuple[int, Any]] = {}
    end = time.monotonic() + limit_s
    try:
        for rank in range(ranks):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, ranks, port, bench, work, send))
            process.start()
            send.close()
            running[receive] = rank, process
        while running and time.monotonic() < end:
            ready: Any
            for ready in multiprocessing.connection.wait(list(running), timeout=0.1):
                rank, process = running.pop(ready)
                try:
                    said = ready.recv()
                except EOFError:
                    process.join(5.0)
                    said = f"its process ended with code {process.exitcode}"
                process.join(max(0.0, min(20.0, end - time.monotonic())))
                if said:
                    bench.check(False, f"rank {rank} of {ranks}: {said}")
                    end = min(end, time.monotonic() + 20.0)  # the others find that out, or never
                if process.exitcode is None:  # it has said what it had to say
                    process.kill()
                    process.join()
    finally:
        for rank, process in running.values():
            process.kill()
            process.join()
            bench.check(False, f"rank {rank} of {ranks} did not end, and was killed")


def _rank(rank: int, ranks: int, port: int, bench: Bench, work: Work, send: Any) -> None:
    os.environ |= {
        "RANK": f"{rank}", "WORLD_SIZE": f"{ranks}", "LOCAL_RANK": f"{rank}", "LOCAL_WORLD_SIZE": f"{ranks}",
        "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}",
    }  # fmt: skip
    said = ""
    try:
        if bench.dry:
            torch.set_num_threads(1)  # a forked process has none of the threads of its parent
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))  # NCCL takes no two ranks a GPU
        session = session_for(Options(timeout_s=TIMEOUT_S))
        join(session, bench)
        work(session, bench)
    except BaseException as error:
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({where.name}, line {where.lineno})"
    send.send(said)
    close_session()
    dist.destroy_process_group()


# ---------------------------------------------------------------------- sections


def inductor(bench: Bench) -> None:
    """A small diffusion transformer, compiled for each rank by Inductor, against one process in fp64; its weights whole
    on every rank, then in shares."""
    for ranks in bench.mine([2] if bench.dry else [2, 4]):
        with bench.case(f"{ranks} processes of one GPU"):
            on_ranks(bench, ranks, compiled, 180.0)


def replayed(bench: Bench) -> None:
    """The same in CUDA graphs."""
    with bench.case("mode='reduce-overhead' on 2 processes of one GPU"):
        on_ranks(bench, 2, captured, 180.0)


def compiled(session: Session, bench: Bench) -> None:
    """On a rank: calls with other inputs each, by generated kernels and by the library's."""
    half, full = torch.bfloat16, torch.float32
    # In a dry run the library's: on CPUs the backend knows no kernels of a GPU's side.
    cases = [("aten", full)] if bench.dry else [("triton", full), ("triton", half), ("aten", half)]
    for attention, dtype in cases:
        Calls(session, bench, attention, dtype).run(1 if bench.dry else 3)
    Calls(session, bench, *cases[-1], shares=True).run(2)


def captured(session: Session, bench: Bench) -> None:
    """On a rank: replays with other inputs each, and no memory that grows. A CPU captures nothing: the same calls."""
    if bench.dry:
        calls = Calls(session, bench, "aten", torch.float32)
    else:
        calls = Calls(session, bench, "triton", torch.bfloat16, "reduce-overhead")
    calls.run(3)
    before = calls.memory()
    calls.run(REPLAYS - 3)
    after = calls.memory()
    everyone = session.exchange((before, after, bool(session.side._runs.captured)), "compare memory")  # type: ignore[attr-defined]
    if session.rank == 0:
        was_captured = all(known for *_, known in everyone)
        said = "were" if was_captured else "were not"
        bench.check(was_captured is not bench.dry, f"calls of sites {said} captured on every rank")
        grown = [after - before for before, after, _ in everyone]
        bench.check(max(grown) <= 0, f"memory after {REPLAYS} calls, more than after 3, by rank: {grown} bytes")


class Calls:
    """A model of one seed on every rank, compiled for it, whose calls are compared with the whole model in fp64."""

    def __init__(
        self,
        session: Session,
        bench: Bench,
        attention: str,
        dtype: torch.dtype,
        mode: str | None = None,
        shares: bool = False,
    ) -> None:
        self._session, self._bench, self._dtype = session, bench, dtype
        # The library's outputs are rounded once more, before they are merged.
        self._most = 1.5 if attention == "aten" else 1.2
        width, heads, self.blocks, self._tokens = (64, 2, 1, 26) if bench.dry else (512, 8, 2, 1000)
        self._name = f"{session.topology.num_ranks} ranks, {name_of(dtype)}, attention={attention!r}"
        self._name += f", mode={mode!r}" if mode else ""
        self._name += ", weights in shares" if shares else ""
        torch._dynamo.reset()
        torch.manual_seed(3)
        with torch.device(bench.device):
            whole = Model(width, heads, self.blocks).eval().requires_grad_(False)
        self._one = whole.to(dtype)
        self._exact = copy.deepcopy(self._one).double()
        if shares:
            sfcompile.shard_weights(self._one, options={"timeout_s": TIMEOUT_S})
        self._condition = torch.randn(1, width, device=bench.device)
        options = {
            "attention": attention, "topology": ASSUMED, "placement": "shard", "timeout_s": TIMEOUT_S,
            "inner": "eager" if bench.dry else "inductor", "weights": "sharded" if shares else "whole",
        }  # fmt: skip

        def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return streamfusion_backend(gm, inputs, options=options, mode=mode)

        self._compiled: nn.Module = torch.compile(self._one, backend=backend)
        self._made = 0

    def run(self, calls: int) -> None:
        """So many calls, each with inputs of its own, the same on all ranks."""
        for _ in range(calls):
            self._made += 1
            torch.manual_seed(100 + self._made)
            x = torch.randn(1, self._tokens, 64, device=self._bench.device)
            narrow = x.to(self._dtype), self._condition.to(self._dtype)
            with torch.no_grad():
                torch.compiler.cudagraph_mark_step_begin()
                ours = self._compiled(*narrow).double()  # a copy: a replay writes where the last one did
                want = self._exact(x.to(self._dtype).double(), narrow[1].double())
                error, other = distance(ours, want), distance(self._one(*narrow), want)
            everyone = self._session.exchange(error, "compare outputs")
            self._tell(max(everyone, key=lambda error: (error != error, error)), other)  # a NaN is the worst

    def _tell(self, error: float, other: float) -> None:
        if self._session.rank:
            return
        limit = max(1e-5 if self._dtype == torch.float32 else 0.0, self._most * other)
        self._bench.check(
            error <= limit,
            f"{self._name}, call {self._made}: error {error:.2e} on the worst rank, one process {other:.2e}, limit "
            f"{limit:.2e}",
        )
        if self._made == 1:
            report = last_report()
            sites = 0 if report is None else report.sharded_sites
            self._bench.check(sites == self.blocks, f"{self._name}: {sites} of {self.blocks} attentions are sharded")
            self._bench.note(f"{self._name}: {'no report' if report is None else report.attention}")
            if report is not None and report.weights:
                self._bench.note(f"{self._name}: {report.weights}")

    def memory(self) -> int:
        """Bytes in use on the GPU, by this process; none in a dry run."""
        if self._bench.dry:
            return 0
        self._bench.sync()
        return torch.cuda.memory_allocated(self._bench.device)
