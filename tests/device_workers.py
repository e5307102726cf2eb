"""GPU ranks without GPUs: the session's device side over emulated NVSHMEM, kernels in Triton's interpreter."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from emulated_nvshmem import Library
from random_sites import random_case
from rank_workers import attend_and_gather, schedules_of, session_of, shared_memory_names

from sfcompile.codegen.interpreter import Deadline, interpreting
from sfcompile.codegen.kernel_device_engine import KernelEngine
from sfcompile.codegen.kernel_engine import InterpreterEngine
from sfcompile.codegen.kernel_transfers import ReleaseKernel
from sfcompile.codegen.nvshmem_calls import Emulated
from sfcompile.runtime.device_side import NvshmemSide
from sfcompile.runtime.nvshmem import Nvshmem

CPU = torch.device("cpu")


def run(rank: int, seed: int, kernels: bool, calls: int, late: int = -1) -> dict[str, Any]:
    """Attention and gather of a random case, several times, then of a larger one (the heap grows), then again.

    Args:
        kernels: generated kernels; else the executor over NVSHMEM's host calls.
        late: a rank that sleeps before its calls.
    """
    session = session_of()
    topology = session.topology
    library = Library(rank, lambda: session.exchange(None, "meet"), lambda pe: topology.same_machine(rank, pe))
    nvshmem = Nvshmem(rank, topology.num_ranks, CPU, session.exchange, (library, library))
    calls_of = Emulated(library.address_of, Deadline(20.0)).names()

    def make_release(domains: Sequence[int]) -> ReleaseKernel:
        return ReleaseKernel(rank, topology.num_ranks, CPU, domains, calls_of)

    side = NvshmemSide(nvshmem, topology, session.exchange, make_release)
    session.use_device(side)
    errors, same, sizes = [], True, []
    sleep = random.Random(rank)
    with interpreting(Deadline(20.0)):
        for case_seed in (seed, seed + 1, seed):
            case = random_case(case_seed, ranks=topology.num_ranks)
            schedules = schedules_of(case)
            engines = [KernelEngine(schedule, rank, CPU, side.domains, None, calls_of) for schedule in schedules]
            program = f"p{case_seed}"
            session.load(program, schedules, engines if kernels else None)
            sizes.append(session.heap_bytes)
            ticket, first = torch.zeros(1, dtype=torch.int64), None
            for _ in range(calls):
                if rank == late:
                    time.sleep(0.2 * sleep.random())
                whole, ticket = attend_and_gather(case, rank, ticket, program)
                errors.append(float((whole.double() - case.expected).abs().max() / case.expected.abs().max()))
                first = whole if first is None else first
                same &= torch.equal(first, whole)
    return {"error": max(errors), "same": same, "domains": side.domains, "sizes": sizes, "names": shared_memory_names()}


def interpreted(rank: int, seed: int, calls: int) -> dict[str, Any]:
    """Attention of a random case by the interpreter's engine over shared memory, gathers by the executor."""
    session = session_of(timeout_s=10.0)
    case = random_case(seed, ranks=session.topology.num_ranks)
    schedules = schedules_of(case)
    with session.guard():
        session.load("p", schedules, [InterpreterEngine(schedules[0], rank), None])
    ticket, errors, outs = torch.zeros(1, dtype=torch.int64), [], []
    for _ in range(calls):
        whole, ticket = attend_and_gather(case, rank, ticket)
        errors.append(float((whole.double() - case.expected).abs().max() / case.expected.abs().max()))
        outs.append(whole)
    same = all(torch.equal(outs[0], out) for out in outs)
    return {"error": max(errors), "same": same, "names": shared_memory_names()}


def sleeps(rank: int, sleeper: int) -> None:
    """One rank does not send its part."""
    session = session_of(timeout_s=2.0)
    case = random_case(3, ranks=2)
    schedules = schedules_of(case)
    session.load("p", schedules, [InterpreterEngine(schedules[0], rank), None])
    if rank == sleeper:
        time.sleep(6.0)
    else:
        attend_and_gather(case, rank, torch.zeros(1, dtype=torch.int64))
