"""What schedules compute: random sites on threads, random delays, against fp64 in one process."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from by_hand import by_hand
from random_sites import Case, every_case, gather_site, random_case, reference, rows
from rank_workers import attend_and_gather, schedules_of
from threads import run_threads
from wire_bounds import attention_off

from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.errors import PeerDiedError, RuntimeTimeoutError
from sfcompile.options import AS_IT_IS, Wire
from sfcompile.runtime.program.instructions import Forward, Push, Put, RankProgram
from sfcompile.runtime.program.intervals import Runs
from sfcompile.runtime.program.sites import AttentionSite, ExchangeSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.engine import KernelAccess
from sfcompile.runtime.rank.executor import SiteRun
from sfcompile.runtime.rank.session import current_session
from sfcompile.runtime.rank.site_call import SiteCall
from sfcompile.runtime.wires.direct import DirectTransport
from sfcompile.runtime.wires.symmetric_heap import HeapSize, local_segment
from sfcompile.runtime.wires.transport import word_of

sf = torch.ops.streamfusion
CALLS = 3


def jitter(seed: int) -> Callable[[int], None]:
    rng = random.Random(seed)

    def delay(rank: int) -> None:
        if rng.random() < 0.2:
            time.sleep(rng.random() * 2e-3)

    return delay


def run(case: Case, schedules: list[Schedule], seed: int = 0, timeout_s: float = 30.0) -> list[torch.Tensor]:
    """Every rank's outputs of every call."""

    def work(rank: int) -> list[torch.Tensor]:
        session = current_session()
        session.load("p", schedules)
        ticket, outs = torch.zeros(1, dtype=torch.int64), []
        for _ in range(CALLS):
            out, ticket = attend_and_gather(case, rank, ticket)
            outs.append(out)
        assert session.blocked_s["p", 0] >= 0.0
        return outs

    return [
        out for outs in run_threads(case.mesh.num_ranks, work, delay=jitter(seed), timeout_s=timeout_s) for out in outs
    ]


@pytest.mark.parametrize("seed", range(60))
def test_attention_and_gather(seed: int) -> None:
    """fp32 within 1e-5 of the output's scale; the same bits on every rank and in every call."""
    case = random_case(seed)
    outs = run(case, schedules_of(case), seed)
    scale = max(1.0, float(case.expected.abs().max()))
    for out in outs:
        assert torch.equal(out, outs[0])
    assert float((outs[0].double() - case.expected).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("ranks", [8, 9, 12, 16])
@pytest.mark.parametrize("seed", range(3))
def test_up_to_sixteen_ranks(ranks: int, seed: int) -> None:
    case = random_case(100 * ranks + seed, ranks=ranks)
    outs = run(case, schedules_of(case), seed, timeout_s=60.0)
    scale = max(1.0, float(case.expected.abs().max()))
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert float((outs[0].double() - case.expected).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("seed", [1, 4, 8])
def test_other_dtypes(dtype: torch.dtype, seed: int) -> None:
    case = random_case(seed, dtype)
    out = run(case, schedules_of(case))[0]
    assert out.dtype == dtype
    mask = case.mask.to(dtype) if case.mask is not None and case.mask.is_floating_point() else case.mask
    one = torch.nn.functional.scaled_dot_product_attention(
        case.q, case.k, case.v, mask, is_causal=case.site.causal, scale=case.site.scale, enable_gqa=True
    ).nan_to_num(0.0)
    own = float((one.double() - case.expected).abs().max())
    rounding = torch.finfo(dtype).eps * max(1.0, float(case.expected.abs().max()))
    assert float((out.double() - case.expected).abs().max()) <= 1.2 * own + rounding


WIRES = {
    "fp8": Wire(*["fp8"] * 4),
    "bf16": Wire(*["bf16"] * 4),
    "kv fp8, qo bf16": Wire(k="fp8", v="fp8", q="bf16", o="bf16"),
    "v fp8": Wire(v="fp8"),
}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("seed", range(12))
def test_wires_stay_within_their_bounds(wire: str, seed: int) -> None:
    """Every schedule, mask and cut; the same bits on every rank and in every call."""
    case = random_case(seed)
    case = replace(case, site=replace(case.site, wire=WIRES[wire]))
    outs = run(case, schedules_of(case), seed)
    assert all(torch.equal(out, outs[0]) for out in outs)
    slack = 1e-5 * max(1.0, float(case.expected.abs().max()))
    assert bool(((outs[0].double() - case.expected).abs() <= attention_off(case) + slack).all())


@pytest.mark.parametrize(("wire", "most"), [("fp8", 0.06), ("bf16", 0.006), ("kv fp8, qo bf16", 0.06)])
@pytest.mark.parametrize("kind", ["torus", "usp", "allgather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wires_round_as_much_as_their_types_do(wire: str, most: float, kind: str, dtype: torch.dtype) -> None:
    """In the mean far less than the bound; and more than nothing, so it is those types that travel."""
    case = next(case for case in every_case(4) if case.kind == kind)
    one, site = case.expected, replace(case.site, dtype=dtype)
    case = replace(case, site=site, q=case.q.to(dtype), k=case.k.to(dtype), v=case.v.to(dtype))
    case = replace(case, expected=reference(case.q, case.k, case.v, case.mask, False, site.scale))

    def error(wire: Wire) -> float:
        this = replace(case, site=replace(site, wire=wire))
        out = run(this, schedules_of(this))
        return float((out[0].double() - case.expected).square().mean().sqrt() / one.square().mean().sqrt())

    plain, coded = error(AS_IT_IS), error(WIRES[wire])
    assert plain < 0.005 and coded <= most
    assert coded > 5 * plain or (wire == "bf16" and dtype == torch.bfloat16)


def test_what_does_not_travel_is_exact() -> None:
    """Queries that may see their own rank's keys only, which a ring leaves where they are: the same bits."""
    case = next(case for case in every_case(4) if case.kind == "usp" and case.mesh.ulysses == 1)
    owner = torch.empty(23, dtype=torch.int64)
    for rank, runs in enumerate(case.site.q_positions):
        owner[rows(runs)] = rank
    case = replace(case, mask=(owner[:, None] == owner[None, :])[None, None])
    plain = run(case, schedules_of(case))[0]
    for wire in WIRES.values():
        coded = replace(case, site=replace(case.site, wire=wire))
        assert torch.equal(run(coded, schedules_of(coded))[0], plain)
    everywhere = replace(coded, mask=torch.ones(1, 1, 23, 23, dtype=torch.bool))
    assert not torch.equal(run(everywhere, schedules_of(everywhere))[0], plain)


@pytest.mark.parametrize("hides", [-1e9, torch.finfo(torch.float32).min])
def test_rows_that_a_mask_hides_as_a_whole_weigh_keys_alike(hides: float) -> None:
    """Whatever chunks their keys come in; as a softmax of rounded scores does."""
    for case in every_case(3):
        shape = case.q.shape[2], case.k.shape[2]
        mask = torch.where(torch.rand(shape) < 0.6, 0.0, hides)
        mask[2:15] = hides
        case = replace(case, mask=mask[None, None], site=replace(case.site, causal=False))
        want = torch.nn.functional.scaled_dot_product_attention(
            case.q, case.k, case.v, mask, scale=case.site.scale, enable_gqa=True
        )
        out = run(case, schedules_of(case))[0]
        assert float((out - want).abs().max()) <= 1e-5 * max(1.0, float(want.abs().max())), case.kind


def test_a_gather_of_a_folded_dim() -> None:
    """Tokens inside a dim that is outer x tokens x inner, owned in runs, one rank without any."""
    owners = (((0, 2), (5, 1)), (), ((2, 3),))
    site = ExchangeSite.gather("g", (2, 3 * 6 * 2, 4), torch.float32, 1, owners, 3, 2)
    whole = torch.randn(site.shape)
    schedule = build_exchange(site, Mesh.of(Topology.grid(1, 3), 1, 3))

    def work(rank: int) -> torch.Tensor:
        current_session().load("g", [schedule])
        own = whole.view(2, 3, 6, 2, 4)[:, :, rows(owners[rank])].reshape(site.local_shape(rank))
        ticket = sf.exchange_start(own, torch.zeros(1, dtype=torch.int64), "g", 0)
        return sf.exchange_finish(ticket, "g", 0, list(site.shape), torch.float32)[0]

    assert all(torch.equal(out, whole) for out in run_threads(3, work, delay=jitter(1)))


class Hurried:
    """A kernel that waits for nothing: no query of its rank sees what comes."""

    bank_bytes, own_at, sends = 1 << 16, dict.fromkeys("qkv", 1 << 15), ()

    def run(self, out: torch.Tensor, access: KernelAccess, epoch: int, mask: torch.Tensor | None) -> None:
        """Has attended."""


def test_a_chunk_that_a_kernel_did_not_wait_for_is_waited_for() -> None:
    """It is late, and no chunk of another call; this rank's bank is not given away before it has come."""
    runs: tuple[Runs, ...] = (((0, 3),), ((3, 2),))
    site = AttentionSite("site", 1, 2, 2, 4, 4, torch.float32, runs, runs, 1.0, causal=True)
    schedule = build("ring", site, Mesh.of(Topology.grid(1, 2), 1, 2))
    size = HeapSize(len(schedule.slots), Hurried.bank_bytes)
    segments = [local_segment(size) for _ in range(2)]
    wires = [DirectTransport(rank, segments, 10.0) for rank in range(2)]
    calls = [
        SiteRun(SiteCall(rank, 0, 0, schedule, 1), segments[rank], wires[rank],
                (Hurried(), KernelAccess((0, 1), segments, wires[rank])))
        for rank in range(2)
    ]  # fmt: skip
    late = threading.Timer(0.2, lambda: [calls[1].put(f"put_{name}", torch.ones(1, 2, 2, 4)) for name in "qkv"])
    late.start()
    calls[0].attend(None)
    assert segments[0].signals[1].tolist() == [word_of(1, 0)] * len(schedule.slots)
    late.join()


def test_two_sites_at_once() -> None:
    """The puts of the next attention before the end of the last, as the compiler orders them."""
    first = random_case(2, ranks=4)
    second = random_case(3, ranks=4)
    schedules = [schedules_of(first)[0], schedules_of(second)[0]]
    cases = (first, second)

    def puts(rank: int, site: int, ticket: torch.Tensor) -> torch.Tensor:
        q, k, v = cases[site].shard(rank)
        for op, tensor in ((sf.put_v, v), (sf.put_q, q), (sf.put_k, k)):
            ticket = op(tensor, ticket, "p", site)
        return ticket

    def work(rank: int) -> float:
        current_session().load("p", schedules)
        ticket = puts(rank, 0, torch.zeros(1, dtype=torch.int64))
        worst = 0.0
        for call in range(6):
            site = call % 2
            ticket = puts(rank, 1 - site, ticket)
            case = cases[site]
            ticket = sf.attend(ticket, case.mask, "p", site)
            own = case.expected[:, :, rows(case.site.q_positions[rank])]
            out, ticket = sf.collect(ticket, "p", site, list(own.shape), torch.float32)
            worst = max(worst, float((out.double() - own).abs().max()) if own.numel() else 0.0)
        return worst

    assert max(run_threads(4, work, delay=jitter(3))) < 1e-5


@pytest.mark.parametrize("kind", [Put, Forward, Push])
def test_a_lost_signal_is_a_timeout_not_a_hang(kind: type) -> None:
    case = random_case(7, ranks=4)
    site = replace(case.site, causal=False, mask=None, heads=4, kv_heads=4)
    case.mask, case.q, case.k, case.v = None, *(torch.randn(site.batch, 4, n, d) for n, d in (
        (case.q.shape[2], site.head_dim), (case.k.shape[2], site.head_dim), (case.k.shape[2], site.v_head_dim)
    ))  # fmt: skip
    case.site, case.mesh, case.kind, case.parts = site, Mesh.of(Topology.grid(2, 2), 2, 2), "torus", (1, 1)
    case.expected = reference(case.q, case.k, case.v, None, False, site.scale)
    attention, gather = schedules_of(case)

    def build(rank: int) -> RankProgram:
        program = attention.program(rank)
        if rank:
            return program
        phases = {name: list(steps) for name, steps in program.phases.items()}
        for steps in phases.values():
            lost = next((step for step in steps if isinstance(step, kind)), None)
            if lost is not None:
                steps.remove(lost)
                break
        return replace(program, phases={name: tuple(steps) for name, steps in phases.items()})

    broken = by_hand(attention, build)
    with pytest.raises(RuntimeTimeoutError, match="waited 0.5 s for (a chunk|its bank to be free)"):
        run(case, [broken, gather], timeout_s=0.5)


def test_flops_are_this_ranks_own() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    case = random_case(5, ranks=4)
    site = replace(case.site, q_positions=case.site.q_positions)

    def work(rank: int) -> int:
        current_session().load("p", schedules_of(case))
        with FlopCounterMode(display=False) as counter:
            attend_and_gather(case, rank, torch.zeros(1, dtype=torch.int64))
        return counter.get_total_flops()

    # FlopCounterMode is per thread; its total is what the registered formula gives.
    total = sum(run_threads(4, work))
    pairs = case.q.shape[2] * case.k.shape[2]
    assert total == 2 * site.batch * site.heads * pairs * (site.head_dim + site.v_head_dim)


def test_a_gather_needs_every_rank() -> None:
    schedule = build_exchange(gather_site(3), Mesh.of(Topology.grid(1, 3), 1, 3))

    def work(rank: int) -> None:
        current_session().load("g", [schedule])
        if rank == 2:
            return
        x = torch.zeros(gather_site(3).local_shape(rank))
        ticket = sf.exchange_start(x, torch.zeros(1, dtype=torch.int64), "g", 0)
        sf.exchange_finish(ticket, "g", 0, [2, 10, 3], torch.float32)

    with pytest.raises((RuntimeTimeoutError, PeerDiedError), match="from rank 2|rank 2 has left the job"):
        run_threads(3, work, timeout_s=0.5)
