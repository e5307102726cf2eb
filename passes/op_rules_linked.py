"""Rules for ops that keep dims: every dim of an operand either is a dim of the output or takes no part in sharding.

Each family only says which dims are which, by giving the same name to dims that run together (as einsum letters do);
None marks a dim that the op mixes (contracted, reduced, normalised over). Sharding any named dim is then exact: run
the op on the shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sfcompile.passes.labels import LabelSpace
from sfcompile.passes.layout import Layout, Shape
from sfcompile.passes.op_rules import Chosen, Found, Rule, Side, register_rule
from sfcompile.passes.op_view import Operand, OpView

if TYPE_CHECKING:
    from sfcompile.passes.local_graph import LocalGraph

Names = Sequence[Hashable | None]
FixArgs = Callable[[list[Any], dict[str, Any], list[Shape]], None]


@dataclass
class Linked:
    """Dim names for every operand and output; ``fix`` edits literal sizes of the local call in place."""

    ins: list[Names]
    outs: list[Names]
    fix: FixArgs | None = None
    summed: list[Names] | None = None  # names of contracted dims, where the op is a sum of products over them

    def _sides(self, op: OpView) -> list[tuple[Side, Names, Shape]]:
        sides: list[tuple[Side, Names, Shape]] = [
            (("in", operand.index), self.ins[operand.index], operand.shape) for operand in op.operands
        ]
        sides += [(("out", j), names, op.out_shapes[j]) for j, names in enumerate(self.outs)]
        return sides

    def spread(self, op: OpView, space: LabelSpace, side: Side, layout: Layout) -> Found:
        """Every dim of the same name and size carries the same tokens."""
        names = (self.ins if side[0] == "in" else self.outs)[side[1]]
        name = names[layout.dim]
        sides = self._sides(op)
        if name is None and self.summed is not None and side[0] == "in":
            name = self.summed[side[1]][layout.dim]
            sides = [(("in", operand.index), self.summed[operand.index], operand.shape) for operand in op.operands]
        if name is None:
            return []
        size = layout.outer * layout.tokens * layout.inner
        found: Found = []
        for other, other_names, shape in sides:
            if other != side and name in other_names:
                dim = list(other_names).index(name)
                if shape[dim] == size:
                    found.append((other, layout.at(dim)))
        return found

    def needs(self, op: OpView, chosen: Chosen) -> list[Layout | None] | None:
        """The outputs must agree on one sharded name; operands that have the dim at full size must be cut along it."""
        name: Hashable | None = None
        model: Layout | None = None
        for names, layout, output in zip(self.outs, chosen.outs, op.outputs, strict=True):
            if output is None:
                continue  # nothing reads it
            if layout is None or names[layout.dim] is None:
                return None
            if model is None:
                name, model = names[layout.dim], layout
            elif names[layout.dim] != name or not chosen.owners.same(layout.at(0), model.at(0)):
                return None
        if model is None:
            return None
        size = model.outer * model.tokens * model.inner
        needs: list[Layout | None] = []
        for operand in op.operands:
            names = self.ins[operand.index]
            dim = list(names).index(name) if name in names else -1
            needs.append(model.at(dim) if dim >= 0 and operand.shape[dim] == size else None)
        # The tokens must come from some operand, unless the call spells their number out itself.
        return needs if any(needs) or self.fix is not None else None

    def partial(self, op: OpView, chosen: Chosen) -> list[Layout | None] | None:
        """Needs of a local call whose results add up over the ranks: every operand cut along one contracted dim."""
        if self.summed is None:
            return None
        for operand in op.operands:
            layout = chosen.ins[operand.index]
            name = self.summed[operand.index][layout.dim] if layout is not None else None
            if layout is None or name is None:
                continue
            needs: list[Layout | None] = []
            for other in op.operands:
                names = list(self.summed[other.index])
                if name in names and other.shape[names.index(name)] == operand.shape[layout.dim]:
                    needs.append(layout.at(names.index(name)))
                else:
                    return None
            return needs
        return None

    def emit(self, op: OpView, chosen: Chosen, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        """The same call on the shards."""
        args, kwargs = op.rebuild(operands)
        if self.fix is not None:
            self.fix(args, kwargs, local.out_shapes(op, chosen))
        return local.call(op.node.target, args, kwargs)


def aligned(shape: Shape, out: Shape) -> Names:
    """Names of an operand broadcast from the right against ``out``; the names are the dims of ``out``."""
    offset = len(out) - len(shape)
    return [offset + d if offset + d >= 0 and size == out[offset + d] else None for d, size in enumerate(shape)]


def _broadcast(op: OpView, fix: FixArgs | None = None) -> Rule:
    out = op.out_shapes[0]
    return Linked([aligned(operand.shape, out) for operand in op.operands], [list(range(len(out)))], fix)


@register_rule("__pointwise__", "clone", "contiguous", "alias", "detach", "to", "_to_copy", "type_as", "lift_fresh",
               "lift_fresh_copy", "copy", "where", "masked_fill", "zeros_like", "ones_like", "empty_like",
               "full_like", "_conj", "conj", "resolve_conj", "resolve_neg", "view_as", "expand_as", "positive",
               "real", "imag", "fill", "isfinite", "isinf", "isnan", "bucketize", "rsub", "conj_physical", "isin",
               "__and__", "__or__", "__xor__", "float_power", "prelu", "polar", "complex", "logical_not")  # fmt: skip
def _pointwise(op: OpView) -> Rule | None:
    if len(op.out_shapes) != 1:
        return None
    if op.name in ("view_as", "prelu", "isin"):
        return None
    if op.name == "bucketize":
        return Linked([list(range(op.operands[0].ndim)), [None]], [list(range(len(op.out_shapes[0])))])
    return _broadcast(op)


@register_rule("dropout", "alpha_dropout", "feature_dropout")
def _dropout(op: OpView) -> Rule | None:
    return None if op.args["train"] else _broadcast(op)


@register_rule("expand", "new_zeros", "new_ones", "new_full", "new_empty")
def _expand(op: OpView) -> Rule:
    def fix(args: list[Any], kwargs: dict[str, Any], shapes: list[Shape]) -> None:
        args[1] = list(shapes[0])

    rule = _broadcast(op, fix)
    if op.name != "expand" and isinstance(rule, Linked):
        rule.ins = [[None] * op.operands[0].ndim]
    return rule


# --------------------------------------------------------------------------- contractions


def einsum_like(op: OpView, spec: Sequence[str], out: str, fix: FixArgs | None = None) -> Linked:
    """Letters per operand and for the output; a letter missing from the output is contracted."""
    ins = [[letter if letter in out else None for letter in letters] for letters in spec]
    summed: list[Names] = [[None if letter in out else letter for letter in letters] for letters in spec]
    return Linked(ins, [list(out)], fix, summed)  # type: ignore[arg-type]


@register_rule("linear")
def _linear(op: OpView) -> Rule:
    out = list(range(len(op.out_shapes[0])))
    ins: list[Names] = [[*out[:-1], None]]
    # Tokens may be made of output features (a projection to k tokens of d features): then the weight is cut.
    ins += [[out[-1], *[None] * (operand.ndim - 1)] for operand in op.operands[1:]]
    return Linked(ins, [out])


@register_rule("matmul", "bmm", "mm", "mv", "dot", "linalg_vecdot")
def _matmul(op: OpView) -> Rule | None:
    out = op.out_shapes[0]
    a, b = op.operands[:2]
    if a.ndim < 2 or b.ndim < 2:
        return None
    rows: Names = [*aligned(a.shape[:-2], out[:-2]), len(out) - 2, None]
    columns: Names = [*aligned(b.shape[:-2], out[:-2]), None, len(out) - 1]
    summed: list[Names] = [[*[None] * (a.ndim - 1), "c"], [*[None] * (b.ndim - 2), "c", None]]
    return Linked([rows, columns], [list(range(len(out)))], None, summed)


@register_rule("addmm", "baddbmm")
def _addmm(op: OpView) -> Rule:
    out = op.out_shapes[0]
    batch = list(range(len(out) - 2))
    row, column = len(out) - 2, len(out) - 1
    return Linked(
        [aligned(op.operands[0].shape, out), [*batch, row, None], [*batch, None, column]], [list(range(len(out)))]
    )


@register_rule("outer", "ger")
def _outer(op: OpView) -> Rule:
    return Linked([[0], [1]], [[0, 1]])


@register_rule("einsum")
def _einsum(op: OpView) -> Rule | None:
    equation = str(op.args["equation"]).replace(" ", "")
    if "->" not in equation:
        return None
    left, out = equation.split("->")
    spec = left.split(",")
    if "..." in equation:
        widths = [operand.ndim - (len(part) - 3) for part, operand in zip(spec, op.operands, strict=True)]
        if any("..." not in part for part in (*spec, out)) or len(set(widths)) != 1:
            return None
        dots = "".join(chr(0x3B1 + i) for i in range(widths[0]))
        spec = [part.replace("...", dots) for part in spec]
        out = out.replace("...", dots)
    if any(len(set(part)) != len(part) for part in (*spec, out)):
        return None
    return einsum_like(op, spec, out)


# --------------------------------------------------------------------------- norms, reductions, orderings


@register_rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(op: OpView) -> Rule:
    x = op.operands[0]
    kept = x.ndim - len(op.args["normalized_shape"])
    names: Names = [*range(kept), *[None] * (x.ndim - kept)]
    ins: list[Names] = [names, *([None] * operand.ndim for operand in op.operands[1:])]
    outs: list[Names] = [list(range(x.ndim))]
    outs += [[*range(kept), *[None] * (len(shape) - kept)] for shape in op.out_shapes[1:]]
    outs[0] = names
    return Linked(ins, outs)


@register_rule("group_norm", "native_group_norm", "batch_norm", "instance_norm")
def _group_norm(op: OpView) -> Rule | None:
    if op.name == "batch_norm" and op.args["training"]:
        return None
    ins: list[Names] = [[None] * operand.ndim for operand in op.operands]
    ins[0] = [0, *[None] * (op.operands[0].ndim - 1)]
    if op.name == "native_group_norm" and any(node is not None for node in op.outputs[1:]):
        return None
    outs: list[Names] = [[0, *[None] * (len(shape) - 1)] for shape in op.out_shapes]
    return Linked(ins, outs, _fix_group_norm if op.name == "native_group_norm" else None)


def _fix_group_norm(args: list[Any], kwargs: dict[str, Any], shapes: list[Shape]) -> None:
    args[3] = shapes[0][0]


def _keep_dims(op: OpView, reduced: tuple[int, ...], keepdim: bool) -> Linked:
    x = op.operands[0]
    kept = [d for d in range(x.ndim) if d not in reduced]
    names: Names = [None if d in reduced else d for d in range(x.ndim)]
    out: Names = names if keepdim else kept
    ins: list[Names] = [names, *([None] * operand.ndim for operand in op.operands[1:])]
    return Linked(ins, [out for _ in op.out_shapes])


@register_rule("mean", "sum", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "var", "std",
               "var_mean", "std_mean", "logsumexp", "norm", "linalg_vector_norm", "median", "nansum",
               "aminmax")  # fmt: skip
def _reduce(op: OpView) -> Rule | None:
    if op.operands[1:] or "dim" not in op.args:
        return None
    reduced = op.dims("dim", op.operands[0].ndim)
    rule = _keep_dims(op, reduced, bool(op.args.get("keepdim")))
    if op.name in ("sum", "mean"):
        summed: list[Names] = [[d if d in reduced else None for d in range(op.operands[0].ndim)]]
        return (_Mean if op.name == "mean" else Linked)(rule.ins, rule.outs, None, summed)
    return rule


class _Mean(Linked):
    """A mean over tokens adds up only after each rank's mean is weighed by its share of the tokens."""

    def emit(self, op: OpView, chosen: Chosen, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        if any(chosen.outs):
            return super().emit(op, chosen, operands, local)
        args, kwargs = op.rebuild(operands)
        reduced = op.dims("dim", op.operands[0].ndim)
        names = {"keepdim": bool(op.args.get("keepdim")), "dtype": kwargs.get("dtype")}
        total = local.call(torch.ops.aten.sum.dim_IntList, [args[0], list(reduced)], names)
        count = math.prod(op.operands[0].shape[d] for d in reduced)
        return local.call(torch.ops.aten.div.Tensor, [total, count], {})


@register_rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "argsort", "topk",
               "kthvalue", "logcumsumexp", "glu", "_safe_softmax", "renorm", "cummax", "cummin")  # fmt: skip
def _along_dim(op: OpView) -> Rule | None:
    x = op.operands[0]
    reduced = op.dims("dim", x.ndim)
    if op.name == "renorm":
        return None
    return _keep_dims(op, reduced, op.name != "kthvalue" or bool(op.args.get("keepdim")))


@register_rule("normalize")
def _normalize(op: OpView) -> Rule:
    return _keep_dims(op, op.dims("dim", op.operands[0].ndim), True)


# --------------------------------------------------------------------------- moving dims about


def _permuted(op: OpView, order: Sequence[int]) -> Rule:
    return Linked([list(range(op.operands[0].ndim))], [list(order)])


@register_rule("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "numpy_T", "mT", "adjoint")
def _permute(op: OpView) -> Rule | None:
    ndim = op.operands[0].ndim
    order = list(range(ndim))
    if op.name == "permute":
        order = [int(d) % ndim for d in op.args["dims"]]
    elif op.name in ("transpose", "swapaxes", "swapdims"):
        a, b = ("axis0", "axis1") if op.name == "swapaxes" else ("dim0", "dim1")
        i, j = op.dim(a, ndim), op.dim(b, ndim)
        order[i], order[j] = order[j], order[i]
    elif op.name in ("t", "numpy_T"):
        order.reverse()
    elif op.name in ("mT", "adjoint"):
        order[-2:] = order[-1], order[-2]
    else:
        source = op.args["source"] if isinstance(op.args["source"], list) else [op.args["source"]]
        target = op.args["destination"] if isinstance(op.args["destination"], list) else [op.args["destination"]]
        places = {int(t) % ndim: int(s) % ndim for s, t in zip(source, target, strict=True)}
        rest = iter(d for d in range(ndim) if d not in places.values())
        order = [places[d] if d in places else next(rest) for d in range(ndim)]
    return _permuted(op, order)


@register_rule("unsqueeze")
def _unsqueeze(op: OpView) -> Rule:
    ndim = op.operands[0].ndim
    names: list[Hashable | None] = list(range(ndim))
    out = list(names)
    out.insert(op.dim("dim", ndim + 1), None)
    return Linked([names], [out])


@register_rule("squeeze")
def _squeeze(op: OpView) -> Rule:
    x = op.operands[0]
    asked = op.dims("dim", x.ndim) if "dim" in op.args else tuple(range(x.ndim))
    dropped = [d for d in asked if x.shape[d] == 1]
    out = [d for d in range(x.ndim) if d not in dropped]
    names: Names = [None if d in dropped else d for d in range(x.ndim)]
    return _Squeeze([names], [out], dropped)


class _Squeeze(Linked):
    """Squeeze drops what is 1 globally, never a token dim whose shard happens to be 1 long."""

    def __init__(self, ins: list[Names], outs: list[Names], dropped: list[int]) -> None:
        super().__init__(ins, outs)
        self._dropped = dropped

    def emit(self, op: OpView, chosen: Chosen, operands: list[fx.Node], local: LocalGraph) -> fx.Node:
        return local.call(torch.ops.aten.squeeze.dims, [operands[0], self._dropped], {})


@register_rule("select")
def _select(op: OpView) -> Rule:
    ndim = op.operands[0].ndim
    names: list[Hashable | None] = list(range(ndim))
    picked = op.dim("dim", ndim)
    out = [d for d in range(ndim) if d != picked]
    names[picked] = None
    return Linked([names], [out])


@register_rule("unbind")
def _unbind(op: OpView) -> Rule:
    ndim = op.operands[0].ndim
    picked = op.dim("dim", ndim)
    names: Names = [None if d == picked else d for d in range(ndim)]
    out = [d for d in range(ndim) if d != picked]
    return Linked([names], [out for _ in op.out_shapes])


@register_rule("stack")
def _stack(op: OpView) -> Rule:
    ndim = op.operands[0].ndim
    out: list[Hashable | None] = list(range(ndim))
    out.insert(op.dim("dim", ndim + 1), None)
    return Linked([list(range(ndim)) for _ in op.operands], [out])


@register_rule("view_as_complex")
def _view_as_complex(op: OpView) -> Rule:
    kept = list(range(op.operands[0].ndim - 1))
    return Linked([[*kept, None]], [kept])


@register_rule("view_as_real")
def _view_as_real(op: OpView) -> Rule:
    kept = list(range(op.operands[0].ndim))
    return Linked([kept], [[*kept, None]])


# --------------------------------------------------------------------------- look-ups


@register_rule("embedding")
def _embedding(op: OpView) -> Rule:
    kept = list(range(op.operands[1].ndim))
    return Linked([[None, None], kept], [[*kept, None]])


@register_rule("index_select")
def _index_select(op: OpView) -> Rule:
    x = op.operands[0]
    dim = op.dim("dim", x.ndim)
    names: Names = [None if d == dim else d for d in range(x.ndim)]
    return Linked([names, [dim] * op.operands[1].ndim], [list(range(x.ndim))])


@register_rule("gather", "take_along_dim")
def _gather(op: OpView) -> Rule | None:
    x, index = op.operands[0], op.operands[1]
    if op.args["dim"] is None:
        return None
    dim = op.dim("dim", x.ndim)
    # An index narrower than the source pairs row r with source row r: such a dim cannot be cut on one side only.
    paired = [d for d in range(x.ndim) if d != dim and x.shape[d] == index.shape[d]]
    source: Names = [d if d in paired else None for d in range(x.ndim)]
    names: Names = [d if d in paired or d == dim else None for d in range(x.ndim)]
    return Linked([source, names], [names])


@register_rule("index")
def _index(op: OpView) -> Rule | None:
    x = op.operands[0]
    slots = op.args["indices"]
    used = [d for d, slot in enumerate(slots) if isinstance(slot, Operand)]
    if not used or used != list(range(used[0], used[-1] + 1)):
        return None
    if any(op.operands[i].node.meta["val"].dtype == torch.bool for i in range(1, len(op.operands))):
        return None
    width = max(op.operands[i].ndim for i in range(1, len(op.operands)))
    out_dims = len(op.out_shapes[0])
    index_out = op.out_shapes[0][used[0] : used[0] + width]
    before = list(range(used[0]))
    after = list(range(used[0] + width, out_dims))
    ins: list[Names] = [[*before, *[None] * len(used), *after]]
    for operand in op.operands[1:]:
        dims = [name if isinstance(name, int) else None for name in aligned(operand.shape, index_out)]
        ins.append([None if dim is None else dim + used[0] for dim in dims])
    if len(ins[0]) != x.ndim:
        return None
    return Linked(ins, [list(range(out_dims))])


@register_rule("one_hot")
def _one_hot(op: OpView) -> Rule | None:
    if int(op.args["num_classes"]) < 0:
        return None
    kept = list(range(op.operands[0].ndim))
    return Linked([kept], [[*kept, None]])


# --------------------------------------------------------------------------- convolution and resampling


@register_rule("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d")
def _convolution(op: OpView) -> Rule:
    x, weight = op.operands[:2]
    spatial = x.ndim - 2
    names: list[Hashable | None] = [0, None]
    pointwise = (
        all(size == 1 for size in weight.shape[2:])
        and all(int(s) == 1 for s in _listed(op.args.get("stride")))
        and op.args.get("padding") not in ("same", "valid")
        and all(int(p) == 0 for p in _listed(op.args.get("padding")))
        and not op.args.get("transposed")
        and "transpose" not in op.name
    )
    names += [2 + d if pointwise else None for d in range(spatial)]
    ins: list[Names] = [names, *([None] * operand.ndim for operand in op.operands[1:])]
    return Linked(ins, [names])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value or 0]


@register_rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
               "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
               "upsample_bicubic2d", "_adaptive_avg_pool2d", "upsample_trilinear3d", "_upsample_nearest_exact2d",
               "replication_pad1d", "replication_pad2d", "replication_pad3d", "reflection_pad1d",
               "reflection_pad2d", "pixel_shuffle", "pixel_unshuffle")  # fmt: skip
def _resample(op: OpView) -> Rule:
    x = op.operands[0]
    kept = x.ndim - {"1": 1, "2": 2, "3": 3}.get(op.name.rstrip("d")[-1:], 3)
    if op.name.startswith("pixel"):
        kept = x.ndim - 3
    names: Names = [*range(kept), *[None] * (x.ndim - kept)]
    return Linked([names], [names])
