"""GPU ranks without GPUs: the session's device side over emulated NVSHMEM, kernels in Triton's interpreter."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deadline import Deadline
from emulated_nvshmem import DeviceCalls, Library
from random_sites import Case, random_case
from rank_workers import attend_and_gather, schedules_of, session_of, shared_memory_names
from torch import fx
from torch.nn import functional as F
from wire_bounds import attention_off

from sfcompile.capture.graph import capture
from sfcompile.codegen.engines.cpu_engine import InterpreterEngine
from sfcompile.codegen.engines.device_engine import KernelEngine
from sfcompile.codegen.engines.launch import mask_kind
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.engines.transfers import ReleaseKernel, WaitKernel
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.toolchain.device_state import leave_device_state
from sfcompile.codegen.toolchain.interpreter import interpreting
from sfcompile.errors import StreamFusionError
from sfcompile.measuring.quick import measure_quickly
from sfcompile.options import AS_IT_IS, Wire
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import Asked, ShardedWeights, State
from sfcompile.runtime.gpu.device_side import NvshmemSide
from sfcompile.runtime.gpu.message_side import MessageSide
from sfcompile.runtime.gpu.nvshmem import Nvshmem
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.program.weight_rows import WeightRows
from sfcompile.runtime.rank.session import Session
from sfcompile.runtime.wires.c10d import PairedTransport

CPU = torch.device("cpu")


def _side_of(session: Session, rank: int, timeout_s: float = 20.0) -> tuple[NvshmemSide, KernelTarget]:
    """The session on an emulated GPU, and where its kernels run."""
    topology = session.topology
    library = Library(rank, lambda: session.exchange(None, "meet"), lambda pe: topology.same_machine(rank, pe))
    nvshmem = Nvshmem(rank, topology.num_ranks, CPU, session.exchange, (library, library))
    target = KernelTarget(CPU, calls=DeviceCalls(library.address_of).names())

    def make_kernels(domains: Sequence[int]) -> tuple[ReleaseKernel, WaitKernel]:
        return ReleaseKernel(rank, topology.num_ranks, target, domains), WaitKernel(rank, target)

    side = NvshmemSide(
        nvshmem, topology, session.exchange, make_kernels, timeout_s, session.trouble, leave_device_state
    )
    session.use_side(side)
    return side, target


def _engines(
    case: Case, schedules: Sequence[Schedule], rank: int, target: KernelTarget, side: NvshmemSide
) -> list[KernelEngine]:
    masks = [mask_kind(case.mask)]
    return [KernelEngine(schedule, rank, target, side.domains, masks) for schedule in schedules]


def run(rank: int, seed: int, kernels: bool, calls: int, late: int = -1) -> dict[str, Any]:
    """Attention and gather of a random case, several times, then of a larger one (the heap grows), then again.

    Args:
        kernels: generated kernels; else the executor over NVSHMEM's host calls.
        late: a rank that sleeps before its calls.
    """
    session = session_of()
    topology = session.topology
    side, target = _side_of(session, rank)
    errors, same, sizes = [], True, []
    sleep = random.Random(rank)
    with interpreting(Deadline(20.0)):
        for case_seed in (seed, seed + 1, seed):
            case = random_case(case_seed, ranks=topology.num_ranks)
            schedules = schedules_of(case)
            engines = _engines(case, schedules, rank, target, side)
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


def over_messages(rank: int, seed: int, calls: int) -> dict[str, Any]:
    """The side of GPU ranks that reach no memory of others, with gloo's messages matched by order alone, as NCCL's."""
    session = session_of()
    group = dist.new_group(backend="gloo")
    status = DeviceStatus(rank, CPU, 20.0)
    messages = PairedTransport(rank, group, 20.0, lambda: None, status.words)
    session.use_side(MessageSide(rank, session.topology, CPU, status, messages, session.trouble))
    case, outs = random_case(seed, ranks=session.topology.num_ranks), []
    session.load("p", schedules_of(case))
    sleep = random.Random(rank)
    for _ in range(calls):
        time.sleep(0.05 * sleep.random())
        with session.call("model", []):
            outs.append(attend_and_gather(case, rank, torch.zeros(1, dtype=torch.int64))[0])
    errors = [float((out.double() - case.expected).abs().max() / case.expected.abs().max()) for out in outs]
    return {"error": max(errors), "same": all(torch.equal(outs[0], out) for out in outs)}


def beside_replays(rank: int) -> dict[str, Any]:
    """A model by kernels, whose calls after the first are replayed, and one that the host runs, in turns on one heap;
    at the end the heap grows.

    What a host knows of a replay: nothing. Its counts are set back, as the device goes on.
    """
    session, errors, behind = session_of(), list[float](), list[int]()
    side, target = _side_of(session, rank)
    cases = {str(seed): random_case(seed, ranks=session.topology.num_ranks) for seed in (5, 6, 7)}

    def call(name: str) -> None:
        with session.call(name, []):
            out, _ = attend_and_gather(cases[name], rank, torch.zeros(1, dtype=torch.int64), name)
        want = cases[name].expected
        errors.append(float((out.double() - want).abs().max() / want.abs().max()))

    with interpreting(Deadline(20.0)):
        schedules = {name: schedules_of(case) for name, case in cases.items()}
        with torch.inference_mode():  # as a model is compiled at its first call; later ones may come outside of it
            session.load("5", schedules["5"], _engines(cases["5"], schedules["5"], rank, target, side))
            session.load("6", schedules["6"])
        for replayed in (False, True, True, True):
            assert side._runs is not None
            counted = session._opened
            call("5")
            side._runs.captured = True
            if replayed:
                session._opened = session._finished = counted
            behind.append(side._runs.opened() - session._opened)
            if len(behind) != 2:  # also two replays in a row
                call("6")
        counted = session._opened
        call("5")
        session._opened = session._finished = counted
        before = session.heap_bytes
        session.load("7", schedules["7"])
        for name in ("7", "5", "7"):
            call(name)
    return {"error": max(errors), "behind": max(behind), "grown": session.heap_bytes > before}


def without_room(rank: int, kernels: bool) -> tuple[list[str], float]:
    """A program that runs, one that the symmetric heap has no room for, the first one again: twice. What was said."""
    session, said, errors = session_of(), list[str](), list[float]()
    side, target = _side_of(session, rank)
    cases = [random_case(seed, ranks=session.topology.num_ranks) for seed in (5, 6)]
    small, large = (schedules_of(case) for case in cases)
    library: Any = side._nvshmem.core
    make = library.tensor

    def tensor(shape: tuple[int], dtype: torch.dtype) -> torch.Tensor:
        if shape[0] > most:
            raise RuntimeError("Status code 3")
        made: torch.Tensor = make(shape, dtype)
        return made

    def call() -> None:
        with session.call("model", []):
            out, _ = attend_and_gather(cases[0], rank, torch.zeros(1, dtype=torch.int64), "small")
        errors.append(float((out.double() - cases[0].expected).abs().max() / cases[0].expected.abs().max()))

    with interpreting(Deadline(20.0)):
        session.load("small", small, _engines(cases[0], small, rank, target, side) if kernels else None)
        call()
        most, library.tensor = session.heap_bytes, tensor
        for _ in range(2):
            try:
                with session.guard():
                    session.load("large", large, _engines(cases[1], large, rank, target, side) if kernels else None)
            except StreamFusionError as error:
                said.append(str(error))
            call()
    return said, max(errors)


def in_other_calls(rank: int, kernels: bool) -> tuple[float, str, str]:
    """A call that is the same on all ranks, one that is another on every rank, and one more.

    Returns:
        the first one's error, what the second said, and what the third.
    """
    session = session_of()
    side, target = _side_of(session, rank)
    case = random_case(5, ranks=session.topology.num_ranks)
    schedules, said = schedules_of(case), []
    with interpreting(Deadline(20.0)):
        engines = _engines(case, schedules, rank, target, side)
        session.load("p", schedules, engines if kernels else None)
        for name in ("model", f"model {rank}", "model"):
            try:
                with session.call(name, []):
                    whole, _ = attend_and_gather(case, rank, torch.zeros(1, dtype=torch.int64))
            except StreamFusionError as error:
                said.append(f"{type(error).__name__}: {error}")
    return float((whole.double() - case.expected).abs().max()), *said


def fused(rank: int) -> dict[str, Any]:
    """A joint attention with norms and RoPE, compiled for this rank with fused puts: twice, beside the whole graph."""
    torch.manual_seed(0)
    tables = (torch.randn(1, 14, 1, 16), torch.randn(1, 14, 1, 16))
    inputs = [torch.randn(1, 10, 32), torch.randn(1, 4, 32), *(torch.randn(32, 32) for _ in range(4))]
    inputs += [torch.randn(16), torch.randn(16), *tables]
    got = capture(fx.symbolic_trace(joint_attention), inputs)
    session = session_of()
    topology, ranks = session.topology, session.topology.num_ranks
    side, target = _side_of(session, rank)
    asked = Asked(shard_everything=True, split_batch=False, parts=(), kernels=True, fuse_puts=True, late_reads=True)
    state = State(got.gm, got.mode, topology, rank, asked)
    with torch.no_grad(), interpreting(Deadline(20.0)):
        compiled = run_pipeline(state)
        (program, schedules), = compiled.programs.items()  # fmt: skip
        engines = [KernelEngine(schedule, rank, target, side.domains) for schedule in schedules]
        session.load(program, schedules, engines)
        want, outs = got.gm(*inputs), [compiled.gm(*inputs) for _ in range(2)]
    errors = [float((out[0] - want[0]).abs().max() / want[0].abs().max()) for out in outs]
    return {"errors": errors, "fused": compiled.report.fused_puts, "order": compiled.order, "ranks": ranks}


def weights_in_shares(rank: int, kernels: bool) -> dict[str, Any]:
    """The joint attention with its projections in shares, gathered before they are read: three calls, between which
    every rank writes to its rows.

    Args:
        kernels: see :func:`run`.
    """
    torch.manual_seed(0)
    tables = (torch.randn(1, 14, 1, 16), torch.randn(1, 14, 1, 16))
    inputs = [torch.randn(1, 10, 32), torch.randn(1, 4, 32), *(torch.randn(32, 32) for _ in range(4))]
    inputs += [torch.randn(16), torch.randn(16), *tables]
    got, session, places = capture(fx.symbolic_trace(joint_attention), inputs), session_of(), (2, 3, 4, 5)
    side, target = _side_of(session, rank)
    weights = ShardedWeights(places, session.topology, rank)
    asked = Asked(
        shard_everything=True, split_batch=False, parts=(), kernels=kernels, fuse_puts=kernels, late_reads=True,
        weights=weights,
    )  # fmt: skip
    errors, own = [], list(inputs)
    with torch.no_grad(), interpreting(Deadline(20.0)):
        compiled = run_pipeline(State(got.gm, got.mode, session.topology, rank, asked))
        for program, schedules in compiled.programs.items():
            engines = [KernelEngine(schedule, rank, target, side.domains) for schedule in schedules]
            session.load(program, schedules, engines if kernels else None)
        for i in places:
            own[i] = inputs[i][slice(*WeightRows((32, 32), weights.cut).rows(rank))].clone()
        for _ in range(3):
            (want,) = got.gm(*inputs)
            with session.call("model", [], True, [own[i] for i in places]):
                (out,) = compiled.gm(*own)
            errors.append(float((out - want).abs().max() / want.abs().max()))
            for i in places:
                own[i].mul_(0.5)
                inputs[i] = inputs[i] * 0.5
    return {"error": max(errors), "programs": len(compiled.programs), "rows": own[2].shape[0]}


def joint_attention(
    image: torch.Tensor, text: torch.Tensor, to_q: torch.Tensor, to_k: torch.Tensor, add_q: torch.Tensor,
    add_k: torch.Tensor, norm_q: torch.Tensor, norm_k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Two heads of 16: text and image tokens, q and k normed and turned, V not even projected."""

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (2, 16))

    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x.unflatten(-1, (8, 2)).unbind(-1)
        return x * cos + torch.stack([-b, a], -1).flatten(3) * sin

    def both(of_text: torch.Tensor, of_image: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        parts = (F.linear(text, of_text), F.linear(image, of_image))
        return turned(torch.cat([F.rms_norm(heads(part), (16,), norm, 1e-6) for part in parts], 1)).transpose(1, 2)

    v = heads(torch.cat([text, image], 1)).transpose(1, 2)
    out = F.scaled_dot_product_attention(both(add_q, to_q, norm_q), both(add_k, to_k, norm_k), v)
    return out.transpose(1, 2).flatten(2)


def measured(rank: int) -> dict[str, float]:
    """The constants that ranks on emulated GPUs measure."""
    session = session_of()
    _side_of(session, rank)
    with interpreting(Deadline(20.0)):
        return measure_quickly(session, session.topology, torch.bfloat16).constants


def interpreted(rank: int, seed: int, calls: int, wire: Wire = AS_IT_IS) -> dict[str, Any]:
    """Attention of a random case by the interpreter's engine over shared memory, gathers by the executor.

    With a wire the error is by how much its bound is exceeded.
    """
    session = session_of(timeout_s=10.0)
    case = random_case(seed, ranks=session.topology.num_ranks)
    case = replace(case, site=replace(case.site, wire=wire))
    schedules = schedules_of(case)
    with session.guard():
        session.load("p", schedules, [InterpreterEngine(schedules[0], rank), None])
    ticket, errors, outs = torch.zeros(1, dtype=torch.int64), [], []
    for _ in range(calls):
        whole, ticket = attend_and_gather(case, rank, ticket)
        off = (whole.double() - case.expected).abs()
        assert wire == AS_IT_IS or float(off.max()) > 1e-3, "nothing was rounded"
        off -= attention_off(case)
        errors.append(float(off.max() / case.expected.abs().max()))
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


def graphs_out_of_order(rank: int) -> dict[str, Any]:
    """Graphs whose sites end in another order than they begin, or are open side by side: twice each."""
    session = session_of()
    side, target = _side_of(session, rank)
    errors, facts = {}, {"other order": False, "two gathers": False}
    torch.manual_seed(0)
    inputs = [torch.randn(1, 24, 32), *(torch.randn(32, 32) / 6 for _ in range(5))]
    for fn in (two_outputs, read_early, two_gathers, other_order):
        got = capture(fx.symbolic_trace(fn), inputs)
        asked = Asked(shard_everything=True, split_batch=False, parts=(), kernels=True, fuse_puts=True, late_reads=True)
        with torch.no_grad(), interpreting(Deadline(20.0)):
            compiled = run_pipeline(State(got.gm, got.mode, session.topology, rank, asked))
            (program, schedules), = compiled.programs.items()  # fmt: skip
            alike = [replace(schedule, site=replace(schedule.site, name="")) for schedule in schedules]
            shared = {schedule: KernelEngine(schedule, rank, target, side.domains) for schedule in alike}
            session.load(program, schedules, [shared[schedule] for schedule in alike])
            want = got.gm(*inputs)
            for _ in range(2):
                outs = compiled.gm(*inputs)
                for out, wanted in zip(outs, want, strict=True):
                    error = float((out - wanted).abs().max() / wanted.abs().max())
                    errors[fn.__name__] = max(error, errors.get(fn.__name__, 0.0))
        begun, open_sites = [], []
        for call in compiled.order:
            kind, site = call.split(".")[1], int(call.split(",")[1].strip(" ]"))
            if site not in begun:
                begun.append(site)
                open_sites.append(site)
                same = [other for other in open_sites[:-1] if alike[other] == alike[site]]
                facts["two gathers"] |= kind == "exchange_start" and bool(same)
            if kind in ("collect", "exchange_finish"):
                facts["other order"] |= open_sites[0] != site
                open_sites.remove(site)
    return {"errors": errors, **facts}


def _attended(x: torch.Tensor, to_q: torch.Tensor, to_k: torch.Tensor, to_v: torch.Tensor) -> torch.Tensor:
    q, k, v = ((x @ weight).unflatten(-1, (2, 16)).transpose(1, 2) for weight in (to_q, to_k, to_v))
    return F.scaled_dot_product_attention(q, k, v)


def _attention(x: torch.Tensor, to_q: torch.Tensor, to_k: torch.Tensor, to_v: torch.Tensor) -> torch.Tensor:
    return _attended(x, to_q, to_k, to_v).transpose(1, 2).flatten(2)


def two_outputs(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, e: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two gathers at the end."""
    out = _attention(x, a, b, c)
    return out @ d, torch.sin(out @ e)


def read_early(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, e: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """An output that nobody else reads, and whose gather may end late."""
    out = _attention(x, a, b, c)
    return out @ d, _attention(out, a, b, c) @ e


def two_gathers(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, e: torch.Tensor
) -> tuple[torch.Tensor]:
    """Two gathers of one geometry, for an op that needs all tokens of both."""
    out = _attention(x, a, b, c)
    one, two = out @ d, out @ e
    return (torch.fft.fft(one, dim=1).real + torch.fft.fft(two, dim=1).real,)


def other_order(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, e: torch.Tensor
) -> tuple[torch.Tensor]:
    """Two attentions beside each other; the second one's output is read first."""
    one, two = _attended(x, a, b, c), _attended(x, d, b, e)
    first_read = two.transpose(1, 2).flatten(2) @ d
    return (first_read + one.transpose(1, 2).flatten(2) @ e,)


def loses_a_peer(rank: int, victim: int, how: str, kernels: bool, told_in: Path) -> tuple[str, float]:
    """A call that is right, then one in which a rank is missing: killed, raising before its puts, or asleep.

    Args:
        kernels: see :func:`run`.
        told_in: a folder in which ranks say that they were told; one that sleeps does so until all others were.

    Returns:
        what the others were told, and after how many seconds.
    """
    session = session_of(timeout_s=60.0)
    side, target = _side_of(session, rank, timeout_s=3.0 if how == "asleep" else 60.0)
    case = random_case(5, ranks=session.topology.num_ranks)
    schedules = schedules_of(case)
    ticket = torch.zeros(1, dtype=torch.int64)
    with interpreting(lambda: time.sleep(0)):  # nothing but the kernels' own limit ends a wait
        with session.call("model", []):
            session.load("p", schedules, _engines(case, schedules, rank, target, side) if kernels else None)
            attend_and_gather(case, rank, ticket)
        began = time.perf_counter()
        if rank == victim and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == victim and how == "asleep":
            while len(list(told_in.iterdir())) < session.topology.num_ranks - 1:
                time.sleep(0.1)
            return "", 0.0
        try:
            with session.call("model", []):
                if rank == victim:
                    raise ValueError("the victim's own mistake")
                attend_and_gather(case, rank, ticket)
        except (StreamFusionError, ValueError) as error:
            took = time.perf_counter() - began
            (told_in / f"rank{rank}").touch()
            return f"{type(error).__name__}: {error}", took
    return "nothing", time.perf_counter() - began
