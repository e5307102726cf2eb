"""Sessions over processes: shared memory, growth, failure, recovery."""

from __future__ import annotations

import out_of_step
import pytest
import rank_workers
import torch
from processes import run_outcomes, run_processes
from random_sites import gather_site
from rank_workers import sf
from threads import run_threads

from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.errors import (
    HeapError,
    InternalError,
    PeerDiedError,
    PeerFailedError,
    RankMismatchError,
    RuntimeTimeoutError,
)
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.cpu_side import CpuSide
from sfcompile.runtime.rank.session import current_session

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(("ranks", "seed"), [(2, 21), (3, 22), (4, 23)])
def test_attention_through_shared_memory(ranks: int, seed: int) -> None:
    for result in run_processes(ranks, rank_workers.attention, (seed, "shm", 6)):
        assert result["error"] < 1e-5 and result["same"]
        assert result["names"] == []  # while it runs, already
        assert result["heap_bytes"] > 0


def test_the_heap_grows_and_old_programs_still_run() -> None:
    for errors in run_processes(2, rank_workers.growing):
        assert len(errors) == 6 and max(errors) < 1e-5


def test_a_killed_rank_is_named_at_once_and_leaves_nothing() -> None:
    outcomes = run_outcomes(3, rank_workers.one_dies, ("shm", 1, "kill"))
    assert outcomes[1].exit_code == -9
    for outcome in (outcomes[0], outcomes[2]):
        assert isinstance(outcome.error, PeerDiedError | PeerFailedError) and "rank 1 (process" in str(outcome.error)
        assert outcome.seconds < outcomes[1].seconds + 5
    assert rank_workers.shared_memory_names() == []


def test_a_rank_that_raises_takes_the_others_with_it() -> None:
    outcomes = run_outcomes(3, rank_workers.one_dies, ("shm", 1, "raise"))
    for outcome in (outcomes[0], outcomes[2]):
        assert isinstance(outcome.error, PeerFailedError)
        assert "rank 1: ValueError: the victim's own mistake" in str(outcome.error)


def test_a_rank_that_sleeps_is_a_timeout() -> None:
    outcomes = run_outcomes(2, rank_workers.one_dies, ("shm", 1, "sleep"))
    assert isinstance(outcomes[0].error, RuntimeTimeoutError)
    assert outcomes[0].seconds < outcomes[1].seconds


@pytest.mark.parametrize("machine_of", [(0, 0), (0, 1)])
def test_ranks_that_failed_together_start_afresh(machine_of: tuple[int, ...]) -> None:
    assert max(run_processes(2, rank_workers.recovers, (), machine_of)) < 1e-5


@pytest.mark.parametrize("machine_of", [(0, 0), (0, 1)])
@pytest.mark.parametrize("how", out_of_step.WAYS)
def test_ranks_out_of_step_are_told_and_the_next_call_is_right(how: str, machine_of: tuple[int, ...]) -> None:
    want = {
        "interrupted": ["PeerFailedError", "KeyboardInterrupt"],
        "late": ["KeyboardInterrupt", "PeerFailedError"],
    }.get(how, ["RankMismatchError"] * 2)
    outcomes = run_processes(2, out_of_step.falls_out, (how,), machine_of)
    assert [kind for kind, _, _ in outcomes] == want, outcomes
    for _, text, _ in outcomes if want[0] == "RankMismatchError" else []:
        assert "rank 0 is in call" in text and "rank 1 is in call" in text
    assert max(difference for _, _, difference in outcomes) < 1e-5


@pytest.mark.parametrize("machine_of", [(0, 0), (0, 1)])
def test_a_plan_that_fails_on_every_rank_breaks_nothing(machine_of: tuple[int, ...]) -> None:
    assert max(run_processes(2, rank_workers.goes_on, (), machine_of)) < 1e-5


def test_agreement_between_threads() -> None:
    def work(rank: int) -> None:
        session = current_session()
        session.agree("same", {"graph": "3 nodes"})
        session.agree(f"graph {rank // 2}", {"graph": f"{rank // 2} nodes"})

    with pytest.raises(
        RankMismatchError, match="ranks 2, 3 would compile.*graph is 0 nodes on rank 0 and 1 nodes on rank 2"
    ):
        run_threads(4, work)


def test_a_third_open_site_is_our_mistake() -> None:
    schedule = build_exchange(gather_site(1), Mesh.of(Topology.grid(1, 1), 1, 1))

    def work(rank: int) -> None:
        current_session().load("g", [schedule] * 3)
        ticket = torch.zeros(1, dtype=torch.int64)
        for site in range(3):
            ticket = sf.exchange_start(torch.zeros(2, 10, 3), ticket, "g", site)

    with pytest.raises(InternalError, match="site 2 opens epoch 3 while epoch 1"):
        run_threads(1, work)


def test_a_call_without_sites_needs_no_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that have gone after their last call fail those only that would wait for them."""

    def work(rank: int) -> None:
        session = current_session()
        monkeypatch.setattr(CpuSide, "notice", lambda self: "connection closed by the peer")
        with session.call("alone", [], talks=False):
            pass
        with pytest.raises(PeerFailedError, match="connection closed"), session.call("together", []):
            raise AssertionError("the call began")

    run_threads(1, work)


def test_a_compile_after_kernels_have_failed_is_told_by_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They fail behind the host: it learns of it at the next call, or here, before anything is made for new kernels."""
    afresh: list[int] = []
    monkeypatch.setattr(CpuSide, "on_gpu", True)
    monkeypatch.setattr(CpuSide, "notice", lambda self: "rank 1: waited 2 s" if self._world.rank else None)
    monkeypatch.setattr(CpuSide, "restart", lambda self, epoch, life: afresh.append(self._world.rank))
    run_threads(2, lambda rank: current_session().agree("same", {"graph": "3 nodes"}))
    assert sorted(afresh) == [0, 1]


def test_sites_may_end_in_another_order() -> None:
    schedule = build_exchange(gather_site(2), Mesh.of(Topology.grid(1, 2), 1, 2))
    whole = torch.randn(2, 10, 3)

    def work(rank: int) -> bool:
        current_session().load("g", [schedule] * 2)
        ticket, right = torch.zeros(1, dtype=torch.int64), True
        for call in range(5):
            for site in (0, 1):
                ticket = sf.exchange_start(whole[:, 5 * rank : 5 * rank + 5] * (call + site), ticket, "g", site)
            for site in (1, 0):
                out, ticket = sf.exchange_finish(ticket, "g", site, [2, 10, 3], torch.float32)
                right &= torch.equal(out, whole * (call + site))
        return right

    assert run_threads(2, work) == [True, True]


def test_the_heap_does_not_grow_with_sites() -> None:
    schedule = build_exchange(gather_site(2), Mesh.of(Topology.grid(1, 2), 1, 2))

    def work(rank: int) -> tuple[int, int]:
        session = current_session()
        session.load("few", [schedule])
        few = session.heap_bytes
        session.load("many", [schedule] * 60)
        return few, session.heap_bytes

    for few, many in run_threads(2, work):
        assert few == many > 0


# Four ranks on "auto": tests/runtime/wires/test_tcp.py.
@pytest.mark.parametrize(
    ("ranks", "transport"), [(4, "c10d"), (3, "auto"), pytest.param(6, "auto", marks=pytest.mark.thorough)]
)
def test_every_schedule_is_exact_on_real_processes(ranks: int, transport: str) -> None:
    """Ranks on two machines, late by turns: shared memory inside, messages between (or messages only)."""
    machines = tuple(rank * 2 // ranks for rank in range(ranks))
    results = run_processes(ranks, rank_workers.every_schedule, (transport, True), machines, timeout_s=200)
    assert len(results[0]) >= 6
    for result in results:
        assert max(result.values()) <= 1e-5, result


def test_an_error_of_a_stopped_device_is_told_as_what_stopped_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an op of a call meets it, or the next call that looks at its inputs; others are told ours, once."""
    why, raw = RuntimeTimeoutError("slot 3 did not come", "", "", rank=0, peer=1), RuntimeError("CUDA error: assert")
    told: list[str] = []

    def stopped(tensors: object) -> int:
        raise raw

    def work(rank: int) -> None:
        session = current_session()
        monkeypatch.setattr(CpuSide, "explained", lambda self, error: why if error is raw else None)
        monkeypatch.setattr(CpuSide, "abort", lambda self, notice: told.append(notice))
        with pytest.raises(ValueError, match="own mistake"), session.call("p", [], talks=False):
            raise ValueError("own mistake")
        for inside in (True, False):
            session._failed = not inside  # as a call before left it
            if not inside:
                monkeypatch.setattr("sfcompile.runtime.rank.session.fingerprint", stopped)
            with pytest.raises(RuntimeTimeoutError, match="slot 3 did not come") as caught:
                with session.call("p", [], talks=False):
                    raise raw
            assert caught.value.__cause__ is raw

    run_threads(1, work)
    assert told == ["rank 0: ValueError: own mistake", "rank 0: slot 3 did not come"]


def test_a_model_whose_heap_could_not_be_had_again_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = build_exchange(gather_site(1), Mesh.of(Topology.grid(1, 1), 1, 1))

    def work(rank: int) -> None:
        session = current_session()
        session.load("p", [schedule])
        monkeypatch.setattr(CpuSide, "size", None)
        with pytest.raises(HeapError, match="model of program p has lost its heap on rank 0"):
            session.put("p", 0, "exchange_start", torch.zeros(2, 10, 3))

    run_threads(1, work)
