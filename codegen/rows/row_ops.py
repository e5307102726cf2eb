"""The ATen ops of row programs: what each makes of an index, or of its operands' values (rows.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sfcompile.codegen.rows.indices import Atom, Index, Remainder, is_column, reshaped
from sfcompile.codegen.rows.rows import (
    ELEMENTS,
    CannotFollowError,
    Condition,
    Conditions,
    Place,
    RowProgram,
    RowText,
    Value,
    name_of,
)

Op = Callable[[RowText, fx.Node, Place, Conditions], Value]
OPS: dict[str, Op] = {}
"""By name_of a node."""
POINTWISE: set[str] = set()
VIEWS: set[str] = set()
"""Names of ops that cost nothing to do twice."""


def compile_rows(root: fx.Node, inline: frozenset[fx.Node]) -> tuple[RowProgram, list[fx.Node]]:
    """The program of a node [B, H, L, W] and its sources.

    Args:
        inline: nodes that may be computed in it, the root among them.

    Raises:
        CannotFollowError: one of them cannot; its ``node`` should be a source.
    """
    value = root.meta["val"]
    if value.dim() != 4 or value.dtype not in ELEMENTS or 0 in value.shape:
        raise CannotFollowError(root, f"rows of {value.dtype}{list(value.shape)}")
    text = RowText(root, inline, OPS)
    made = text.result()
    eager, sources = _eager(root, inline, text.sources)
    values = [source.meta["val"] for source in sources]
    unread = [source for source, value in zip(sources, values, strict=True) if value.dtype not in ELEMENTS]
    if unread:
        raise CannotFollowError(root, f"{unread[0]} is no source")
    program = RowProgram(
        ELEMENTS[value.dtype],
        int(value.shape[-1]),
        tuple(tuple(sorted(text.dims.get(source, ()))) for source in sources),
        tuple(ELEMENTS[entry.dtype] for entry in values),
        tuple(text.head),
        tuple(text.lines),
        made.name,
        tuple(tuple(map(int, entry.shape)) for entry in (*values, value)),
        eager,
    )
    return program, sources


def _eager(
    root: fx.Node, inline: frozenset[fx.Node], sources: Sequence[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The same nodes as a module, for ranks without kernels; and its inputs: the sources, and what only shapes it.

    (The memory that a copy goes to is an operand in the graph, and a kernel never reads it.)
    """
    graph = fx.Graph()
    inside = [node for node in root.graph.nodes if node in inline]
    outside = {value: None for node in inside for value in node.all_input_nodes if value not in inline}
    inputs = list(dict.fromkeys([*sources, *outside]))
    copies = {value: graph.placeholder(f"s{i}") for i, value in enumerate(inputs)}
    for node in inside:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if copies[node].target is torch.ops.aten.view.default:  # at run time a source may have other strides
            copies[node].target = torch.ops.aten.reshape.default
    graph.output(copies[root])
    graph.eliminate_dead_code()
    unread = [value for value in inputs if value not in sources and not copies[value].users]
    for value in unread:
        graph.erase_node(copies[value])
    return fx.GraphModule(torch.nn.Module(), graph), [value for value in inputs if value not in unread]


def _op(*names: str, view: bool = False, pointwise: bool = False) -> Callable[[Op], Op]:
    def register(op: Op) -> Op:
        for name in names:
            OPS[name] = op
            if view:
                VIEWS.add(name)
            if pointwise:
                POINTWISE.add(name)
        return op

    return register


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of an ATen call by its name in the schema."""
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, argument.default_value)
    raise CannotFollowError(node, f"it has no argument {name}")


def _first(node: fx.Node) -> fx.Node:
    first = node.args[0]
    if not isinstance(first, fx.Node):
        raise CannotFollowError(node, "its first argument is no tensor")
    return first


def _dim(node: fx.Node, value: Any, rank: int) -> int:
    return int(value) % rank


# ---------------------------------------------------------------------- views


@_op(
    "view.default", "reshape.default", "_unsafe_view.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims",
    "squeeze.default", "flatten.using_ints", "unflatten.int", view=True,
)  # fmt: skip
def _reshape(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    source = _first(node)
    return text.at(source, reshaped(place, _shape(node), _shape(source)), given)


@_op("alias.default", "clone.default", "contiguous.default", "detach.default", "lift_fresh_copy.default", view=True)
def _same(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    return text.at(_first(node), place, given)


@_op("permute.default", view=True)
def _permute(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    dims = [_dim(node, dim, len(place)) for dim in _argument(node, "dims")]
    moved = [Index()] * len(place)
    for at, dim in zip(place, dims, strict=True):
        moved[dim] = at
    return text.at(_first(node), tuple(moved), given)


@_op("transpose.int", view=True)
def _transpose(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    a, b = (_dim(node, _argument(node, name), len(place)) for name in ("dim0", "dim1"))
    moved = list(place)
    moved[a], moved[b] = moved[b], moved[a]
    return text.at(_first(node), tuple(moved), given)


@_op("expand.default", view=True)
def _expand(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    return text.at(_first(node), _broadcast(place, _first(node)), given)


@_op("slice.Tensor", view=True)
def _slice(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    source = _first(node)
    dim = _dim(node, _argument(node, "dim"), len(place))
    start, _, step = _span(node, _shape(source)[dim])
    return text.at(source, _replace(place, dim, place[dim] * step + start), given)


@_op("select.int", view=True)
def _select(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    source = _first(node)
    dim = _dim(node, _argument(node, "dim"), len(place) + 1)
    at = int(_argument(node, "index")) % _shape(source)[dim]
    return text.at(source, (*place[:dim], Index((), at), *place[dim:]), given)


@_op("getitem", view=True)
def _getitem(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    """A part of a split, chunk or unbind."""
    parts, number = node.args
    name = name_of(parts) if isinstance(parts, fx.Node) else ""
    if not isinstance(parts, fx.Node) or name not in _PARTS or not isinstance(number, int):
        raise CannotFollowError(node, "a part of something else than a split")
    source = _first(parts)
    rank = len(_shape(source))
    dim = _dim(parts, _argument(parts, "dim"), rank)
    if name == "unbind.int":
        return text.at(source, (*place[:dim], Index((), number % _shape(source)[dim]), *place[dim:]), given)
    sizes = [int(part.shape[dim]) for part in parts.meta["val"]]
    return text.at(source, _replace(place, dim, place[dim] + sum(sizes[:number])), given)


_PARTS = {"unbind.int", "split.Tensor", "split_with_sizes.default", "chunk.default", "split.sizes"}


@_op(*_PARTS, view=True)
def _parts(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    raise CannotFollowError(node, "several tensors")  # asked for through getitem only


@_op("repeat_interleave.self_int", view=True)
def _repeat_interleave(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    if _argument(node, "dim") is None:
        raise CannotFollowError(node, "repeats a flattened tensor")
    dim = _dim(node, _argument(node, "dim"), len(place))
    return text.at(_first(node), _replace(place, dim, place[dim] // int(_argument(node, "repeats"))), given)


@_op("cat.default")
def _cat(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    filled = [part for part in parts if isinstance(part, fx.Node) and 0 not in _shape(part)]
    dim = _dim(node, _argument(node, "dim"), len(place))
    places: list[Place] = []
    sizes: list[int] = []
    for part in filled:
        places.append(_replace(place, dim, (place[dim] + -sum(sizes)).within(_shape(part)[dim])))
        sizes.append(_shape(part)[dim])
    return _one_of(text, node, place, dim, given, filled, places, sizes)


@_op("stack.default")
def _stack(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    dim = _dim(node, _argument(node, "dim"), len(place))
    rest = (*place[:dim], *place[dim + 1 :])
    return _one_of(text, node, place, dim, given, parts, [rest] * len(parts), [1] * len(parts))


def _one_of(
    text: RowText, node: fx.Node, place: Place, dim: int, given: Conditions, parts: Sequence[Any],
    places: Sequence[Place], sizes: Sequence[int],
) -> Value:  # fmt: skip
    """The value of the part that ``place[dim]`` is in."""
    pair = _parity(place[dim])
    if pair is not None:
        return text.by_parity(node, place, given, pair)
    found: Value | None = None
    end = sum(sizes)
    for part, at, size in reversed(list(zip(parts, places, sizes, strict=True))):
        first, end = end - size, end
        below, above = Condition.of(place[dim], end, True), Condition.of(place[dim], first, False)
        end = first
        if below.known is False or above.known is False:
            continue
        inside = tuple(entry for entry in (below, above) if entry.known is None and entry not in given)
        value = text.at(part, at, (*given, *inside))
        found = value if found is None else text.chosen(node, below, value, found)
    assert found is not None
    return found


def _parity(index: Index) -> Atom | None:
    """The column atom whose parity chooses the part, if that is what chooses it."""
    for factor, _ in index.terms:
        if isinstance(factor, Remainder) and factor.by == 2:
            (inner, times), *others = factor.index.terms
            even = isinstance(inner, Atom) and inner.block > 1 and inner.size % 2 == 0
            if isinstance(inner, Atom) and even and not others and times == 1:
                return inner
    return None


@_op("slice_scatter.default")
def _slice_scatter(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    source, written = _first(node), _argument(node, "src")
    dim = _dim(node, _argument(node, "dim"), len(place))
    at = place[dim]
    start, stop, step = _span(node, _shape(node)[dim])
    turn = (at + -start) % step
    if turn.terms:
        (factor, times), *others = at.terms
        plain = isinstance(factor, Atom) and factor.block > 1 and factor.size % 2 == 0 and times == 1 and not others
        if not isinstance(factor, Atom) or not plain or step != 2:
            raise CannotFollowError(node, "steps that are not every other column")
        return text.by_parity(node, place, given, factor)
    if turn.start:
        return text.at(source, place, given)
    inside = [Condition.of(at, start, False), Condition.of(at, stop, True)]
    if any(entry.known is False for entry in inside):
        return text.at(source, place, given)
    inside = [entry for entry in inside if entry.known is None]
    moved = _replace(place, dim, ((at + -start) // step).within(_shape(written)[dim]))
    value = text.at(written, moved, (*given, *(entry for entry in inside if entry not in given)))
    for entry in inside:
        value = text.chosen(node, entry, value, text.at(source, place, given))
    return value


@_op("copy.default", pointwise=True)
def _copy(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    source = _argument(node, "src")
    return text.rounded(text.at(source, _broadcast(place, source), given), node.meta["val"].dtype, node)


@_op("empty_like.default", view=True)
def _empty(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    return Value("0.0")  # whatever it holds is never used


def _broadcast(place: Place, source: fx.Node) -> Place:
    """A place of a tensor that ``source`` is broadcast to, in the source."""
    shape = _shape(source)
    last = place[len(place) - len(shape) :]
    return tuple(Index() if size == 1 else at for at, size in zip(last, shape, strict=True))


def _replace(place: Place, dim: int, index: Index) -> Place:
    return (*place[:dim], index, *place[dim + 1 :])


def _span(node: fx.Node, size: int) -> tuple[int, int, int]:
    """Start, stop and step of a slice of a dim."""
    start, stop, step = (_argument(node, name) for name in ("start", "end", "step"))
    if not all(entry is None or isinstance(entry, int) for entry in (start, stop, step)):
        raise CannotFollowError(node, "its bounds are no numbers")
    return slice(start, stop, step).indices(size)


FREE = frozenset(VIEWS - {"clone.default", "contiguous.default", "repeat_interleave.self_int"})
"""Views that no op has to compute: a plain put reads through them."""


# ---------------------------------------------------------------------- pointwise


def _operand(text: RowText, node: fx.Node, operand: Any, place: Place, given: Conditions) -> Value:
    if isinstance(operand, fx.Node):
        return text.at(operand, _broadcast(place, operand), given)
    if isinstance(operand, bool) or not isinstance(operand, (int, float)) or not math.isfinite(operand):
        raise CannotFollowError(node, f"operand {operand}")
    return Value(f"{float(operand)!r}" if operand >= 0 else f"({float(operand)!r})")


def _pointwise(pattern: str, *names: str) -> None:
    def op(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None or len(node.args) > 2:
            raise CannotFollowError(node, "more arguments than operands")
        operands = [_operand(text, node, value, place, given) for value in node.args[: pattern.count("{}")]]
        return text.rounded(text.combined(node, pattern, operands), node.meta["val"].dtype, node)

    _op(*names, pointwise=True)(op)


_pointwise("{} + {}", "add.Tensor", "add.Scalar")
_pointwise("{} - {}", "sub.Tensor", "sub.Scalar")
_pointwise("{} * {}", "mul.Tensor", "mul.Scalar")
_pointwise("{} / {}", "div.Tensor", "div.Scalar")
_pointwise("-{}", "neg.default")
_pointwise("tl.rsqrt({})", "rsqrt.default")
_pointwise("tl.sqrt({})", "sqrt.default")
_pointwise("1.0 / {}", "reciprocal.default")


@_op("_to_copy.default", "to.dtype", "type_as.default", pointwise=True)
def _cast(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    return text.rounded(text.at(_first(node), place, given), node.meta["val"].dtype, node)


@_op("square.default", "pow.Tensor_Scalar", pointwise=True)
def _power(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    power = 2 if name_of(node) == "square.default" else node.args[1]
    patterns = {2: "{0} * {0}", 0.5: "tl.sqrt({0})", -0.5: "tl.rsqrt({0})", -1: "1.0 / {0}"}
    if power not in patterns:
        raise CannotFollowError(node, f"power {power}")
    value = text.combined(node, patterns[power], [text.at(_first(node), place, given)])  # type: ignore[index]
    return text.rounded(value, node.meta["val"].dtype, node)


# ---------------------------------------------------------------------- over the columns of a row


def _total(text: RowText, node: fx.Node, value: Value, size: int) -> Value:
    """The sum over all columns."""
    columns = text.columns_of(size)
    block = text.full(value, value.rows, columns)
    if columns.block != size:
        block = text.emit(f"tl.where(({columns.name} < {size})[None, :], {block}, 0.0)")
    return Value(text.emit(f"tl.sum({block}, axis=1)[:, None]"), value.rows)


def _whole_row(text: RowText, source: fx.Node, place: Place, given: Conditions, size: int) -> Value:
    """A row's values, all columns."""
    whole = Index.of(text.columns_of(size))
    by_row = tuple(entry for entry in given if not any(is_column(factor) for factor, _ in entry.index.terms))
    return text.at(source, (*place[:-1], whole), by_row)


@_op("mean.dim", "sum.dim_IntList")
def _mean(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    source = _first(node)
    rank = len(_shape(source))
    dims = [_dim(node, dim, rank) for dim in _argument(node, "dim") or range(rank)]
    if dims != [rank - 1]:
        raise CannotFollowError(node, f"over dims {dims}")
    size = _shape(source)[-1]
    full = place if _argument(node, "keepdim") else (*place, Index())
    total = _total(text, node, _whole_row(text, source, full, given, size), size)
    if name_of(node) == "mean.dim":
        total = replace(total, name=text.emit(f"{total.name} / {float(size)}"))
    return text.rounded(total, node.meta["val"].dtype, node)


@_op("rms_norm.default", "layer_norm.default")
def _norm(text: RowText, node: fx.Node, place: Place, given: Conditions) -> Value:
    source = _first(node)
    (size,) = _argument(node, "normalized_shape") if len(_argument(node, "normalized_shape")) == 1 else (0,)
    if not size:
        raise CannotFollowError(node, "over several dims")
    row, here = _whole_row(text, source, place, given, size), text.at(source, place, given)
    if name_of(node) == "layer_norm.default":
        total = _total(text, node, row, size)
        mean = replace(total, name=text.emit(f"{total.name} / {float(size)}"))
        row, here = (text.combined(node, "{} - {}", [value, mean]) for value in (row, here))
    squares = text.combined(node, "{0} * {0}", [row])
    eps = _argument(node, "eps")
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    total = _total(text, node, squares, size)
    scale = replace(total, name=text.emit(f"tl.rsqrt({total.name} / {float(size)} + {eps!r})"))
    value = text.combined(node, "{} * {}", [here, scale])
    for name, sign in (("weight", "*"), ("bias", "+")):
        factor = _argument(node, name) if name == "weight" or name_of(node) == "layer_norm.default" else None
        if factor is not None:
            value = text.combined(node, f"{{}} {sign} {{}}", [value, text.at(factor, place[-1:], given)])
    return text.rounded(value, node.meta["val"].dtype, node)
