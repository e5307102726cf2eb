"""Who compiles, and who waits and finds what was made."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import compile_ranks
import pytest
import torch
from processes import run_outcomes, run_processes
from threads import run_threads
from torch import fx

from sfcompile.capture.graph import Captured, capture
from sfcompile.lowering import compile_once as module
from sfcompile.lowering.compile_once import compile_once
from sfcompile.lowering.own_rows import slices_of
from sfcompile.options import Options
from sfcompile.runtime.rank.session import current_session


def captured(start: int, length: int) -> Captured:
    graphs: list[Captured] = []

    def backend(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(capture(gm, inputs))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda x: x[start : start + length].cos(), backend=backend)(torch.ones(64))
    return graphs[0]


@pytest.mark.parametrize(
    ("lengths", "machine_of", "keeps", "waves"),
    [
        ((4, 4, 4), (0, 0, 0), True, [{0}, {1, 2}]),
        ((4, 4, 4, 4), (0, 0, 1, 1), True, [{0, 2}, {1, 3}]),
        ((4, 5, 4, 5), (0, 0, 0, 0), True, [{0, 1}, {2, 3}]),
        ((4, 5), (0, 0), True, [{0, 1}, set()]),
        ((4, 4, 4), (0, 0, 0), False, [{0, 1, 2}, set()]),
    ],
    ids=["one machine", "two machines", "two kinds", "all differ", "nothing is kept"],
)
def test_the_first_of_each_kind_on_a_machine_compiles(
    lengths: tuple[int, ...],
    machine_of: tuple[int, ...],
    keeps: bool,
    waves: list[set[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs = [captured(8 * rank, length) for rank, length in enumerate(lengths)]
    seen: list[tuple[int, str]] = []
    lock, rank_of = threading.Lock(), threading.local()

    def run_inner(gm: fx.GraphModule, *args: Any) -> Callable[..., Any]:
        for _ in args[-1]([7]):
            with lock:
                seen.append((rank_of.rank, slices_of(gm)[0]))
        return gm

    monkeypatch.setattr(module, "run_inner", run_inner)
    monkeypatch.setattr(module, "inductor_keeps", lambda: keeps)

    def work(rank: int) -> torch.Tensor:
        rank_of.rank = rank
        exchange = current_session().exchange
        run = compile_once(graphs[rank].gm, graphs[rank].mode, Options(), rank, machine_of, exchange)
        (out,) = run(torch.arange(64.0))
        return out

    for rank, out in enumerate(run_threads(len(lengths), work, machine_of)):
        assert torch.equal(out, torch.arange(64.0)[8 * rank : 8 * rank + lengths[rank]].cos())
    order = [rank for rank, _ in seen]
    assert [set(order[: len(waves[0])]), set(order[len(waves[0]) :])] == waves
    if keeps:
        assert len({text for _, text in seen}) == len(set(lengths))


@pytest.mark.parametrize(
    ("sizes", "ranks", "own"),
    [
        ([9], 3, [[0], [], []]),
        ([2, 9, 3, 4], 2, [[1], [3, 2, 0]]),
        ([5, 5, 5], 4, [[0], [1], [2], []]),
        ([1, 2, 3], 1, [[2, 1, 0]]),
        ([], 2, [[], []]),
    ],
)
def test_pieces_are_dealt_out_by_size(sizes: list[int], ranks: int, own: list[list[int]]) -> None:
    assert module.dealt(sizes, ranks) == own


def test_every_piece_is_compiled_by_one_rank_before_the_others_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = [captured(8 * rank, 4) for rank in range(3)]
    sizes, seen, told = [3, 9, 1, 4], list[tuple[int, int]](), list[tuple[int, int, int, int]]()
    lock, rank_of = threading.Lock(), threading.local()

    def run_inner(gm: fx.GraphModule, *args: Any) -> Callable[..., Any]:
        for piece in args[-1](sizes):
            with lock:
                seen.append((rank_of.rank, piece))
        return gm

    monkeypatch.setattr(module, "run_inner", run_inner)
    monkeypatch.setattr(module, "inductor_keeps", lambda: True)

    def work(rank: int) -> None:
        rank_of.rank = rank
        exchange = current_session().exchange
        compile_once(
            graphs[rank].gm, graphs[rank].mode, Options(), rank, (0, 0, 0), exchange,
            progress=lambda *numbers: told.append((rank, *numbers)),
        )  # fmt: skip

    run_threads(3, work, (0, 0, 0))
    own = module.dealt(sizes, 3)
    assert set(seen[:4]) == {(rank, piece) for rank in range(3) for piece in own[rank]}
    assert len(seen) == 12 and len(set(seen)) == 12, "each rank has every piece in the end"
    assert sorted(told) == [(rank, done + 1, len(own[rank]), 4) for rank in range(3) for done in range(len(own[rank]))]


@pytest.mark.parametrize(
    ("lengths", "machine_of", "cores", "stretches"),
    [
        ((5, 4, 4, 4), (0, 0, 0, 0), 8, 3),
        ((5, 4, 4, 4), (0, 0, 0, 0), 2, 2),
        ((4, 4, 4, 4), (0, 0, 1, 1), 8, 2),
        ((4, 5), (0, 0), 8, 1),
    ],
)
def test_ranks_of_other_graphs_are_cut_into_as_many_stretches(
    lengths: tuple[int, ...], machine_of: tuple[int, ...], cores: int, stretches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What every rank computes whole has the same bits on all then, also where a cut rounds."""
    graphs = [captured(8 * rank, length) for rank, length in enumerate(lengths)]
    told: list[int] = []

    def run_inner(gm: fx.GraphModule, *args: Any) -> Callable[..., Any]:
        told.append(args[-2])
        list(args[-1]([7]))
        return gm

    monkeypatch.setattr(module, "run_inner", run_inner)
    monkeypatch.setattr(module, "inductor_keeps", lambda: True)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)

    def work(rank: int) -> None:
        exchange = current_session().exchange
        compile_once(graphs[rank].gm, graphs[rank].mode, Options(), rank, machine_of, exchange)

    run_threads(len(lengths), work, machine_of)
    assert told == [stretches] * len(lengths)


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["the second raises", "the second raises early"])
def test_a_rank_that_fails_at_its_piece_is_an_error_on_all(how: str) -> None:
    waits, lost = run_outcomes(2, compile_ranks.first_is_lost, (how,))
    assert "the compiler's own mistake" in str(lost.error)
    assert waits.value is None and waits.exit_code is not None, waits
    assert "rank 1" in str(waits.error) and "the compiler's own mistake" in str(waits.error), waits.error


@pytest.mark.ranks
@pytest.mark.parametrize("how", [pytest.param("raises", marks=pytest.mark.thorough), "killed"])
def test_a_rank_that_is_lost_while_it_compiles_for_others_is_an_error_on_them(how: str) -> None:
    lost, waits = run_outcomes(2, compile_ranks.first_is_lost, (how,))
    assert "the compiler's own mistake" in str(lost.error) if how == "raises" else lost.exit_code == -9
    assert waits.value is None and waits.exit_code is not None, waits
    assert "rank 0" in str(waits.error), waits.error


@pytest.mark.ranks
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.thorough)])
def test_two_ranks_compile_a_stretch_each_where_no_block_repeats(compiler: str) -> None:
    run_processes(2, compile_ranks.stretches, (compiler,), timeout_s=300.0)
