"""What rank processes of the runtime's tests run: importable by name, so that a fresh process finds it."""

from __future__ import annotations

import ctypes
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import torch
from random_sites import Case, attention_site, every_case, gather_site, random_case
from wire_bounds import attention_off

from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.schedule.torus import build_torus
from sfcompile.errors import HeapError, MeshError
from sfcompile.options import Wire
from sfcompile.runtime.program.sites import ExchangeSite
from sfcompile.runtime.rank import ops
from sfcompile.runtime.rank.process_group import ProcessWorld
from sfcompile.runtime.rank.session import Session, get_session
from sfcompile.runtime.wires import handshake, tcp_links

sf = torch.ops.streamfusion
WIRES = (Wire(*["fp8"] * 4), Wire(k="fp8", v="fp8", q="bf16", o="bf16"), Wire(*["bf16"] * 4))
assert ops.COMMUNICATION


def session_of(transport: str = "auto", timeout_s: float = 20.0) -> Session:
    """The session of this process."""
    return get_session(lambda: ProcessWorld(transport, timeout_s))


def schedules_of(case: Case) -> list[Schedule]:
    """The attention of a case, and the gather of its output."""
    site = case.site
    gather = ExchangeSite.gather("out", tuple(case.expected.shape), site.dtype, 2, site.q_positions)
    return [case.schedule(), build_exchange(gather, case.mesh)]


def attend_and_gather(
    case: Case, rank: int, ticket: torch.Tensor, program: str = "p"
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call of both sites; the whole output."""
    q, k, v = case.shard(rank)
    ticket = sf.put_k(k, ticket, program, 0)
    ticket = sf.put_q(q, ticket, program, 0)
    ticket = sf.put_v(v, ticket, program, 0)
    ticket = sf.attend(ticket, case.mask, program, 0, held=[q, k, v])
    out, ticket = sf.collect(ticket, program, 0, [*q.shape[:3], v.shape[3]], case.site.dtype)
    ticket = sf.exchange_start(out, ticket, program, 1)
    whole, ticket = sf.exchange_finish(ticket, program, 1, list(case.expected.shape), case.site.dtype, held=[out])
    return whole, ticket


def shared_memory_names() -> list[str]:
    """Names of ours in /dev/shm; there must be none at any time."""
    return sorted(path.name for path in Path("/dev/shm").glob("sfcompile-*"))


def attention(rank: int, seed: int, transport: str, calls: int) -> dict[str, Any]:
    """A random case, several times: largest error against fp64, whether repeats are bitwise equal, what it took."""
    case = random_case(seed, ranks=int(os.environ["WORLD_SIZE"]))
    session = session_of(transport)
    session.load("p", schedules_of(case))
    ticket = torch.zeros(1, dtype=torch.int64)
    outs = []
    for _ in range(calls):
        whole, ticket = attend_and_gather(case, rank, ticket)
        outs.append(whole)
    return {
        "error": max(float((out.double() - case.expected).abs().max()) for out in outs),
        "same": all(torch.equal(outs[0], out) for out in outs),
        "names": shared_memory_names(),
        "machines": session.topology.machine_of,
        "heap_bytes": session.heap_bytes,
    }


def without_connections(rank: int, seed: int) -> dict[str, Any]:
    """As :func:`attention`, where one rank finds no address to listen at."""

    def no_address() -> str:
        raise OSError("no such interface")

    if rank == 1:
        tcp_links.own_address = no_address
    found = attention(rank, seed, "auto", 2)
    found["wires"] = type(session_of().side._wires.transport._messages).__name__  # type: ignore[attr-defined]
    return found


def traced(rank: int, folder: str, environment: bool) -> str:
    """Two steps under a trace; what rank 0's table says (through the environment: once both ranks are at their end)."""
    import sfcompile
    from sfcompile.tracing import trace as tracing

    session, case = session_of(), random_case(21, ranks=2)
    session.load("p", schedules_of(case))

    def steps() -> None:
        ticket = torch.zeros(1, dtype=torch.int64)
        for _ in range(2):
            ticket = attend_and_gather(case, rank, ticket)[1]

    if not environment:
        steps()  # before the trace: not in it
        with sfcompile.trace(folder) as found:
            steps()
        return "" if found.report is None else str(found.report)
    os.environ[tracing.VARIABLE] = folder
    tracing.follow_environment()
    steps()
    tracing.at_exit(Path(folder))
    return ""


def every_schedule(rank: int, transport: str, delayed: bool) -> dict[str, float]:
    """Every builder, every mesh of these ranks, cut and whole, heads and tokens that rarely divide: errors by name.

    Each also with a wire: then it is by how much the bound is exceeded, or infinity where nothing was rounded at all.
    """
    ranks = int(os.environ["WORLD_SIZE"])
    session, ticket, rng = session_of(transport), torch.zeros(1, dtype=torch.int64), random.Random(rank)
    errors: dict[str, float] = {}
    for case in every_case(ranks):
        name = f"{case.kind} {case.mesh.ulysses}x{case.mesh.ring} by {case.mesh.lanes}, {case.parts} parts"
        session.load(name, schedules_of(case))
        for _ in range(3):
            if delayed:
                time.sleep(rng.random() * 5e-3)
            whole, ticket = attend_and_gather(case, rank, ticket, name)
            errors[name] = max(errors.get(name, 0.0), float((whole.double() - case.expected).abs().max()))
        name += f", {WIRES[len(errors) % len(WIRES)]}"
        case = replace(case, site=replace(case.site, wire=WIRES[len(errors) % len(WIRES)]))
        session.load(name, schedules_of(case))
        for _ in range(3):
            whole, ticket = attend_and_gather(case, rank, ticket, name)
            off = (whole.double() - case.expected).abs()
            over = float((off - attention_off(case)).max()) if float(off.max()) > 1e-4 else float("inf")
            errors[name] = max(errors.get(name, 0.0), over)
    return errors


def growing(rank: int) -> list[float]:
    """Programs that need ever larger heaps, calls of old ones in between."""
    session, ticket, errors = session_of(), torch.zeros(1, dtype=torch.int64), []
    cases = [random_case(seed, ranks=2) for seed in (1, 2, 3)]
    for i, case in enumerate(cases):
        session.load(f"p{i}", schedules_of(case))
        for j in range(i + 1):
            whole, ticket = attend_and_gather(cases[j], rank, ticket, f"p{j}")
            errors.append(float((whole.double() - cases[j].expected).abs().max()))
    return errors


def one_dies(rank: int, transport: str, victim: int, how: str) -> None:
    """After a good call, one rank is killed, raises, or sleeps; the others are in the next call."""
    case = random_case(5, ranks=int(os.environ["WORLD_SIZE"]))
    session = session_of(transport, timeout_s=2.0 if how == "sleep" else 30.0)
    session.load("p", schedules_of(case))
    ticket = torch.zeros(1, dtype=torch.int64)
    _, ticket = attend_and_gather(case, rank, ticket)
    if rank == victim:
        time.sleep(0.3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "sleep":
            time.sleep(4)
            return
        with session.guard():
            raise ValueError("the victim's own mistake")
    for _ in range(3):
        _, ticket = attend_and_gather(case, rank, ticket)


def fails_and_lingers(rank: int) -> None:
    """Rank 1 fails, catches its error and lives on; rank 0 must not wait for its end."""
    case = random_case(5, ranks=2)
    session = session_of("auto", timeout_s=30.0)
    session.load("p", schedules_of(case))
    ticket = torch.zeros(1, dtype=torch.int64)
    if rank == 1:
        try:
            with session.guard():
                raise ValueError("caught by the user")
        except ValueError:
            time.sleep(3)
            return
    attend_and_gather(case, rank, ticket)


def disagree(rank: int) -> None:
    """Rank 1 has another input shape."""
    session_of().agree(f"graph {rank}", {"graph": "12 nodes", "input x": f"float32[2, {64 + rank}]"})


def one_does_not_compile(rank: int) -> None:
    """Rank 2 never comes to the agreement. Rank 0, which serves the store, ends after the others had time to look."""
    session = session_of(timeout_s=2.0)
    if rank == 2:
        time.sleep(8)
        return
    try:
        session.agree("graph", {"graph": "12 nodes"})
    finally:
        time.sleep(3 if rank == 0 else 0)


def heap_does_not_fit(rank: int) -> None:
    """More than any /dev/shm, on rank 1 only in effect: both must say so."""
    site = attention_site(2, heads=2, tokens=2**34, head_dim=64)
    session_of().load("huge", [build_torus(site, Mesh.of(session_of().topology, 2, 1))])


def goes_on_without_the_huge_one(rank: int) -> float:
    """A heap that does not fit, and then the program from before."""
    session = session_of()
    case, ticket = random_case(5, ranks=2), torch.zeros(1, dtype=torch.int64)
    session.load("p", schedules_of(case))
    _, ticket = attend_and_gather(case, rank, ticket)
    try:
        with session.guard():
            heap_does_not_fit(rank)
    except HeapError:
        whole, _ = attend_and_gather(case, rank, ticket)
        return float((whole.double() - case.expected).abs().max())
    raise AssertionError("a heap of terabytes was made")


def with_secrets(rank: int, secrets: Sequence[str]) -> dict[str, Any]:
    """Ranks that were given these secrets."""
    os.environ[handshake.SECRET] = secrets[rank]
    return attention(rank, 4, "auto", 2)


def own_shm(rank: int, sizes: Sequence[str]) -> dict[str, Any]:
    """Every rank with a /dev/shm of its own, as containers have; root only."""
    new_mounts = 0x00020000  # CLONE_NEWNS
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sizes[rank]}", "tmpfs", "/dev/shm"], check=True)
    return attention(rank, 3, "shm", 2)


def recovers(rank: int) -> float:
    """Both ranks fail in the same way while compiling, then compile something else."""
    session = session_of()
    case, ticket = random_case(5, ranks=2), torch.zeros(1, dtype=torch.int64)
    session.load("p", schedules_of(case))
    attend_and_gather(case, rank, ticket)
    try:
        with session.guard():
            raise ValueError("strict=True refused the graph")
    except ValueError:
        pass
    session.agree("second", {"graph": "2 nodes"})
    session.load("q", schedules_of(case))
    time.sleep(0.4 * rank)  # the other one waits long enough to look at the notices
    whole, _ = attend_and_gather(case, rank, ticket, "q")
    return float((whole.double() - case.expected).abs().max())


def goes_on(rank: int) -> float:
    """Planning fails on every rank alike; what was compiled before runs as it did."""
    session = session_of()
    case, ticket = random_case(5, ranks=2), torch.zeros(1, dtype=torch.int64)
    session.load("p", schedules_of(case))

    def plan() -> None:
        raise MeshError("no mesh of these ranks is of that kind")

    worst = 0.0
    for _ in range(3):
        whole, _ = attend_and_gather(case, rank, ticket)
        worst = max(worst, float((whole.double() - case.expected).abs().max()))
        try:
            with session.guard():
                session.from_first(plan)
        except MeshError:
            continue
        raise AssertionError("planning did not fail")
    return worst


def through_inductor(rank: int) -> dict[str, Any]:
    """A small graph with communication in the middle, compiled by Inductor."""
    from torch._inductor.compile_fx import compile_fx

    session = session_of()
    site = attention_site(2, heads=4, tokens=24)
    mesh = Mesh.of(session.topology, 2, 1)
    gather = ExchangeSite.gather("out", (1, 4, 24, 8), torch.float32, 2, site.q_positions)
    session.load("p", [build_torus(site, mesh), build_exchange(gather, mesh)])

    def local(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ticket = torch.zeros(1, dtype=torch.int64)
        q = (x.sin() * 2).view(1, 12, 4, 8).transpose(1, 2)
        ticket = sf.put_q(q, ticket, "p", 0)
        k = y.cos().view(1, 12, 4, 8).transpose(1, 2)
        ticket = sf.put_k(k, ticket, "p", 0)
        v = (y + x).view(1, 12, 4, 8).transpose(1, 2)
        ticket = sf.put_v(v, ticket, "p", 0)
        ticket = sf.attend(ticket, None, "p", 0)
        out, ticket = sf.collect(ticket, "p", 0, [1, 4, 12, 8], torch.float32)
        ticket = sf.exchange_start(out * 0.5, ticket, "p", 1)
        whole, ticket = sf.exchange_finish(ticket, "p", 1, [1, 4, 24, 8], torch.float32)
        return whole + 1

    torch.manual_seed(0)
    x, y = torch.randn(1, 24, 32), torch.randn(1, 24, 32)
    mine = slice(12 * rank, 12 * rank + 12)
    from torch.fx.experimental.proxy_tensor import make_fx

    arguments = (x[:, mine].contiguous(), y[:, mine].contiguous())
    with torch.no_grad():
        graph = make_fx(local, tracing_mode="fake")(*arguments)
        compiled = compile_fx(graph, list(arguments))
        first = compiled(*arguments)
        with torch.inference_mode():
            second = compiled(*arguments)
        split = [t.view(1, 24, 4, 8).transpose(1, 2).double() for t in (x.sin() * 2, y.cos(), x + y)]
        expected = torch.nn.functional.scaled_dot_product_attention(*split) * 0.5 + 1
    got = [out[0] if isinstance(out, (list, tuple)) else out for out in (first, second)]
    return {"errors": [float((out.double() - expected).abs().max()) for out in got]}


def gathers(rank: int, calls: int) -> float:
    """Seconds per all-gather of a small value: the price of a wait."""
    session = session_of()
    ranks = session.topology.num_ranks
    session.load("g", [build_exchange(gather_site(ranks), Mesh.of(session.topology, 1, ranks))])
    ticket, x = torch.zeros(1, dtype=torch.int64), torch.randn(gather_site(ranks).local_shape(rank))
    start = time.perf_counter()
    for _ in range(calls):
        ticket = sf.exchange_start(x, ticket, "g", 0)
        _, ticket = sf.exchange_finish(ticket, "g", 0, [2, 10, 3], torch.float32)
    return (time.perf_counter() - start) / calls


def environment(rank: int) -> tuple[str, ...]:
    """What torchrun would have set."""
    return tuple(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"))


def divides(rank: int) -> float:
    """Rank 1 cannot."""
    return 1 / (1 - rank)


def hangs(rank: int) -> None:
    """Rank 1 never returns."""
    time.sleep(1000 * rank)


def script(rank: int, path: str) -> None:
    """A program, as python would run it."""
    sys.argv = [path]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def program(rank: int, path: str, args: Sequence[str], folder: str) -> None:
    """A program with arguments; it leaves its process id in a folder, for signals."""
    Path(folder, f"{rank}.pid").write_text(str(os.getpid()))
    sys.argv = [path, *args]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def imported_by(rank: int) -> tuple[int, int]:
    """The process that imported the processes' module, and this one."""
    return processes.IMPORTED_BY, os.getpid()


class Private(Exception):
    """Pickle makes it anew from one argument, and fails."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"of two arguments: {first}, {second}")


def raises_what_cannot_travel(rank: int) -> None:
    """After it wrote something."""
    print("on the way")
    raise Private("a", "b")
