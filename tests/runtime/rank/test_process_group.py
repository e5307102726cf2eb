"""Machines, agreement, the heap of several processes."""

from __future__ import annotations

import os

import pytest
import rank_workers
from processes import run_outcomes, run_processes

from sfcompile.errors import HeapError, RankMismatchError, RuntimeTimeoutError, TopologyError, UnsupportedError
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.process_group import check_ranks, compare, group_name, machine_identity

pytestmark = pytest.mark.ranks


def test_the_machine_is_torchruns_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUP_RANK", "3")
    assert machine_identity() == "torchrun node 3"
    monkeypatch.delenv("GROUP_RANK")
    assert machine_identity() == machine_identity() != "torchrun node 3"


def test_ranks_that_disagree_all_say_in_what() -> None:
    for rank, outcome in enumerate(run_outcomes(2, rank_workers.disagree)):
        assert isinstance(outcome.error, RankMismatchError)
        assert f"[rank {rank}/2] rank 1 would compile something else than rank 0" in str(outcome.error)
        assert "input x is float32[2, 64] on rank 0 and float32[2, 65] on rank 1" in str(outcome.error)


def test_a_rank_that_does_not_come_is_named() -> None:
    outcomes = run_outcomes(3, rank_workers.one_does_not_compile)
    for outcome in outcomes[:2]:
        assert isinstance(outcome.error, RuntimeTimeoutError)
        assert "not every rank came along within 2 s: rank 2 did not" in str(outcome.error)
        assert outcome.seconds < outcomes[2].seconds


def test_a_heap_that_does_not_fit_is_an_error_on_every_rank() -> None:
    for outcome in run_outcomes(2, rank_workers.heap_does_not_fit):
        assert isinstance(outcome.error, HeapError)
        assert "does not fit in /dev/shm" in str(outcome.error)
    assert rank_workers.shared_memory_names() == []


def test_what_ran_before_goes_on_after_a_heap_that_does_not_fit() -> None:
    assert max(run_processes(2, rank_workers.goes_on_without_the_huge_one)) < 1e-5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_ranks_with_a_shm_of_their_own_share_memory_all_the_same() -> None:
    for result in run_processes(2, rank_workers.own_shm, (("16m", "16m"),)):
        assert result["error"] < 1e-5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_shm_that_is_full_on_one_rank_is_an_error_on_every_rank() -> None:
    for outcome in run_outcomes(2, rank_workers.own_shm, (("16m", "8k"),)):
        assert isinstance(outcome.error, HeapError)
        assert "rank 1: a symmetric heap" in str(outcome.error) and "8.0 KiB are free" in str(outcome.error)


def test_ranks_of_two_machines_with_one_secret() -> None:
    for result in run_processes(3, rank_workers.with_secrets, (["s" * 32] * 3,), (0, 0, 1)):
        assert result["error"] < 1e-5


def test_another_secret_on_one_machine_is_an_error_on_every_rank() -> None:
    for outcome in run_outcomes(3, rank_workers.with_secrets, (["s" * 32, "s" * 32, "x" * 32],), (0, 0, 1)):
        assert isinstance(outcome.error, RankMismatchError), outcome.log[-3000:]
        assert "is not signed with this rank's SFCOMPILE_SECRET" in str(outcome.error)


def test_shared_memory_between_machines_is_refused() -> None:
    for outcome in run_outcomes(2, rank_workers.attention, (1, "shm", 1), (0, 1)):
        assert isinstance(outcome.error, UnsupportedError) and "with 2 machines" in str(outcome.error)


def test_compare_lists_every_rank_that_differs() -> None:
    same = ("a", {"options": "x"})
    compare(0, [same, same])
    other = ("b", {"options": "y"})
    with pytest.raises(RankMismatchError, match="ranks 1, 3 would compile.*options is x on rank 0 and y on rank 1"):
        compare(2, [same, other, same, other])
    with pytest.raises(RankMismatchError, match="rank 1 traced other code"):
        compare(0, [same, ("b", {"options": "x"})])


def test_names_of_groups_are_short_and_differ() -> None:
    assert group_name((0, 2)) == "ranks-0-2"
    many, others = group_name(range(1024)), group_name(range(1, 1025))
    assert len(many) < 60 and many != others and many.startswith("ranks-0-and-1023-more-")


def test_check_ranks() -> None:
    check_ranks(Topology.grid(2, 2), 4)
    with pytest.raises(TopologyError, match="has 4 ranks, the job has 8"):
        check_ranks(Topology.grid(2, 2), 8)
