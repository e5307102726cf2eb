"""Ranks as processes that run generated kernels in Triton's interpreter over POSIX shared memory.

A pool of processes lives for a test session: starting one costs seconds. Each job is one attention site, several epochs
long, from put to collect with nothing but generated code; one rank may be late.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from watched import UNWATCHED

from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.runtime.program.instructions import Instruction
from sfcompile.runtime.program.intervals import Runs
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.wires.shared_files import Place
from sfcompile.runtime.wires.shared_segments import map_shared, shared_segment
from sfcompile.runtime.wires.symmetric_heap import HeapSize
from sfcompile.runtime.wires.transport import word_of

Change = Callable[[str, tuple[Instruction, ...]], tuple[Instruction, ...]]


@dataclass(frozen=True)
class Job:
    """One attention site on several ranks.

    ``net``: machines reach each other by emulated NVSHMEM only; else everybody by load and store. ``machines`` x ranks
    inside; ``least``: an added mask hides all keys from some queries, by fp32's least number; ``late`` is a rank that
    sleeps about ``late_s`` before every put; ``drop`` names a mutant (:func:`mutated`).
    """

    kind: str
    machines: int
    inside: int
    ulysses: int
    ring: int
    site: AttentionSite
    net: bool = False
    across: str = "ulysses"
    parts: tuple[int, int] = (1, 1)
    mask: str = "none"
    mask_is_bool: bool = True
    least: bool = False
    late: int | None = None
    late_s: float = 0.1
    epochs: int = 3
    drop: str = ""
    merge: bool = True
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def ranks(self) -> int:
        return self.machines * self.inside

    @property
    def machine_of(self) -> tuple[int, ...] | None:
        return tuple(rank // self.inside for rank in range(self.ranks)) if self.net else None

    def schedule(self) -> Schedule:
        mesh = Mesh.of(Topology.grid(self.machines, self.inside), self.ulysses, self.ring, self.across)
        return mutated(build(self.kind, self.site, mesh, *self.parts), self.drop)


def make_site(
    tokens: Sequence[int] | int,
    ranks: int,
    heads: int = 4,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 32,
    batch: int = 1,
    **changes: Any,
) -> AttentionSite:
    """Self-attention of some tokens per rank."""
    counts = [tokens] * ranks if isinstance(tokens, int) else list(tokens)
    starts = [sum(counts[:rank]) for rank in range(ranks)]
    places: tuple[Runs, ...] = tuple(((start, n),) if n else () for start, n in zip(starts, counts, strict=True))
    site = AttentionSite("site", batch, heads, heads, head_dim, head_dim, dtype, places, places, head_dim**-0.5)
    return replace(site, **changes)


def mutated(schedule: Schedule, name: str) -> Schedule:
    """A schedule with a mistake: "wait" (a wait for keys is missing), "slot" (a chunk sent to another's slot)..."""
    from sfcompile.runtime.program.instructions import Attend, Push, Put, RankProgram, Wait

    if not name:
        return schedule
    phases = dict(schedule.origin.phases)
    attend = list(phases["attend"])
    if name == "wait":
        # V of the ring's neighbour, put by itself: nothing else that this rank waits for comes after it.
        names = [slot.name for slot in schedule.slots]
        attend = [step for step in attend if not (isinstance(step, Wait) and names[step.slot] == "v(0,1)")]
    elif name == "early push":
        push = next(i for i, step in enumerate(attend) if isinstance(step, Push))
        work = max(i for i in range(push) if isinstance(attend[i], Attend))
        attend[work], attend[push] = attend[push], attend[work]
    elif name == "slot":
        puts = [step for step in phases["put_k"] if isinstance(step, Put)]
        phases["put_k"] = (replace(puts[0], slot=puts[-1].slot), *puts[1:])
    elif name == "put":
        phases["put_v"] = phases["put_v"][:-1]
    else:
        raise ValueError(name)
    phases["attend"] = tuple(attend)
    return replace(schedule, origin=RankProgram(0, phases, schedule.origin.arrivals))


def inputs_of(job: Job) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Whole q, k, v and mask, the same in every process."""
    site = job.site
    torch.manual_seed(7)
    lq = sum(n for places in site.q_positions for _, n in places)
    lk = sum(n for places in site.kv_positions for _, n in places)
    q = torch.randn(site.batch, site.heads, lq, site.head_dim).to(site.dtype)
    k = torch.randn(site.batch, site.kv_heads, lk, site.head_dim).to(site.dtype)
    v = torch.randn(site.batch, site.kv_heads, lk, site.v_head_dim).to(site.dtype)
    if job.mask == "none":
        return q, k, v, None
    shape = (site.batch, 1, 1, lk) if job.mask == "key" else (1, site.heads, lq, lk)
    open_keys = slice(lk // 4, lk * 3 // 4) if job.mask == "key" else slice(0)  # blocks in which nothing is hidden
    if job.mask_is_bool:
        mask = torch.rand(shape) < 0.7
        mask[..., open_keys] = True
        mask[..., :1, -1:] = True
        if job.mask == "full":
            mask[0, 0, 3] = False  # a query that sees nothing
        return q, k, v, mask
    mask = torch.randn(shape)
    mask[..., open_keys] = 0.0
    if job.least:
        hidden = mask[-1] if job.mask == "key" else mask[..., ::3, :]
        hidden.fill_(torch.finfo(torch.float32).min)
    return q, k, v, mask


def expected(job: Job) -> torch.Tensor:
    """The whole output in fp64."""
    site = job.site
    q, k, v, mask = inputs_of(job)
    group = site.heads // site.kv_heads
    k, v = (x.repeat_interleave(group, 1).double() for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * site.scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.double()
    if site.causal:
        hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


def rows_of(places: Runs) -> torch.Tensor:
    return torch.cat([torch.arange(first, first + n) for first, n in places] or [torch.zeros(0, dtype=torch.int64)])


def error_of(job: Job, outs: Sequence[torch.Tensor]) -> float:
    """Worst rank's ||out - expected|| / ||expected||."""
    whole = expected(job)
    worst = 0.0
    for rank, out in enumerate(outs):
        want = whole[:, :, rows_of(job.site.q_positions[rank])]
        if want.numel():
            worst = max(worst, float((out.double() - want).norm() / want.norm()))
    return worst


def run_rank(job: Job, rank: int, places: Sequence[Place], size: HeapSize) -> torch.Tensor:
    """One rank's part of a job."""
    from deadline import Deadline
    from emulated_nvshmem import DeviceCalls

    from sfcompile.codegen.engines.launch import AttendKernel, HeapView
    from sfcompile.codegen.engines.target import KernelTarget
    from sfcompile.codegen.engines.transfers import ReleaseKernel
    from sfcompile.codegen.toolchain.interpreter import interpreting

    segments = [map_shared(place, size) for place in places]
    own = segments[rank].address
    heaps = torch.tensor([(segment.address, pe, own) for pe, segment in enumerate(segments)])
    poll = Deadline(10.0)
    emulated = DeviceCalls(lambda address, pe: address - own + segments[pe].address)
    target = KernelTarget(torch.device("cpu"), calls=emulated.names() if job.net else None)
    schedule = job.schedule()
    kernel = AttendKernel(
        schedule, rank, target, job.machine_of, (job.mask, job.mask_is_bool), merge=job.merge, **job.options
    )
    q, k, v, mask = inputs_of(job)
    site = job.site
    mine = rows_of(site.q_positions[rank]), rows_of(site.kv_positions[rank])
    local = {"q": q[:, :, mine[0]], "k": k[:, :, mine[1]], "v": v[:, :, mine[1]]}
    # Nothing of the last epoch can pass for this one's: every epoch has another sign.
    out = torch.zeros(site.batch, site.heads, len(mine[0]), site.v_head_dim, dtype=site.dtype)
    sleep = random.Random(rank)
    release = ReleaseKernel(rank, job.ranks, target, job.machine_of)
    others = torch.tensor([other for other in range(job.ranks) if other != rank], dtype=torch.int64)
    with interpreting(poll):
        for epoch in range(1, job.epochs + 1):
            sign = 1 if epoch == job.epochs else -1
            heap = HeapView(heaps, torch.tensor(size.place(epoch, word_of(epoch, 0), UNWATCHED.watched)), others)
            for name in ("q", "k", "v"):
                if job.late == rank:
                    time.sleep(job.late_s * (0.5 + sleep.random()))
                kernel.put(name, local[name] * sign if name == "v" else local[name], heap)
            out.zero_()
            kernel.run(out, heap, mask=mask)
            kernel.collect(out, heap)
            release.run(heaps, heap.place)
    return out


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        job = pipe.recv()
        if job is None:
            return
        try:
            pipe.send((True, run_rank(*job).float().numpy()))
        except BaseException as error:  # noqa: BLE001
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class Pool:
    """Rank processes, started as they are needed and kept."""

    def __init__(self) -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "triton", "kernel_ranks"])
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, job: Job) -> list[torch.Tensor]:
        """Every rank's output.

        Raises:
            RuntimeError: a rank failed, with its error.
        """
        from sfcompile.codegen.kernels.tables import make_tables

        while len(self._ranks) < job.ranks:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            self._ranks.append((process, here))
        schedule = job.schedule()
        size = HeapSize(len(schedule.slots), make_tables(schedule, 0, 64, job.machine_of).bank_bytes, job.ranks)
        with contextlib.ExitStack() as held:
            places = [held.enter_context(shared_segment(size))[1] for _ in range(job.ranks)]
            for rank in range(job.ranks):
                self._ranks[rank][1].send((job, rank, places, size))
            results = [self._ranks[rank][1].recv() for rank in range(job.ranks)]
        failures = [text for fine, text in results if not fine]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [torch.from_numpy(out) for _, out in results]

    def close(self) -> None:
        for process, pipe in self._ranks:
            pipe.send(None)
            process.join(5)
            if process.is_alive():
                process.kill()
