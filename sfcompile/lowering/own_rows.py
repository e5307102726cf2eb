"""Bounds that differ by rank leave the graph: what is left is the same on every rank that holds as many rows.

A rank's own rows of a value are a slice with this rank's bounds, and most often the only thing in which the graphs of
two ranks differ. A slice of an input is taken before the graph is called: the same view, no copy, a few microseconds.
One of a value that the graph computes (a table of positions, a halo) becomes an `index_select` by rows that are an
input; Inductor fuses that into what reads it, but where it cannot, it is a copy that the slice was not. So it is done
only where all of them are a small part of what the graph writes anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import fx

from sfcompile.torch_private import FakeTensorMode, module_of

_SLICE = torch.ops.aten.slice.Tensor
_COPIED = 0.01
"""Rows that are selected rather than sliced are at most this part of all elements that a graph's nodes write."""

Bounds = tuple[int, int, int, int]
"""Of a slice: dim, start, stop and step."""


class OwnRows(NamedTuple):
    """What a rank hands to its graph beside the inputs: a slice of one, or (``source`` None) its rows' numbers."""

    source: int | None
    bounds: Bounds


def slices_of(gm: fx.GraphModule) -> tuple[str, dict[str, Bounds]]:
    """A graph's text without the bounds of its slices, with the shapes of its values; and the bounds by node."""
    bounds_of: dict[str, Bounds] = {}
    lines = []
    for node in gm.graph.nodes:
        bounds = bounds_of_slice(node)
        args = node.args[:1] if bounds else node.args
        value = node.meta.get("val")
        shape = (tuple(value.shape), value.stride(), str(value.dtype)) if isinstance(value, torch.Tensor) else ""
        lines.append(f"{node.name} = {node.op} {node.target} {args} {node.kwargs} {shape}")
        if bounds:
            bounds_of[node.name] = bounds
    return "\n".join(lines), bounds_of


def differing(all_bounds: Sequence[Mapping[str, Sequence[int]]]) -> set[str]:
    """The slices that are not the same on all of these ranks, whose graphs are the same but for bounds."""
    first = all_bounds[0]
    return {name for name in first if any(list(other[name]) != list(first[name]) for other in all_bounds[1:])}


def can_take_out(gm: fx.GraphModule, names: Collection[str]) -> bool:
    """Whether these slices may leave the graph: those of computed values are small beside all that it computes."""
    written = [_size(node) for node in gm.graph.nodes if node.op == "call_function" and not bounds_of_slice(node)]
    selected = [_size(node) for node in gm.graph.nodes if node.name in names and _source(node).op != "placeholder"]
    return sum(selected) <= _COPIED * sum(written)


def take_out(gm: fx.GraphModule, mode: FakeTensorMode, names: Collection[str]) -> tuple[fx.GraphModule, list[OwnRows]]:
    """A copy of a graph in which these slices come as inputs, behind its own; and what those are on this rank.

    In the copy's metadata a slice starts at address zero of its memory, whatever the rank: Inductor looks at the real
    ones at every call where it matters.
    """
    graph = fx.Graph()
    result = graph.graph_copy(gm.graph, {})
    graph.output(result)
    places = [node for node in graph.nodes if node.op == "placeholder"]
    last = places[-1]
    rows: list[OwnRows] = []
    for node in list(graph.nodes):
        bounds = bounds_of_slice(node)
        if node.name not in names or bounds is None:
            continue
        source, value = _source(node), node.meta["val"]
        with graph.inserting_after(last):
            last = graph.placeholder(f"own_rows_{len(rows)}")
        if source in places:
            rows.append(OwnRows(places.index(source), bounds))
            with mode:
                like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            node.replace_all_uses_with(last)
        else:
            rows.append(OwnRows(None, bounds))
            with mode:
                like = torch.empty(value.shape[bounds[0]], dtype=torch.int64, device=value.device)
            with graph.inserting_before(node):
                selected = graph.call_function(torch.ops.aten.index_select.default, (source, bounds[0], last))
            selected.meta = dict(node.meta)
            node.replace_all_uses_with(selected)
        last.meta = {"val": like}
        graph.erase_node(node)
    graph.lint()
    return module_of(gm, graph), rows


def with_rows(run: Callable[..., Any], rows: Sequence[OwnRows], device: torch.device) -> Callable[..., Any]:
    """A compiled graph as it is called: its inputs, and behind them this rank's rows."""
    if not rows:
        return run
    numbers = [torch.arange(*each.bounds[1:], device=device) if each.source is None else None for each in rows]

    def call(*inputs: Any) -> Any:
        own = [
            number if each.source is None else _SLICE(inputs[each.source], *each.bounds)
            for each, number in zip(rows, numbers, strict=True)
        ]
        return run(*inputs, *own)

    return call


def bounds_of_slice(node: fx.Node) -> Bounds | None:
    """Of a slice by numbers, as they are once what is left out or beyond the end is said; None: it is no such slice."""
    if node.op != "call_function" or node.target is not _SLICE or node.kwargs:
        return None
    args: tuple[Any, ...] = node.args
    said: list[Any] = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
    size = args[0].meta["val"].shape[said[0]]
    if not all(value is None or type(value) is int for value in (*said, size)):
        return None
    start, stop, step = slice(*said[1:]).indices(size)
    return said[0], start, max(start, stop), step


def _source(node: fx.Node) -> fx.Node:
    """What a slice is taken of."""
    source: Any = node.args[0]
    return cast(fx.Node, source)


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    return math.prod(value.shape) if isinstance(value, torch.Tensor) else 0
