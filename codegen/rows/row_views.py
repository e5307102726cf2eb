"""Rules of views: what each makes of the place that is asked for, and which part of a cat it lies in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from sfcompile.codegen.rows.indices import Atom, Index, Remainder, reshaped
from sfcompile.codegen.rows.op_table import argument, broadcast, dim_of, first_of, register, shape_of
from sfcompile.codegen.rows.rows import CannotFollowError, Condition, Conditions, Place, RowText, Value, name_of


@register(
    "view.default", "reshape.default", "_unsafe_view.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims",
    "squeeze.default", "flatten.using_ints", "unflatten.int", view=True,
)  # fmt: skip
def _reshape(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    source = first_of(node)
    return text.at(source, reshaped(place, shape_of(node), shape_of(source)), conditions)


@register(
    "alias.default", "clone.default", "contiguous.default", "detach.default", "lift_fresh_copy.default", view=True
)
def _same(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    return text.at(first_of(node), place, conditions)


@register("permute.default", view=True)
def _permute(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    dims = [dim_of(dim, len(place)) for dim in argument(node, "dims")]
    moved = [Index()] * len(place)
    for at, dim in zip(place, dims, strict=True):
        moved[dim] = at
    return text.at(first_of(node), tuple(moved), conditions)


@register("transpose.int", view=True)
def _transpose(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    a, b = (dim_of(argument(node, name), len(place)) for name in ("dim0", "dim1"))
    moved = list(place)
    moved[a], moved[b] = moved[b], moved[a]
    return text.at(first_of(node), tuple(moved), conditions)


@register("expand.default", view=True)
def _expand(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    return text.at(first_of(node), broadcast(place, first_of(node)), conditions)


@register("slice.Tensor", view=True)
def _slice(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    source = first_of(node)
    dim = dim_of(argument(node, "dim"), len(place))
    start, _, step = _span(node, shape_of(source)[dim])
    return text.at(source, _replace(place, dim, place[dim] * step + start), conditions)


@register("select.int", view=True)
def _select(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    source = first_of(node)
    dim = dim_of(argument(node, "dim"), len(place) + 1)
    at = int(argument(node, "index")) % shape_of(source)[dim]
    return text.at(source, (*place[:dim], Index((), at), *place[dim:]), conditions)


@register("getitem", view=True)
def _getitem(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    """A part of a split, chunk or unbind."""
    parts, number = node.args
    name = name_of(parts) if isinstance(parts, fx.Node) else ""
    if not isinstance(parts, fx.Node) or name not in _PARTS or not isinstance(number, int):
        raise CannotFollowError(node, "a part of something else than a split")
    source = first_of(parts)
    rank = len(shape_of(source))
    dim = dim_of(argument(parts, "dim"), rank)
    if name == "unbind.int":
        return text.at(source, (*place[:dim], Index((), number % shape_of(source)[dim]), *place[dim:]), conditions)
    sizes = [int(part.shape[dim]) for part in parts.meta["val"]]
    return text.at(source, _replace(place, dim, place[dim] + sum(sizes[:number])), conditions)


_PARTS = {"unbind.int", "split.Tensor", "split_with_sizes.default", "chunk.default", "split.sizes"}


@register(*_PARTS, view=True)
def _parts(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    raise CannotFollowError(node, "several tensors")  # asked for through getitem only


@register("repeat_interleave.self_int", view=True)
def _repeat_interleave(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    if argument(node, "dim") is None:
        raise CannotFollowError(node, "repeats a flattened tensor")
    dim = dim_of(argument(node, "dim"), len(place))
    return text.at(first_of(node), _replace(place, dim, place[dim] // int(argument(node, "repeats"))), conditions)


@register("cat.default")
def _cat(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    tensors = node.args[0]
    assert isinstance(tensors, (list, tuple))
    dim = dim_of(argument(node, "dim"), len(place))
    parts: list[Part] = []
    start = 0
    for tensor in tensors:
        if not isinstance(tensor, fx.Node) or 0 in shape_of(tensor):
            continue
        size = shape_of(tensor)[dim]
        parts.append((tensor, _replace(place, dim, (place[dim] + -start).within(size)), size))
        start += size
    return _one_of(text, node, place, dim, conditions, parts)


@register("stack.default")
def _stack(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    tensors = node.args[0]
    assert isinstance(tensors, (list, tuple))
    dim = dim_of(argument(node, "dim"), len(place))
    rest = (*place[:dim], *place[dim + 1 :])
    return _one_of(text, node, place, dim, conditions, [(tensor, rest, 1) for tensor in tensors])


Part = tuple[Any, Place, int]
"""One operand of a cat: the tensor, the place in it, and its size along the dim of the cat."""


def _one_of(
    text: RowText, node: fx.Node, place: Place, dim: int, conditions: Conditions, parts: Sequence[Part]
) -> Value:
    """The value of the part that ``place[dim]`` is in."""
    pair = _parity(place[dim])
    if pair is not None:
        return text.by_parity(node, place, conditions, pair)
    value: Value | None = None
    end = sum(size for _, _, size in parts)
    for tensor, at, size in reversed(parts):  # the last part needs no test: it is what is left
        first, last = end - size, end
        end = first
        below, above = Condition.of(place[dim], last, True), Condition.of(place[dim], first, False)
        if below.known is False or above.known is False:
            continue
        inside = tuple(entry for entry in (below, above) if entry.known is None and entry not in conditions)
        part = text.at(tensor, at, (*conditions, *inside))
        value = part if value is None else text.chosen(node, below, part, value)
    assert value is not None
    return value


def _parity(index: Index) -> Atom | None:
    """The column atom whose parity chooses the part, if that is what chooses it."""
    for factor, _ in index.terms:
        if isinstance(factor, Remainder) and factor.by == 2:
            (inner, times), *others = factor.index.terms
            even = isinstance(inner, Atom) and inner.block > 1 and inner.size % 2 == 0
            if isinstance(inner, Atom) and even and not others and times == 1:
                return inner
    return None


@register("slice_scatter.default")
def _slice_scatter(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    source, written = first_of(node), argument(node, "src")
    dim = dim_of(argument(node, "dim"), len(place))
    at = place[dim]
    start, stop, step = _span(node, shape_of(node)[dim])
    turn = (at + -start) % step
    if turn.terms:
        (factor, times), *others = at.terms
        plain = isinstance(factor, Atom) and factor.block > 1 and factor.size % 2 == 0 and times == 1 and not others
        if not isinstance(factor, Atom) or not plain or step != 2:
            raise CannotFollowError(node, "steps that are not every other column")
        return text.by_parity(node, place, conditions, factor)
    if turn.start:
        return text.at(source, place, conditions)
    inside = [Condition.of(at, start, False), Condition.of(at, stop, True)]
    if any(entry.known is False for entry in inside):
        return text.at(source, place, conditions)
    inside = [entry for entry in inside if entry.known is None]
    moved = _replace(place, dim, ((at + -start) // step).within(shape_of(written)[dim]))
    value = text.at(written, moved, (*conditions, *(entry for entry in inside if entry not in conditions)))
    for entry in inside:
        value = text.chosen(node, entry, value, text.at(source, place, conditions))
    return value


@register("copy.default", pointwise=True)
def _copy(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    source = argument(node, "src")
    return text.rounded(text.at(source, broadcast(place, source), conditions), node.meta["val"].dtype, node)


@register("empty_like.default", view=True)
def _empty(text: RowText, node: fx.Node, place: Place, conditions: Conditions) -> Value:
    return Value("0.0")  # whatever it holds is never used


def _replace(place: Place, dim: int, index: Index) -> Place:
    return (*place[:dim], index, *place[dim + 1 :])


def _span(node: fx.Node, size: int) -> tuple[int, int, int]:
    """Start, stop and step of a slice of a dim."""
    start, stop, step = (argument(node, name) for name in ("start", "end", "step"))
    if not all(entry is None or isinstance(entry, int) for entry in (start, stop, step)):
        raise CannotFollowError(node, "its bounds are no numbers")
    return slice(start, stop, step).indices(size)
