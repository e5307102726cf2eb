"""The ops: fakes, tracing, Inductor, modes."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import rank_workers
import torch
from processes import run_processes
from random_sites import attention_site, random_case
from rank_workers import attend_and_gather, schedules_of
from threads import run_threads
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.torus import build_torus
from sfcompile.errors import InternalError
from sfcompile.runtime.program.sites import ExchangeSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank import ops
from sfcompile.runtime.rank.session import Session, current_session

sf = torch.ops.streamfusion


def test_fakes_have_the_shapes() -> None:
    with FakeTensorMode():
        ticket = torch.zeros(1, dtype=torch.int64)
        x = torch.empty(2, 3, 5, 4, dtype=torch.bfloat16)
        for op in (sf.put_q, sf.put_k, sf.put_v, sf.exchange_start):
            assert op(x, ticket, "p", 0).shape == (1,)
        assert sf.put_fused([x, x[0]], ticket, "p", 0, "put_q", "key").shape == (1,)
        assert sf.attend(ticket, None, "p", 0).dtype == torch.int64
        assert sf.attend(ticket, torch.ones(1, dtype=torch.bool), "p", 0).dtype == torch.int64
        for op in (sf.collect, sf.exchange_finish):
            out, after = op(ticket, "p", 0, [2, 3, 7, 4], torch.bfloat16)
            assert out.shape == (2, 3, 7, 4) and out.dtype == torch.bfloat16 and after.shape == (1,)


def test_a_trace_keeps_every_op_in_its_order() -> None:
    def local(x: torch.Tensor, ticket: torch.Tensor) -> torch.Tensor:
        for put in (sf.put_k, sf.put_q, sf.put_v):
            ticket = put(x, ticket, "p", 0)
        ticket = sf.attend(ticket, None, "p", 0)
        out, ticket = sf.collect(ticket, "p", 0, [1, 2, 3, 4], torch.float32)
        ticket = sf.exchange_start(out, ticket, "p", 1)
        return sf.exchange_finish(ticket, "p", 1, [1, 2, 6, 4], torch.float32)[0]  # type: ignore[no-any-return]

    gm = make_fx(local, tracing_mode="fake")(torch.zeros(1, 2, 3, 4), torch.zeros(1, dtype=torch.int64))
    gm.graph.eliminate_dead_code()
    names = [str(node.target).split(".")[1] for node in gm.graph.nodes if str(node.target).startswith("streamfusion.")]
    assert names == ["put_k", "put_q", "put_v", "attend", "collect", "exchange_start", "exchange_finish"]
    assert len(ops.COMMUNICATION) == 9


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes(mode: type) -> None:
    case = random_case(5, ranks=3)

    def work(rank: int) -> float:
        with mode():
            current_session().load("p", schedules_of(case))
            whole, _ = attend_and_gather(case, rank, torch.zeros(1, dtype=torch.int64))
        return float((whole.double() - case.expected).abs().max())

    assert max(run_threads(3, work)) < 1e-5


def test_sites_count_from_where_the_caller_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, called for three pairs of sites of a program; another program's count from 0 as ever."""

    def work(rank: int) -> float:
        session, ticket = current_session(), torch.zeros(1, dtype=torch.int64)
        session.load("p", schedules * 3)
        session.load("other", schedules)
        error = 0.0
        for first in (0, 2, 4):
            with ops.sites_from({"p": first}):
                for program in ("p", "other"):
                    whole, ticket = attend_and_gather(case, rank, ticket, program)
                    error = max(error, float((whole.double() - case.expected).abs().max()))
        attend_and_gather(case, rank, ticket)
        counts = Counter(site for other, program, site in sites if (other, program) == (rank, "p"))
        assert set(counts) == set(range(6)) and counts[0] == counts[1] == 2 * counts[2], "inside of the with only"
        return error

    case = random_case(5, ranks=2)
    schedules, sites = schedules_of(case), []
    finish = Session._finish
    monkeypatch.setattr(Session, "_finish", lambda self, *site: (sites.append((self.rank, *site)), finish(self, *site)))
    assert max(run_threads(2, work)) < 1e-5


def test_inputs_are_not_aliased_and_may_change_after_a_put() -> None:
    """A put has copied its chunks, but the stationary ones are read later: the executor must hold what it was given."""
    case = random_case(5, ranks=2)

    def work(rank: int) -> None:
        current_session().load("p", schedules_of(case))
        ticket = torch.zeros(1, dtype=torch.int64)
        q, k, v = case.shard(rank)
        after = sf.put_q(q, ticket, "p", 0)
        assert after.data_ptr() != ticket.data_ptr()
        for op, tensor in ((sf.put_k, k), (sf.put_v, v)):
            after = op(tensor, after, "p", 0)
        after = sf.attend(after, case.mask, "p", 0)
        out, after = sf.collect(after, "p", 0, [*q.shape[:3], v.shape[3]], torch.float32)
        before = out.clone()
        attend_and_gather(case, rank, after)  # another epoch must not write into what collect returned
        assert torch.equal(out, before)

    run_threads(2, work)


def test_a_graph_without_its_session_says_so() -> None:
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(InternalError, match="has no session"):
        sf.put_q(x, torch.zeros(1, dtype=torch.int64), "p", 0)

    def work(rank: int) -> None:
        sf.put_q(x, torch.zeros(1, dtype=torch.int64), "gone", 0)

    with pytest.raises(InternalError, match="program gone is not loaded on rank 0"):
        run_threads(1, work)


@pytest.mark.thorough  # what Inductor may reuse is read from its code in tests/passes/graph/test_lifetimes.py
def test_memory_may_be_reused_after_a_put() -> None:
    """Inductor gives the buffer of k to another value as soon as put_k has returned; attend reads k after that."""

    def local(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ticket = torch.zeros(1, dtype=torch.int64)
        for put, m in ((sf.put_q, w), (sf.put_k, w.t()), (sf.put_v, w + 1)):
            ticket = put((x @ m).view(1, 24, 4, 8).transpose(1, 2), ticket, "p", 0)
        other = x @ (w + 2) @ w @ w
        ticket = sf.attend(ticket, None, "p", 0)
        out, ticket = sf.collect(ticket, "p", 0, [1, 4, 24, 8], torch.float32)
        ticket = sf.exchange_start(out + 1, ticket, "p", 1)
        other = other @ (w + 3) @ w @ w
        return sf.exchange_finish(ticket, "p", 1, [1, 4, 24, 8], torch.float32)[0], other

    site = attention_site(1, heads=4, tokens=24)
    mesh = Mesh.of(Topology.grid(1, 1), 1, 1)
    gather = ExchangeSite.gather("out", (1, 4, 24, 8), torch.float32, 2, site.q_positions)

    def work(rank: int) -> float:
        current_session().load("p", [build_torus(site, mesh), build_exchange(gather, mesh)])
        torch.manual_seed(0)
        x, w = torch.randn(24, 32), torch.randn(32, 32)
        with torch.no_grad():
            compiled = compile_fx(make_fx(local, tracing_mode="fake")(x, w), [x, w])
            q, k, v = ((x @ m).view(1, 24, 4, 8).transpose(1, 2) for m in (w, w.t(), w + 1))
            expected = torch.nn.functional.scaled_dot_product_attention(q, k, v) + 1
            return float((compiled(x, w)[0] - expected).abs().max())

    assert max(run_threads(1, work)) < 1e-4


def test_a_put_of_a_row_program_through_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks without kernels compute what the program says, then put it."""
    shapes = ((24, 32), (32,), (1, 4, 24, 8))
    doubled = SimpleNamespace(compute=lambda x, w: (x * w).view(1, 24, 4, 8).transpose(1, 2), shapes=shapes)
    monkeypatch.setitem(ops.ROW_PROGRAMS, "doubled", doubled)

    def local(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ticket = torch.zeros(1, dtype=torch.int64)
        for phase in ("put_k", "put_q", "put_v"):
            ticket = sf.put_fused([x.sin(), w], ticket, "p", 0, phase, "doubled")
        ticket = sf.attend(ticket, None, "p", 0)
        return sf.collect(ticket, "p", 0, [1, 4, 24, 8], torch.float32)[0]  # type: ignore[no-any-return]

    site = attention_site(1, heads=4, tokens=24)

    def work(rank: int) -> float:
        current_session().load("p", [build_torus(site, Mesh.of(Topology.grid(1, 1), 1, 1))])
        x, w = torch.randn(24, 32), torch.randn(32)
        with torch.no_grad():
            compiled = compile_fx(make_fx(local, tracing_mode="fake")(x, w), [x, w])
            value = doubled.compute(x.sin(), w)
            expected = torch.nn.functional.scaled_dot_product_attention(value, value, value)
            return float((compiled(x, w)[0] - expected).abs().max())

    assert max(run_threads(1, work)) < 1e-5


@pytest.mark.thorough  # Inductor runs local graphs in tests/e2e/test_processes.py
@pytest.mark.ranks
def test_inductor_keeps_the_order_and_the_numbers() -> None:
    for result in run_processes(2, rank_workers.through_inductor, timeout_s=240):
        assert max(result["errors"]) < 1e-5
