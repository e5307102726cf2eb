"""Rows that are weighted sums of a few input rows: interpolation by any factor, with aligned corners, antialiased.

Which rows and which weights is arithmetic on the places of the rows in the whole grid; a shard of a grid has other
places, so no call of the op on a shard gives them. They are written down here instead, in torch's arithmetic and in
its precision, and a rank sums up its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from sfcompile.passes.graph.local_graph import LocalGraph

aten = torch.ops.aten
Real = NDArray[np.floating[Any]]

MOST_TAPS = 12
"""Rows that are made of more are left to the op, whole: every tap is a pass over the output."""


@dataclass(frozen=True)
class Taps:
    """Output row ``i`` is the sum over ``t`` of ``weights[i, t]`` times input row ``rows[i, t]``."""

    rows: NDArray[np.int64]
    weights: Real

    def reads(self, start: int, stop: int) -> tuple[int, int]:
        """The input rows ``[first, last)`` that output rows ``[start, stop)`` are made of."""
        rows = self.rows[start:stop]
        return int(rows.min()), int(rows.max()) + 1

    def combine(self, local: LocalGraph, x: fx.Node, dim: int, start: int, stop: int, low: int) -> fx.Node:
        """Output rows ``[start, stop)`` of ``dim``, of an ``x`` that begins with input row ``low``."""
        dtype = x.meta["val"].dtype
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        if dtype != wide:
            x = local.call(aten._to_copy.default, [x], {"dtype": wide})
        shape = [1] * x.meta["val"].dim()
        shape[dim] = stop - start
        total: fx.Node | None = None
        for rows, weights in zip((self.rows[start:stop] - low).T, self.weights[start:stop].T, strict=True):
            if not weights.any():
                continue
            factor = local.constant(torch.from_numpy(weights.copy()).to(wide).reshape(shape))
            picked = local.call(aten.index_select.default, [x, dim, local.constant(torch.from_numpy(rows.copy()))], {})
            term = local.call(aten.mul.Tensor, [picked, factor], {})
            total = term if total is None else local.call(aten.add.Tensor, [total, term], {})
        assert total is not None, "weights of a row add up to 1"
        return total if dtype == wide else local.call(aten._to_copy.default, [total], {"dtype": dtype})


def step_of(size: int, out: int, scale: float | None, corners: bool, kind: Any) -> Any:
    """Input rows from one output row to the next.

    Args:
        scale: the one that the call names, if any.
        kind: numpy's dtype of torch's arithmetic.
    """
    if corners:
        return kind(size - 1) / kind(out - 1) if out > 1 else kind(0)
    return kind(1.0 / scale) if scale else kind(size) / kind(out)


def linear(size: int, out: int, step: Any, corners: bool) -> Taps:
    """Between the two nearest rows."""
    kind = type(step)
    at = np.arange(out, dtype=kind)
    source = at * step if corners else np.maximum((at + kind(0.5)) * step - kind(0.5), kind(0))
    first = np.minimum(source.astype(np.int64), size - 1)
    part = np.clip(source - first.astype(kind), kind(0), kind(1))
    return Taps(np.stack([first, np.minimum(first + 1, size - 1)], 1), np.stack([kind(1) - part, part], 1))


def cubic(size: int, out: int, step: Any, corners: bool) -> Taps:
    """Four rows by Keys' kernel, with a slope of -0.75; beyond the edges the outermost row."""
    kind = type(step)
    at = np.arange(out, dtype=kind)
    source = at * step if corners else (at + kind(0.5)) * step - kind(0.5)
    first = np.floor(source)
    part = source - first
    places = first.astype(np.int64)[:, None] + np.arange(-1, 3)
    away = np.abs(part[:, None] - np.arange(-1, 3, dtype=kind))
    return Taps(np.clip(places, 0, size - 1), _keys(away, kind(-0.75)).astype(kind))


def antialiased(size: int, out: int, step: Any, is_cubic: bool) -> Taps:
    """All rows under a triangle, or Keys' kernel with a slope of -0.5, as wide as the step; weights add up to 1."""
    kind = type(step)
    wide = max(step, kind(1))
    support = kind(2 if is_cubic else 1) * wide
    middle = step * (np.arange(out, dtype=kind) + kind(0.5))
    first = np.maximum((middle - support + kind(0.5)).astype(np.int64), 0)
    last = np.minimum((middle + support + kind(0.5)).astype(np.int64), size)
    places = first[:, None] + np.arange(max(1, int((last - first).max())))
    away = np.abs((places.astype(kind) - middle[:, None] + kind(0.5)) / wide)
    weights = _keys(away, kind(-0.5)) if is_cubic else np.maximum(kind(1) - away, kind(0))
    weights = np.where(places < last[:, None], weights, kind(0))
    return Taps(np.minimum(places, size - 1), (weights / weights.sum(1, keepdims=True)).astype(kind))


def _keys(away: Real, slope: Any) -> Real:
    near = ((slope + 2) * away - (slope + 3)) * away * away + 1
    far = ((slope * away - 5 * slope) * away + 8 * slope) * away - 4 * slope
    return np.where(away <= 1, near, np.where(away < 2, far, 0.0))
