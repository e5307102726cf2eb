"""Rows of a shard that ranks lack for a window of it, sent in one exchange with what every rank tells all.

A norm over tokens tells all ranks its statistics, and the convolution behind it wants its neighbours' rows of what the
norm made. The rows of the norm's *input* are there as soon as the statistics are. So one exchange carries both, and a
rank normalises the few rows that came as it does its own: one exchange where there were two, and no copy of a shard
through the exchange, for its own rows never enter it.

What travels is one line of elements, of which each rank owns two stretches:

    what rank 0 tells, what rank 1 tells, ... | rows that leave rank 0, rows that leave rank 1, ...

Every rank wants all of the first half and, of the second, the rows that it lacks. It is an exchange like any other
(runtime/program/sites.py), with its proof and its place in the one order of communication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx

from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.runtime.program.intervals import Runs, beyond, count, join, overlap, places, union

aten = torch.ops.aten

ASSEMBLED = "assembled"
"""Key in the meta of the concatenation that :func:`beside` writes. It costs nothing in a prediction: what pointwise ops
make for a concatenation alone, the compiler lets them write in its place. (Nor does a rank's own part of an exchange
cost anything there.)"""


@dataclass(frozen=True)
class Halo:
    """Which rows of a dim each rank owns, and which it wants; every vector ascends."""

    dim: int
    owned: tuple[Runs, ...]
    wanted: tuple[Runs, ...]

    @cached_property
    def lacking(self) -> tuple[Runs, ...]:
        """By rank, what it wants and does not own."""
        return tuple(beyond(wanted, owned) for wanted, owned in zip(self.wanted, self.owned, strict=True))

    @cached_property
    def leaving(self) -> tuple[Runs, ...]:
        """By rank, what it owns and others lack."""
        return tuple(union(run for runs in self.lacking for run in overlap(owned, runs)) for owned in self.owned)

    def coming(self, rank: int) -> list[Runs]:
        """What ``rank`` lacks, by the rank that it comes from: the order in which it arrives."""
        return [overlap(leaving, self.lacking[rank]) for leaving in self.leaving]


def tell_with_rows(local: LocalGraph, told: fx.Node, x: fx.Node, halo: Halo) -> tuple[fx.Node, fx.Node | None]:
    """``local.of_all(told)``, and the rows of ``x`` that this rank lacks, in the order of ``halo.coming``; None: none.

    Args:
        x: this rank's shard, of the dtype of ``told``.
    """
    ranks, shape = range(local.owners.num_ranks), [int(n) for n in told.meta["val"].shape]
    rest = [int(n) for d, n in enumerate(x.meta["val"].shape) if d != halo.dim]
    each, row = math.prod(shape), math.prod(rest)
    starts, size = [], len(ranks) * each
    for runs in halo.leaving:
        starts.append(size)
        size += count(runs) * row
    owned = [join([(r * each, each), (starts[r], count(halo.leaving[r]) * row)]) for r in ranks]
    wanted = []
    for rank in ranks:
        rows = [
            (starts[src] + first * row, n * row)
            for src, runs in enumerate(halo.coming(rank))
            for first, n in places(runs, halo.leaving[src])
        ]
        wanted.append(join([(0, len(ranks) * each), *rows]))
    line = [local.call(aten.reshape.default, [told, [-1]], {})]
    mine = places(halo.leaving[local.rank], halo.owned[local.rank])
    if mine:
        leave = local.take(x, halo.dim, np.concatenate([np.arange(first, first + n) for first, n in mine]))
        line.append(local.call(aten.reshape.default, [_moved(local, leave, halo.dim, 0), [-1]], {}))
    sent = line[0] if len(line) == 1 else local.call(aten.cat.default, [line, 0], {})
    came = local.trade(sent, (size,), 0, tuple(owned), 0, tuple(wanted))
    everyone = local.narrow(came, 0, 0, len(ranks) * each)
    everyone = local.call(aten.reshape.default, [everyone, [len(ranks), *shape]], {})
    number = count(halo.lacking[local.rank])
    if not number:
        return everyone, None
    rows_came = local.narrow(came, 0, len(ranks) * each, number * row)
    rows_came = local.call(aten.reshape.default, [rows_came, [number, *rest]], {})
    return everyone, _moved(local, rows_came, 0, halo.dim)


def beside(local: LocalGraph, own: fx.Node, rows: fx.Node | None, halo: Halo) -> fx.Node:
    """This rank's window: what it wants of its own shard, and the rows that came, each in its place."""
    wanted, owned = halo.wanted[local.rank], halo.owned[local.rank]
    mine = overlap(wanted, owned)
    pieces = [(first, own, at, n) for (first, n), (at, _) in zip(mine, places(mine, owned), strict=True)]
    at = 0
    for runs in halo.coming(local.rank) if rows is not None else ():
        for first, n in runs:
            assert rows is not None
            pieces.append((first, rows, at, n))
            at += n
    pieces.sort(key=lambda piece: piece[0])
    if not pieces:
        return local.narrow(own, halo.dim, 0, 0)
    nodes = [local.narrow(source, halo.dim, start, n) for _, source, start, n in pieces]
    if len(nodes) == 1:
        return nodes[0]
    return _assembled(local, nodes, halo.dim)


def with_zeros(local: LocalGraph, window: fx.Node, before: int, after: int) -> fx.Node | None:
    """A window with rows of zeros at its ends, if it was assembled here: then they cost no copy of it. Else None."""
    if ASSEMBLED not in window.meta:
        return None
    pieces: Any = window.args[0]
    dim: Any = window.args[1]
    value = window.meta["val"]
    shape, kind = [int(n) for n in value.shape], {"dtype": value.dtype, "device": value.device}
    ends = [
        [local.call(aten.zeros.default, [[*shape[:dim], n, *shape[dim + 1 :]]], kind)] if n else []
        for n in (before, after)
    ]
    return _assembled(local, [*ends[0], *pieces, *ends[1]], dim)


def _assembled(local: LocalGraph, pieces: list[fx.Node], dim: int) -> fx.Node:
    window = local.call(aten.cat.default, [pieces, dim], {})
    window.meta[ASSEMBLED] = True
    return window


def _moved(local: LocalGraph, x: fx.Node, source: int, target: int) -> fx.Node:
    """``x`` with one dim at another place."""
    if source == target:
        return x
    order = [d for d in range(x.meta["val"].dim()) if d != source]
    order.insert(target, source)
    return local.call(aten.permute.default, [x, order], {})
