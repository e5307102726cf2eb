"""Rules for norms. Over dims that no token fills they are local; over tokens, ranks put their statistics together.

Mean and variance of all tokens come from those of the ranks' own tokens, exactly and without a second pass (Chan,
Golub and LeVeque 1979): with ``n_r`` elements of mean ``m_r`` and variance ``v_r`` on rank ``r``, and ``N`` in all,

    m = sum of (n_r / N) m_r        v = sum of (n_r / N) (v_r + (m_r - m)^2)

Differences of means are squared, never sums of squares subtracted, so nothing cancels. All of it is fp32 or wider,
ranks are added in their order, and every rank gets the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sfcompile.passes.graph.halo import Halo, tell_with_rows
from sfcompile.passes.graph.labels import LabelSpace
from sfcompile.passes.graph.layout import Layout, Need, OpLayouts, Shape
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import Operand, OpView
from sfcompile.passes.rules.linked import Linked, Names
from sfcompile.passes.rules.rule import Rule, Side, Spread, register_rule

aten = torch.ops.aten


Tell = Callable[[fx.Node], fx.Node]
"""From this rank's statistics to those of all, stacked in rank order."""


class Norm(ABC):
    """Normalise x over some dims, of which one may hold tokens.

    Attributes:
        kept: the rule for the dims that are not normalised over; ``across`` that for those that are.
        over: the latter.
        groups: how many stretches of x are normalised on their own.
    """

    def __init__(self, kept: Linked, across: Linked, over: Sequence[int], groups: int) -> None:
        self.kept = kept
        self.across = across
        self.over = tuple(over)
        self.groups = groups

    def _inside(self, layout: Layout | None) -> bool:
        return layout is not None and layout.dim in self.over

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Spread:
        """Dims stay where they are."""
        return (self.across if self._inside(layout) else self.kept).spread(op, space, side, layout)

    def needs(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """The layout of the output; of the weights too where they have that dim."""
        return (self.across if self._inside(chosen.outs[0]) else self.kept).needs(op, chosen)

    def partial(self, op: OpView, chosen: OpLayouts) -> list[Need] | None:
        """Not a sum over tokens alone."""
        return None

    def statistics(self, op: OpView, chosen: OpLayouts) -> int:
        """Two numbers in fp32 for all that is normalised together."""
        return 8 * self.groups if self._inside(chosen.outs[0]) else 0

    def emit(self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """The op itself where no token is normalised over; else with the statistics of all ranks."""
        out = chosen.outs[0]
        if out is None or not self._inside(out):
            if 0 in local.out_shapes(op, chosen)[0]:
                return local.empty(op, chosen, operands[0])
            return self.kept.emit(op, chosen, operands, local)
        normed = self.over_tokens(op, _wide(operands[0], local), _named(op, operands), self._shares(op, out, local))
        return _narrow(op, normed, local)

    def _shares(self, op: OpView, out: Layout, local: LocalGraph, tell: Tell | None = None) -> Shares:
        whole = math.prod(op.out_shapes[0]) // self.groups
        shapes = (local.owners.local_shape(op.out_shapes[0], out, r) for r in range(local.owners.num_ranks))
        return Shares(whole, [math.prod(shape) // self.groups for shape in shapes], local, tell)

    @abstractmethod
    def over_tokens(self, op: OpView, x: fx.Node, named: dict[str, fx.Node], shares: Shares) -> fx.Node:
        """The normalised shard.

        Args:
            x: this rank's shard in fp32 or wider; ``named``: all local operands by the names of the arguments.
        """


class Shares:
    """Statistics over all ranks' shards.

    Args:
        whole: elements that are normalised together; ``sizes``: how many of them each rank has.
        tell: how ranks tell each other; None: in an exchange of nothing else.
    """

    def __init__(self, whole: int, sizes: Sequence[int], local: LocalGraph, tell: Tell | None = None) -> None:
        self.local = local
        self._of_all = tell or local.of_all
        self._whole = whole
        self._sizes = sizes

    def mean_of(self, parts: fx.Node) -> fx.Node:
        """The mean over ranks of [ranks, ...], weighed by their elements."""
        local, value = self.local, parts.meta["val"]
        share = torch.tensor([n / self._whole for n in self._sizes], dtype=value.dtype)
        weights = local.constant(share.reshape(-1, *[1] * (value.dim() - 1)))
        return local.call(aten.sum.dim_IntList, [local.call(aten.mul.Tensor, [parts, weights], {}), [0]], {})

    def moments(self, x: fx.Node, dims: Sequence[int]) -> tuple[fx.Node, fx.Node]:
        """Mean and variance of all shards over ``dims``, which stay, 1 long; ``x`` is this rank's shard."""
        local = self.local
        if self._sizes[local.rank]:
            both = local.call(aten.var_mean.correction, [x, list(dims)], {"correction": 0, "keepdim": True})
            var, mean = local.getitem(both, 0), local.getitem(both, 1)
        else:
            var = mean = self._nothing(x, dims)
        parts = self._of_all(local.call(aten.stack.default, [[mean, var]], {}))  # [ranks, 2, ...]
        means, variances = (local.call(aten.select.int, [parts, 1, i], {}) for i in (0, 1))
        mean = self.mean_of(means)
        apart = local.call(aten.sub.Tensor, [means, mean], {})
        return mean, self.mean_of(local.call(aten.addcmul.default, [variances, apart, apart], {}))

    def mean_square(self, x: fx.Node, dims: Sequence[int]) -> fx.Node:
        """The mean of the squares of all shards over ``dims``, which stay, 1 long."""
        local = self.local
        if self._sizes[local.rank]:
            square = local.call(aten.mul.Tensor, [x, x], {})
            mine = local.call(aten.mean.dim, [square, list(dims), True], {})
        else:
            mine = self._nothing(x, dims)
        return self.mean_of(self._of_all(mine))

    def _nothing(self, x: fx.Node, dims: Sequence[int]) -> fx.Node:
        """Statistics of no elements: they count nothing, where torch's would be no number."""
        shape = [1 if d in dims else int(n) for d, n in enumerate(x.meta["val"].shape)]
        return self.local.call(aten.new_zeros.default, [x, shape], {})

    def inverse_root(self, x: fx.Node, eps: float) -> fx.Node:
        """``1 / sqrt(x + eps)``."""
        return self.local.call(aten.rsqrt.default, [self.local.call(aten.add.Tensor, [x, eps], {})], {})


class GroupNorm(Norm):
    """``group_norm`` and ``instance_norm`` of x [B, C, *space]: a scale and a shift by channel, as torch does it."""

    def __init__(self, kept: Linked, across: Linked, ndim: int, batch: int, groups: int) -> None:
        super().__init__(kept, across, range(2, ndim), batch * groups)
        self._groups = groups

    def over_tokens(self, op: OpView, x: fx.Node, named: dict[str, fx.Node], shares: Shares) -> fx.Node:
        """Statistics over a group's channels and all space."""
        scale, shift = self._factors(op, x, named, shares)
        return shares.local.call(aten.addcmul.default, [shift, x, scale], {})

    def emit_with_rows(
        self, op: OpView, chosen: OpLayouts, operands: list[fx.Node], local: LocalGraph, halo: Halo
    ) -> tuple[fx.Node, fx.Node | None]:
        """:meth:`emit` over tokens, and the same for the rows that this rank lacks (halo.py); None: it lacks none.

        They come as rows of x, in the exchange of the statistics: a row is a pointwise function of x and of those.
        """
        (out,) = chosen.outs
        assert out is not None and self._inside(out)
        x, came = _wide(operands[0], local), list[fx.Node | None]()

        def tell(statistics: fx.Node) -> fx.Node:
            everyone, rows = tell_with_rows(local, statistics, x, halo)
            came.append(rows)
            return everyone

        shares = self._shares(op, out, local, tell)
        scale, shift = self._factors(op, x, _named(op, operands), shares)
        own, rows = (
            None if n is None else _narrow(op, local.call(aten.addcmul.default, [shift, n, scale], {}), local)
            for n in (x, *came)
        )
        assert own is not None
        return own, rows

    def _factors(self, op: OpView, x: fx.Node, named: dict[str, fx.Node], shares: Shares) -> tuple[fx.Node, fx.Node]:
        """The scale and the shift of every channel [B, C, 1, ...]."""
        local, shape = shares.local, [int(n) for n in x.meta["val"].shape]
        groups, space = self._groups, [1] * (len(shape) - 2)
        grouped = local.call(aten.reshape.default, [x, [shape[0], groups, shape[1] // groups, *shape[2:]]], {})
        mean, var = shares.moments(grouped, range(2, len(shape) + 1))
        scale = shares.inverse_root(var, float(op.args["eps"]))
        per = [1, groups, shape[1] // groups, *space]
        if "weight" in named:
            weight = local.call(aten.reshape.default, [_wide(named["weight"], local), per], {})
            scale = local.call(aten.mul.Tensor, [scale, weight], {})
        shift = local.call(aten.neg.default, [local.call(aten.mul.Tensor, [mean, scale], {})], {})
        if "bias" in named:
            bias = local.call(aten.reshape.default, [_wide(named["bias"], local), per], {})
            shift = local.call(aten.add.Tensor, [shift, bias], {})
        full = [shape[0], groups, shape[1] // groups, *space]
        scale, shift = (
            local.call(aten.reshape.default, [local.call(aten.expand.default, [n, full], {}), [*shape[:2], *space]], {})
            for n in (scale, shift)
        )
        return scale, shift


class LayerNorm(Norm):
    """``layer_norm`` and ``rms_norm`` over the last dims, tokens among them; weights are cut as x is."""

    def over_tokens(self, op: OpView, x: fx.Node, named: dict[str, fx.Node], shares: Shares) -> fx.Node:
        """Statistics over the last dims."""
        local = shares.local
        if op.name == "rms_norm":
            eps = op.args.get("eps")
            eps = torch.finfo(x.meta["val"].dtype).eps if eps is None else float(eps)  # of the dtype it computes in
            scale = shares.inverse_root(shares.mean_square(x, self.over), eps)
        else:
            mean, var = shares.moments(x, self.over)
            x = local.call(aten.sub.Tensor, [x, mean], {})
            scale = shares.inverse_root(var, float(op.args["eps"]))
        x = local.call(aten.mul.Tensor, [x, scale], {})
        if "weight" in named:
            x = local.call(aten.mul.Tensor, [x, _wide(named["weight"], local)], {})
        return local.call(aten.add.Tensor, [x, _wide(named["bias"], local)], {}) if "bias" in named else x


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a norm's arithmetic and of its statistics, and so of rows that travel with them."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _wide(x: fx.Node, local: LocalGraph) -> fx.Node:
    own = x.meta["val"].dtype
    wide = computed_in(own)
    return x if wide == own else local.call(aten._to_copy.default, [x], {"dtype": wide})


def _narrow(op: OpView, x: fx.Node, local: LocalGraph) -> fx.Node:
    """In the dtype that the call returns."""
    dtype = op.node.meta["val"].dtype
    same = x.meta["val"].dtype == dtype
    return x if same else local.call(aten._to_copy.default, [x], {"dtype": dtype})


def _named(op: OpView, operands: list[fx.Node]) -> dict[str, fx.Node]:
    """Local operands by the names of the arguments."""
    names = [name for name, value in op.args.items() if isinstance(value, Operand)]
    return dict(zip(names, operands, strict=True))


@register_rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(op: OpView) -> Rule:
    x = op.operands[0]
    first = x.ndim - len(op.args["normalized_shape"])
    names: Names = [*range(first), *[None] * (x.ndim - first)]
    ins: list[Names] = [names, *([None] * operand.ndim for operand in op.operands[1:])]
    stats: list[Names] = [[*range(first), *[None] * (len(shape) - first)] for shape in op.out_shapes[1:]]
    kept = Linked(ins, [names, *stats])
    if op.name not in ("layer_norm", "rms_norm"):
        return kept  # returns the statistics, which have another form
    over = list(range(first, x.ndim))
    inside: Names = [*[None] * first, *over]
    across = Linked([inside, *([*over] for _ in op.operands[1:])], [inside])
    return LayerNorm(kept, across, over, math.prod(x.shape[:first]))


@register_rule("group_norm", "native_group_norm", "instance_norm")
def _group_norm(op: OpView) -> Rule | None:
    x = op.operands[0]
    ins: list[Names] = [[None] * operand.ndim for operand in op.operands]
    ins[0] = [0, *[None] * (x.ndim - 1)]
    if op.name == "native_group_norm":
        if any(node is not None for node in op.outputs[1:]):
            return None
        outs: list[Names] = [[0, *[None] * (len(shape) - 1)] for shape in op.out_shapes]
        return Linked(ins, outs, _fix_batch)
    if op.name == "instance_norm" and (not op.args["use_input_stats"] or op.args["running_mean"] is not None):
        return None  # statistics from before, or kept for later
    inside: Names = [None, None, *range(2, x.ndim)]
    across = Linked([inside, *ins[1:]], [inside])
    groups = x.shape[1] if op.name == "instance_norm" else int(op.args["num_groups"])
    return GroupNorm(Linked(ins, [ins[0]]), across, x.ndim, x.shape[0], groups)


def _fix_batch(args: list[Any], kwargs: dict[str, Any], shapes: list[Shape]) -> None:
    args[3] = shapes[0][0]


@register_rule("batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(op: OpView) -> Rule | None:
    if op.args.get("training"):
        return None
    names: Names = [d if d != 1 else None for d in range(op.operands[0].ndim)]
    others: list[Names] = [[None] * len(shape) for shape in op.out_shapes[1:]]
    return Linked([names, *([None] * operand.ndim for operand in op.operands[1:])], [names, *others])
