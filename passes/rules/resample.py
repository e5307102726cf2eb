"""Rules for resampling: interpolation, pooling, pixel shuffles. Along a spatial dim they are windowed (windows.py).

A local call makes whole multiples of the scale from the rows of a window, of which a rank cuts out its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from sfcompile.passes.graph.layout import Need, OpLayouts
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules.linked import Linked, Names
from sfcompile.passes.rules.rule import Rule, register_rule
from sfcompile.passes.rules.weighted import MOST_TAPS, Taps, antialiased, cubic, linear, step_of
from sfcompile.passes.rules.windows import Stretch, Windowed, arguments, kept
from sfcompile.runtime.program.intervals import count

aten = torch.ops.aten
MOST_ROWS = 16
"""Rows of a rank that are averages of stretches of their own: each is a call."""


# --------------------------------------------------------------------------- interpolation


class _Interpolation(Windowed):
    """x [B, C, *space] at another size; ``scales`` are those that the call names, by spatial dim, or None."""

    def __init__(self, op: OpView, rows: frozenset[int], scales: list[float | None]) -> None:
        spatial = frozenset(range(2, op.operands[0].ndim))
        super().__init__(rows, kept(op, rows, spatial))
        self._scales = scales

    def _resize(self, op: OpView, x: fx.Node, dim: int, size: int, local: LocalGraph) -> fx.Node:
        """The call on some rows: to ``size`` along ``dim``, as they are, to the size of the whole along the others."""
        sizes = [size if d == dim else n for d, n in enumerate(op.out_shapes[0])][2:]
        scales = [None if d == dim else scale for d, scale in enumerate(self._scales, 2)]
        corners = [op.args["align_corners"]] if "align_corners" in op.args else []
        target = op.node.target.overloadpacket.default  # type: ignore[union-attr]
        return local.call(target, [x, sizes, *corners, *scales], {})


def nearest_rows(op: OpView, dim: int, scale: float | None) -> NDArray[np.int64]:
    """The input row of every output row, in the arithmetic of torch's kernels."""
    size, rows = op.operands[0].shape[dim], op.out_shapes[0][dim]
    step = np.float32(1.0 / scale if scale else size / rows)
    half = np.float32(0.5 if "exact" in op.name else 0.0)
    sources = np.floor((np.arange(rows, dtype=np.float32) + half) * step).astype(np.int64)
    clipped: NDArray[np.int64] = np.minimum(sources, size - 1)
    return clipped


def _whole_factor(sources: NDArray[np.int64], size: int, exact: bool) -> int:
    """The factor of copies that torch makes of every row, here and for fewer rows; 0 if they are not that regular."""
    rows = np.arange(len(sources))
    factor = len(sources) // size
    if factor == 0 or not np.array_equal(sources, rows // factor):
        return 0
    local = np.floor((rows.astype(np.float32) + np.float32(0.5 if exact else 0.0)) * np.float32(1 / factor))
    return factor if np.array_equal(local.astype(np.int64), rows // factor) else 0


class Nearest(_Interpolation):
    """Every output row is a copy of one input row, the same as torch takes."""

    def _sources(self, op: OpView, dim: int) -> NDArray[np.int64]:
        return nearest_rows(op, dim, self._scales[dim - 2])

    def reads(self, op: OpView, dim: int, start: int, stop: int) -> tuple[int, int]:
        """From the first source to the last."""
        sources = self._sources(op, dim)
        return int(sources[start]), int(sources[stop - 1]) + 1

    def local(self, op: OpView, stretch: Stretch, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """The same call for a whole factor; else rows by index."""
        dim, length = stretch.dim, stretch.stop - stretch.start
        sources, rows = self._sources(op, dim), stretch.high - stretch.low
        factor = _whole_factor(sources, op.operands[0].shape[dim], "exact" in op.name)
        if factor:
            copies = self._resize(op, operands[0], dim, rows * factor, local)
            return local.narrow(copies, dim, stretch.start - stretch.low * factor, length)
        picked = torch.from_numpy(sources[stretch.start : stretch.stop] - stretch.low)
        x = local.call(aten.index_select.default, [operands[0], dim, local.constant(picked)], {})
        return self._resize(op, x, dim, length, local)


class Smooth(_Interpolation):
    """Linear or cubic interpolation. Along a dim in ``taps`` rows are summed up by hand (weighted.py); along others,
    resized by a whole factor up or down with corners that are not aligned, by the same call."""

    def __init__(
        self,
        op: OpView,
        rows: frozenset[int],
        scales: list[float | None],
        taps: Mapping[int, Taps] = MappingProxyType({}),
    ) -> None:
        super().__init__(op, rows | frozenset(taps), scales)
        self._taps = taps

    def reads(self, op: OpView, dim: int, start: int, stop: int) -> tuple[int, int]:
        """The rows under the taps; of a shrinking call whole multiples of the factor."""
        if dim in self._taps:
            return self._taps[dim].reads(start, stop)
        size, rows = op.operands[0].shape[dim], op.out_shapes[0][dim]
        margin = 1 if "cubic" in op.name else 0
        at = (start + 0.5) * size / rows - 0.5
        end = (stop - 0.5) * size / rows - 0.5
        first, last = int(np.floor(at)) - margin, int(np.floor(end)) + 2 + margin
        if rows < size:
            factor = size // rows
            first, last = first // factor * factor, -(-last // factor) * factor
        return max(first, 0), min(last, size)

    def local(self, op: OpView, stretch: Stretch, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """The same call on the window, and of that this rank's rows; or the other dims by the call, and then rows."""
        dim, x = stretch.dim, operands[0]
        if dim in self._taps:
            sizes = zip(op.operands[0].shape, op.out_shapes[0], strict=True)
            if any(before != after for d, (before, after) in enumerate(sizes) if d != dim):
                x = self._resize(op, x, dim, stretch.high - stretch.low, local)
            return self._taps[dim].combine(local, x, dim, stretch.start, stretch.stop, stretch.low)
        size, rows = op.operands[0].shape[dim], op.out_shapes[0][dim]
        resized = self._resize(op, x, dim, (stretch.high - stretch.low) * rows // size, local)
        return local.narrow(resized, dim, stretch.start - stretch.low * rows // size, stretch.stop - stretch.start)


def _scales(op: OpView, spatial: int) -> list[float | None]:
    if "scale_factors" in op.args:
        factors = op.args["scale_factors"]
        return [None] * spatial if factors is None else [float(scale) for scale in factors]
    names = [name for name in op.args if name.startswith("scales")]
    return [None if op.args[name] is None else float(op.args[name]) for name in names]


@register_rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
               "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")  # fmt: skip
def _nearest(op: OpView) -> Rule:
    x, out = op.operands[0], op.out_shapes[0]
    scales = _scales(op, x.ndim - 2)
    rows = set()
    for dim in range(2, x.ndim):
        # To the same or to twice the size kernels take a short cut, not all of them, whatever scale the call names.
        factor = {x.shape[dim]: 1, 2 * x.shape[dim]: 2}.get(out[dim])
        sources = nearest_rows(op, dim, scales[dim - 2])
        if 0 not in (x.shape[dim], out[dim]):
            if factor is None or np.array_equal(sources, np.arange(out[dim]) // factor):
                rows.add(dim)
    return Nearest(op, frozenset(rows), scales)


@register_rule("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
               "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")  # fmt: skip
def _smooth(op: OpView) -> Rule:
    x, out, dtype = op.operands[0], op.out_shapes[0], op.operands[0].node.meta["val"].dtype
    scales, corners, is_cubic = _scales(op, x.ndim - 2), bool(op.args["align_corners"]), "cubic" in op.name
    antialias, kind = op.name.endswith("_aa"), np.float64 if dtype == torch.float64 else np.float32
    rows, taps = set(), dict[int, Taps]()
    named = [
        scale is not None and abs(scale * n - m) >= 1e-6
        for scale, n, m in zip(scales, x.shape[2:], out[2:], strict=True)
    ]
    if not corners and any(other and n == m for other, n, m in zip(named, x.shape[2:], out[2:], strict=True)):
        return Smooth(op, frozenset(), scales)  # some kernels take the named scale then, and some copy, by the sizes
    for dim in range(2, x.ndim):
        size, rows_out, scale = x.shape[dim], out[dim], scales[dim - 2]
        small, large = sorted((size, rows_out))
        as_sizes = not named[dim - 2]
        if not small or not dtype.is_floating_point:
            continue
        if not corners and not antialias and large % small == 0 and as_sizes:
            rows.add(dim)
            continue
        step = step_of(size, rows_out, scale, corners, kind)
        if antialias:
            summed = antialiased(size, rows_out, step, is_cubic)
        else:
            summed = (cubic if is_cubic else linear)(size, rows_out, step, corners)
        if summed.rows.shape[1] <= MOST_TAPS:
            taps[dim] = summed
    return Smooth(op, frozenset(rows), scales, taps)


# --------------------------------------------------------------------------- pooling


class Pool(Windowed):
    """Averages or maxima of ``size`` rows, ``stride`` apart; edges are padded by what counts for nothing."""

    def __init__(self, op: OpView, rows: frozenset[int], steps: list[tuple[int, int, int, int]]) -> None:
        spatial = frozenset(range(op.operands[0].ndim - len(steps), op.operands[0].ndim))
        super().__init__(rows, kept(op, rows, spatial))
        self._first = op.operands[0].ndim - len(steps)
        self._steps = steps

    def reads(self, op: OpView, dim: int, start: int, stop: int) -> tuple[int, int]:
        """As a convolution's taps."""
        size, stride, padding, dilation = self._steps[dim - self._first]
        return start * stride - padding, (stop - 1) * stride - padding + (size - 1) * dilation + 1

    def local(self, op: OpView, stretch: Stretch, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """Pad this rank's edges, then pool without padding along that dim; of an average, count what counts."""
        named: dict[str, Any] = arguments(op, operands)
        x = operands[0]
        if stretch.before or stretch.after:
            pad = [0, 0] * (op.operands[0].ndim - stretch.dim)
            pad[-2:] = [stretch.before, stretch.after]
            value = 0.0 if op.name.startswith("avg") else float("-inf")
            x = local.call(aten.constant_pad_nd.default, [x, pad, value], {})
        paddings = [0 if d == stretch.dim else step[2] for d, step in enumerate(self._steps, self._first)]
        pooled = local.call(op.node.target, [], {**named, "self": x, "padding": paddings})
        size, counts = self._steps[stretch.dim - self._first][0], self._counts(op, stretch)
        if not op.name.startswith("avg") or op.args.get("divisor_override") or bool((counts == size).all()):
            return pooled
        shape = [1] * op.operands[0].ndim
        shape[stretch.dim] = stretch.stop - stretch.start
        dtype = pooled.meta["val"].dtype
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        factor = local.constant(torch.from_numpy(size / counts).to(wide).reshape(shape))
        averages = local.call(aten.mul.Tensor, [pooled, factor], {})
        return averages if wide == dtype else local.call(aten._to_copy.default, [averages], {"dtype": dtype})

    def _counts(self, op: OpView, stretch: Stretch) -> NDArray[np.int64]:
        """How many rows an average of each output row is divided by."""
        size, stride, padding, _ = self._steps[stretch.dim - self._first]
        rows, padded = op.operands[0].shape[stretch.dim], bool(op.args.get("count_include_pad", True))
        start = np.arange(stretch.start, stretch.stop) * stride - padding
        stop = np.minimum(start + size, rows + padding)
        return stop - start if padded else np.minimum(stop, rows) - np.maximum(start, 0)


def _listed(value: Any, length: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return values * length if len(values) == 1 else values


@register_rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d")
def _pool(op: OpView) -> Rule | None:
    x = op.operands[0]
    spatial = int(op.name[-2])
    first = x.ndim - spatial
    sizes = _listed(op.args["kernel_size"], spatial)
    strides = _listed(op.args["stride"], spatial) if op.args["stride"] else sizes
    paddings = _listed(op.args["padding"], spatial)
    dilations = _listed(op.args.get("dilation", 1), spatial)
    floating = op.node.meta["val"].dtype.is_floating_point
    rows = range(first, x.ndim) if floating or not (any(paddings) or op.args["ceil_mode"]) else ()
    return Pool(op, frozenset(rows), list(zip(sizes, strides, paddings, dilations, strict=True)))


class Adaptive(Windowed):
    """Averages to a given size: each output row is that of a stretch of rows which lies where it lies in the whole."""

    def __init__(self, op: OpView, first: int) -> None:
        spatial = frozenset(range(first, op.operands[0].ndim))
        super().__init__(spatial, kept(op, spatial, spatial))
        self._first = first

    def reads(self, op: OpView, dim: int, start: int, stop: int) -> tuple[int, int]:
        """The stretches of rows that torch averages; neighbours may overlap."""
        size, rows = op.operands[0].shape[dim], op.out_shapes[0][dim]
        return start * size // rows, -(-stop * size // rows)

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Few rows: each is a call of its own."""
        out = chosen.outs[0]
        if out is not None and out.dim in self.rows:
            ranks = range(chosen.owners.num_ranks)
            if max(count(chosen.owners.dim_runs(out, rank)) for rank in ranks) > MOST_ROWS:
                return None
        return super().needs(op, chosen)

    def local(self, op: OpView, stretch: Stretch, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """Row by row, the stretch of each to one row."""
        sizes = [1 if d == stretch.dim else n for d, n in enumerate(op.out_shapes[0])][self._first :]
        rows = []
        for row in range(stretch.start, stretch.stop):
            low, high = self.reads(op, stretch.dim, row, row + 1)
            part = local.narrow(operands[0], stretch.dim, low - stretch.low, high - low)
            rows.append(local.call(op.node.target, [part, sizes], {}))
        return rows[0] if len(rows) == 1 else local.call(aten.cat.default, [rows, stretch.dim], {})


@register_rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d",
               "_adaptive_avg_pool3d", "adaptive_max_pool2d")  # fmt: skip
def _adaptive(op: OpView) -> Rule:
    x = op.operands[0]
    match = re.search(r"(\d)d$", op.name)
    assert match is not None
    first = x.ndim - int(match.group(1))
    if "avg" in op.name and 0 not in (*x.shape, *op.out_shapes[0]):
        return Adaptive(op, first)
    names: Names = [*range(first), *[None] * (x.ndim - first)]
    return Linked([names], [names for _ in op.out_shapes])


# --------------------------------------------------------------------------- pixel shuffles


class Shuffle(Windowed):
    """``pixel_shuffle`` [..., C r^2, H, W] -> [..., C, H r, W r], and back."""

    def __init__(self, op: OpView, up: int, down: int) -> None:
        ndim = op.operands[0].ndim
        rows = frozenset((ndim - 2, ndim - 1))
        super().__init__(rows, kept(op, rows, frozenset([ndim - 3])))
        self._up, self._down = up, down

    def reads(self, op: OpView, dim: int, start: int, stop: int) -> tuple[int, int]:
        """``up`` rows of one, or one of ``down``."""
        return start * self._down // self._up, ((stop - 1) // self._up + 1) * self._down

    def local(self, op: OpView, stretch: Stretch, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """The same call on the window, and of that this rank's rows."""
        args, kwargs = op.rebuild(operands)
        shuffled = local.call(op.node.target, args, kwargs)
        at = stretch.start - stretch.low * self._up // self._down
        return local.narrow(shuffled, stretch.dim, at, stretch.stop - stretch.start)


@register_rule("pixel_shuffle", "pixel_unshuffle")
def _shuffle(op: OpView) -> Rule:
    if op.name == "pixel_shuffle":
        return Shuffle(op, int(op.args["upscale_factor"]), 1)
    return Shuffle(op, 1, int(op.args["downscale_factor"]))
