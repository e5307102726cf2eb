"""Rules for ops that pick, join or reorder positions along a dim: cat, slice, split, flip, roll, repeat...

When tokens sit in that very dim, each such op is described by one *master* vector of labels, of which every operand
and output is a cut: ``cat``: the output, operands are stretches of it; ``slice``: the input, the output is a stretch.
Joint text and image axes, cuts counted from either end, registers and references need nothing else. On any other dim
these ops keep dims, and ``Linked`` serves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Layout, Need, OpLayouts, map_through_view
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import Operand, OpView
from sfcompile.passes.rules.linked import Linked, Names
from sfcompile.passes.rules.rule import Rule, Side, Spread, register_rule
from sfcompile.runtime.program.intervals import Runs, count, flip, join, stretch

Cut = Callable[[Runs], Runs]
"""Takes the master vector to the vector of one operand or output."""


@dataclass
class Indexed:
    """An op that picks positions along ``dim``; see the head of the file.

    ``cuts`` give every side's vector from the master vector of ``length`` labels; ``master`` is the side that is the
    whole of it. ``write`` emits the local op from the local operands and, per side, the owned positions.
    """

    dim: int
    length: int
    master: Side
    cuts: dict[Side, Cut]
    write: Callable[[OpView, OpLayouts, list[fx.Node], LocalGraph], fx.Node]
    others: Linked | None
    _fresh: dict[int, Runs] = field(default_factory=dict)

    def _here(self, layout: Layout | None) -> bool:
        return layout is not None and layout.dim == self.dim and layout.outer == layout.inner == 1

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """Give every side its cut of the master vector (and the side we came from, to be united with it)."""
        if layout.dim != self.dim:
            return self.others.spread(op, space, side, layout) if self.others else []
        if not self._here(layout):
            return []
        grain = layout.grain
        if grain not in self._fresh:
            self._fresh[grain] = space.fresh(self.length * grain)
        whole = self._fresh[grain]
        layouts = [(to, Layout(self.dim, _by_rows(cut, whole, grain), grain=grain)) for to, cut in self.cuts.items()]
        return [(to, cut) for to, cut in layouts if cut.tokens]

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Owners of a cut must be that cut of the owners of the master."""
        if not any(self._here(out) for out in chosen.outs):
            if self.others is None or any(out is not None and out.dim == self.dim for out in chosen.outs):
                return None
            return self.others.needs(op, chosen)
        whole = chosen.ins[self.master[1]] if self.master[0] == "in" else chosen.outs[self.master[1]]
        if not self._here(whole):
            return None
        assert whole is not None
        for j, out in enumerate(chosen.outs):
            want = _by_rows(self.cuts[("out", j)], whole.runs, whole.grain)
            if not want or op.outputs[j] is None:
                continue  # no tokens, or nothing reads it
            if not self._here(out) or not chosen.owners.same(out, whole.with_runs(want)):
                return None
        needs: list[Need] = []
        for operand in op.operands:
            cut = self.cuts.get(("in", operand.index))
            needs.append(whole.with_runs(_by_rows(cut, whole.runs, whole.grain)) if cut else None)
        return needs

    def partial(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Never a sum over tokens."""
        return None

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """The local op, on this rank's positions."""
        if not any(self._here(out) for out in chosen.outs):
            assert self.others is not None
            return self.others.emit(op, chosen, operands, local)
        return self.write(op, chosen, operands, local)


def _same_dims_but(op: OpView, dim: int) -> Linked:
    ndim = len(op.out_shapes[0])
    names: Names = [None if d == dim else d for d in range(ndim)]
    ins: list[Names] = [names if operand.ndim == ndim else [None] * operand.ndim for operand in op.operands]
    return Linked(ins, [names for _ in op.out_shapes])


def _by_rows(cut: Cut, runs: Runs, grain: int) -> Runs:
    """Cut a vector whose positions stand for ``grain`` labels each."""
    if grain == 1:
        return cut(runs)
    rows = cut(((0, count(runs) // grain),))
    stretches = [stretch(runs, first * grain, (first + n) * grain) for first, n in rows]
    return join(run for each in stretches for run in each)


def identity(runs: Runs) -> Runs:
    """The cut that is everything."""
    return runs


def stretch_of(start: int, stop: int, step: int = 1) -> Cut:
    """The cut at every ``step``-th position of ``[start, stop)``."""
    return lambda runs: stretch(runs, start, stop, step)


def _owned(local: LocalGraph, chosen: OpLayouts, layout: Layout | None) -> Any:
    assert layout is not None
    return chosen.owners.rows(layout, local.rank)


# --------------------------------------------------------------------------- cat, stack of tokens


@register_rule("cat", "concat", "concatenate")
def _cat(op: OpView) -> Rule | None:
    ndim = len(op.out_shapes[0])
    if any(operand.ndim != ndim for operand in op.operands):
        return None  # the legacy empty 1-D operand
    dim = op.dim("dim", ndim) if isinstance(op.args["dim"], int) else 0
    cuts: dict[Side, Cut] = {("out", 0): identity}
    at = 0
    for operand in op.operands:
        cuts[("in", operand.index)] = stretch_of(at, at + operand.shape[dim])
        at += operand.shape[dim]

    def write(op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        # Shards keep global order, so the shard of the joined sequence is the join of the shards.
        return local.call(torch.ops.aten.cat.default, [operands, dim], {})

    return Indexed(dim, at, ("out", 0), cuts, write, _same_dims_but(op, dim))


# --------------------------------------------------------------------------- slice, narrow, split, chunk


def _bounds(start: Any, stop: Any, size: int) -> tuple[int, int]:
    lo = 0 if start is None else int(start)
    hi = size if stop is None else int(stop)
    lo = min(max(lo + size if lo < 0 else lo, 0), size)
    hi = min(max(hi + size if hi < 0 else hi, lo), size)
    return lo, hi


@register_rule("slice", "narrow")
def _slice(op: OpView) -> Rule:
    x = op.operands[0]
    dim = op.dim("dim", x.ndim)
    size = x.shape[dim]
    if op.name == "narrow":
        start, stop, step = int(op.args["start"]) % max(size, 1), 0, 1
        stop = start + int(op.args["length"])
    else:
        start, stop = _bounds(op.args["start"], op.args["end"], size)
        step = int(op.args["step"])
    cuts: dict[Side, Cut] = {("in", 0): identity, ("out", 0): stretch_of(start, stop, step)}

    def write(op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        owned = _owned(local, chosen, chosen.ins[0])
        wanted = (owned >= start) & (owned < stop) & ((owned - start) % step == 0)
        return local.take(operands[0], dim, np.flatnonzero(wanted))

    return Indexed(dim, size, ("in", 0), cuts, write, _same_dims_but(op, dim))


@register_rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split", "hsplit")
def _split(op: OpView) -> Rule | None:
    x = op.operands[0]
    if "dim" not in op.args:
        return None
    dim = op.dim("dim", x.ndim)
    sizes = [shape[dim] for shape in op.out_shapes]
    if sum(sizes) != x.shape[dim]:  # at places that do not ascend
        return None
    cuts: dict[Side, Cut] = {("in", 0): identity}
    at = 0
    for j, size in enumerate(sizes):
        cuts[("out", j)] = stretch_of(at, at + size)
        at += size

    def write(op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        owned = _owned(local, chosen, chosen.ins[0])
        edges = np.cumsum([0, *sizes])
        counts = np.diff(np.searchsorted(owned, edges)).tolist()
        return local.call(torch.ops.aten.split_with_sizes.default, [operands[0], counts, dim], {})

    return Indexed(dim, x.shape[dim], ("in", 0), cuts, write, _same_dims_but(op, dim))


@register_rule("slice_scatter")
def _slice_scatter(op: OpView) -> Rule:
    x = op.operands[0]
    dim = op.dim("dim", x.ndim)
    start, stop = _bounds(op.args["start"], op.args["end"], x.shape[dim])
    step = int(op.args["step"])
    cuts: dict[Side, Cut] = {
        ("in", 0): identity,
        ("in", 1): stretch_of(start, stop, step),
        ("out", 0): identity,
    }

    def write(op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        owned = _owned(local, chosen, chosen.outs[0])
        wanted = np.flatnonzero((owned >= start) & (owned < stop) & ((owned - start) % step == 0))
        if len(wanted) == 0:
            return local.call(torch.ops.aten.clone.default, [operands[0]], {})
        if wanted[-1] - wanted[0] + 1 == len(wanted):
            args = [operands[0], operands[1], dim, int(wanted[0]), int(wanted[-1]) + 1, 1]
            return local.call(torch.ops.aten.slice_scatter.default, args, {})
        index = local.constant(torch.from_numpy(wanted))
        return local.call(torch.ops.aten.index_copy.default, [operands[0], dim, index, operands[1]], {})

    return Indexed(dim, x.shape[dim], ("in", 0), cuts, write, _same_dims_but(op, dim))


# --------------------------------------------------------------------------- flip, roll, repeat


class _AnyDim:
    """An op that moves positions along several dims, each by itself: tokens may sit in any of them."""

    def __init__(self, by_dim: dict[int, Indexed], others: Linked) -> None:
        self._by_dim, self._others = by_dim, others

    def _of(self, layout: Layout | None) -> Indexed | Linked:
        return self._others if layout is None else self._by_dim.get(layout.dim, self._others)

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """As along the layout's dim."""
        return self._of(layout).spread(op, space, side, layout)

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """As along the output's dim."""
        return self._of(chosen.outs[0]).needs(op, chosen)

    def partial(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Never a sum over tokens."""
        return None

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """As along the output's dim."""
        return self._of(chosen.outs[0]).emit(op, chosen, operands, local)


def _moving(op: OpView, dims: Sequence[int], cut: Callable[[int], Cut], write: Any) -> Rule:
    """The rule of an op that moves positions along some dims, by what is taken of each dim's labels."""
    x = op.operands[0]
    names: Names = [None if d in dims else d for d in range(x.ndim)]
    others = Linked([names], [names])
    by_dim = {
        dim: Indexed(dim, x.shape[dim], ("in", 0), {("in", 0): identity, ("out", 0): cut(dim)}, write, None)
        for dim in dims
    }
    return _AnyDim(by_dim, others)


@register_rule("flip")
def _flip(op: OpView) -> Rule:
    dims = op.dims("dims", op.operands[0].ndim)

    def write(op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        # The reversed vector is owned by the same ranks: reversing the shard reverses this rank's positions.
        return local.call(torch.ops.aten.flip.default, [operands[0], list(dims)], {})

    return _moving(op, dims, lambda dim: flip, write)


@register_rule("roll")
def _roll(op: OpView) -> Rule | None:
    x = op.operands[0]
    shifts, dims = op.args["shifts"], op.args["dims"]
    shifts = [shifts] if isinstance(shifts, int) else shifts
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        return None
    by: dict[int, int] = {}
    for dim, shift in zip(dims, shifts, strict=True):
        by[int(dim) % x.ndim] = by.get(int(dim) % x.ndim, 0) + int(shift)

    def turn(dim: int) -> Cut:
        size = x.shape[dim]
        shift = by[dim] % max(size, 1)
        return lambda runs: join((*stretch(runs, size - shift, size), *stretch(runs, 0, size - shift)))

    def write(op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        layout = chosen.outs[0]
        assert layout is not None
        size = x.shape[layout.dim]
        owned = _owned(local, chosen, chosen.ins[0])
        moved = by | {layout.dim: int((owned >= size - by[layout.dim] % max(size, 1)).sum())}
        return local.call(torch.ops.aten.roll.default, [operands[0], list(moved.values()), list(moved)], {})

    return _moving(op, list(by), turn, write)


@dataclass
class _Tiled(Linked):
    """``repeat`` / ``repeat_interleave``: ``outer`` or ``inner`` grows by the count along the token dim."""

    times: tuple[int, ...] = ()
    inside: bool = False

    def _scaled(self, layout: Layout, out: bool) -> Layout | None:
        offset = len(self.outs[0]) - len(self.ins[0])
        dim = layout.dim + offset if out else layout.dim - offset
        if dim < 0:
            return None
        times = self.times[dim if out else layout.dim]
        old = layout.inner if self.inside else layout.outer
        if not out and (times == 0 or old % times):
            return None
        new = old * times if out else old // times
        return replace(layout, dim=dim, inner=new) if self.inside else replace(layout, dim=dim, outer=new)

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        scaled = self._scaled(layout, side[0] == "in")
        return [(("out", 0) if side[0] == "in" else ("in", 0), scaled)] if scaled else []

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        out = chosen.outs[0]
        scaled = self._scaled(out, False) if out else None
        return [scaled] if scaled else None


@dataclass
class _RepeatedFlat:
    """``repeat_interleave`` without a dim: every element of the flattened value so many times."""

    times: int

    def _across(self, op: OpView, layout: Layout, inward: bool) -> Layout | None:
        flat = (math.prod(op.operands[0].shape),)
        if inward:
            if self.times == 0 or layout.inner % self.times:
                return None
            return map_through_view(replace(layout, inner=layout.inner // self.times), flat, op.operands[0].shape)
        mapped = map_through_view(layout, op.operands[0].shape, flat)
        return replace(mapped, inner=mapped.inner * self.times) if mapped and self.times else None

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """Tokens that lie in one dim of the flattened value."""
        across = self._across(op, layout, side[0] == "out")
        return [(("out", 0) if side[0] == "in" else ("in", 0), across)] if across else []

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """The layout of the output, mapped back."""
        out = chosen.outs[0]
        across = self._across(op, out, True) if out is not None else None
        return [across] if across is not None and chosen.owners.fits(across) else None

    def partial(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Never a sum over tokens."""
        return None

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """The same call; a size that it names is the whole one's."""
        args, kwargs = op.rebuild(operands)
        kwargs.pop("output_size", None)
        return local.call(op.node.target, args, kwargs)


@register_rule("repeat", "tile")
def _repeat(op: OpView) -> Rule | None:
    x, out = op.operands[0], op.out_shapes[0]
    times = op.args["repeats"] if op.name == "repeat" else op.args["dims"]
    offset = len(out) - x.ndim
    times = [1] * (len(out) - len(times)) + [int(t) for t in times]
    return _Tiled([list(range(offset, len(out)))], [list(range(len(out)))], times=tuple(times))


@register_rule("repeat_interleave")
def _repeat_interleave(op: OpView) -> Rule | None:
    x = op.operands[0]
    if isinstance(op.args["repeats"], Operand):
        return None
    if op.args.get("dim") is None:
        return _RepeatedFlat(int(op.args["repeats"]))
    dim = op.dim("dim", x.ndim)
    times = tuple(int(op.args["repeats"]) if d == dim else 1 for d in range(x.ndim))

    def fix(args: list[Any], kwargs: dict[str, Any], shapes: list[Any]) -> None:
        kwargs.pop("output_size", None)

    names = list(range(x.ndim))
    return _Tiled([names], [names], fix, times=times, inside=True)
