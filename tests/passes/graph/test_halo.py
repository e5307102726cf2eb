"""Rows that ranks lack, sent with what all tell all: which they are, in which order they come, where they go."""

from __future__ import annotations

import numpy as np
import torch
from helpers import run_lockstep
from hypothesis import given
from hypothesis import strategies as st
from random_ops import few, rand
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sfcompile.passes.graph.halo import ASSEMBLED, Halo, beside, tell_with_rows, with_zeros
from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Ownership
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.runtime.program.intervals import Runs, union


def spelled(runs: Runs) -> list[int]:
    return [i for first, n in runs for i in range(first, first + n)]


def runs_of(positions: set[int]) -> Runs:
    return union((i, 1) for i in positions)


@st.composite
def halos(draw: st.DrawFn) -> Halo:
    """Rows dealt to ranks in any way, some to none; each rank wants any of them."""
    ranks, rows = draw(st.integers(2, 4)), draw(st.integers(1, 9))
    homes = draw(st.lists(st.integers(0, ranks - 1), min_size=rows, max_size=rows))
    wanted = [draw(st.sets(st.integers(0, rows - 1))) for _ in range(ranks)]
    owned = [runs_of({i for i, home in enumerate(homes) if home == rank}) for rank in range(ranks)]
    return Halo(2, tuple(owned), tuple(map(runs_of, wanted)))


@given(halos())
def test_what_ranks_lack_leaves_others_and_comes_once(halo: Halo) -> None:
    for rank, (owned, wanted) in enumerate(zip(halo.owned, halo.wanted, strict=True)):
        lacking = set(spelled(wanted)) - set(spelled(owned))
        assert spelled(halo.lacking[rank]) == sorted(lacking)
        coming = [i for runs in halo.coming(rank) for i in spelled(runs)]
        assert sorted(coming) == sorted(lacking) and not halo.coming(rank)[rank]
        others = {i for other in range(len(halo.owned)) for i in spelled(halo.lacking[other])}
        assert set(spelled(halo.leaving[rank])) == others & set(spelled(owned))


@few
@given(halos(), st.sampled_from([0, 1, 2]))
def test_every_rank_gets_what_all_tell_and_puts_its_window_together(halo: Halo, dim: int) -> None:
    """On all ranks: what each tells, stacked, and its window of a value of which it had some rows."""
    ranks, rows = len(halo.owned), sum(n for runs in halo.owned for _, n in runs)
    halo = Halo(dim, halo.owned, halo.wanted)
    shape = [2, 3, 4]
    shape[dim] = rows
    whole, tells = rand(*shape), rand(ranks, 2, 3)

    def make(rank: int) -> tuple[fx.GraphModule, list[object]]:
        mode = FakeTensorMode()
        local = LocalGraph(mode, Ownership(LabelSpace(), [], [], ranks), rank, "test")
        x, told = local.graph.placeholder("x"), local.graph.placeholder("told")
        with mode:
            x.meta["val"], told.meta["val"] = torch.empty(shape), torch.empty(ranks, 2, 3)
        mine = local.take(x, dim, np.array(spelled(halo.owned[rank]), dtype=np.int64))
        one = local.call(torch.ops.aten.select.int, [told, 0, rank], {})
        everyone, came = tell_with_rows(local, one, mine, halo)
        local.graph.output((everyone, beside(local, mine, came, halo)))
        return fx.GraphModule(local.root, local.graph), list(local.sites)

    for rank, (everyone, window) in enumerate(run_lockstep(make, ranks, [whole, tells])):
        assert torch.equal(everyone, tells)
        assert torch.equal(window, whole.index_select(dim, torch.tensor(spelled(halo.wanted[rank]), dtype=torch.int64)))


def test_rows_of_zeros_join_a_window_that_is_put_together_anyway() -> None:
    mode = FakeTensorMode()
    local = LocalGraph(mode, Ownership(LabelSpace(), [], [], 2), 0, "test")
    own, came = local.graph.placeholder("own"), local.graph.placeholder("came")
    with mode:
        own.meta["val"], came.meta["val"] = torch.empty(1, 3, 2), torch.empty(1, 1, 2)
    halo = Halo(1, (((0, 3),), ((3, 3),)), (((0, 4),), ((2, 4),)))
    window = beside(local, own, came, halo)
    padded = with_zeros(local, window, 1, 0)
    assert padded is not None and ASSEMBLED in padded.meta and with_zeros(local, own, 1, 0) is None
    local.graph.output(padded)
    x, y = rand(1, 3, 2), rand(1, 1, 2)
    want = torch.cat([torch.zeros(1, 1, 2), x, y], 1)
    assert torch.equal(fx.GraphModule(local.root, local.graph)(x, y), want)
