"""Repeated blocks of a local graph are compiled once: what a compile takes grows with distinct blocks, not with depth.

The graph is cut where its blocks begin (repeats.py) into regions (regions.py); equal ones share what the compiler made
of the first. A call runs them one after the other and hands values on as they are, a shard stays a shard. A value is
gone after the last region that reads it, inside of that one after its last use.

What is computed is the same, in the same order. What the compiler cannot do any more is to fuse across a cut: the
values that cross it are written and read. So cuts lie where few bytes cross, and a graph that spares little is left
whole. Left whole is also what is only right in one piece: a graph that draws random numbers (a compiler takes seeds
once a graph, so ranks that cut differently would draw differently), one that writes in place (who reads the memory is
seen in a whole graph only); and no cut lies between a put that may read its source late and the node that holds it
(passes/graph/lifetimes.py): a compiler may hand on a copy of what the put reads.

A graph without repeated blocks is cut too where several ranks of a machine compile it for all of them: into a few
stretches of about as many calls, so that each rank compiles one meanwhile. It is done only where next to nothing
crosses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx

from sfcompile.capture.randomness import call_draws
from sfcompile.lowering.regions import Region, is_pick, letter, region_of, sites_of
from sfcompile.lowering.repeats import WORTH, cuts, longest_repeat
from sfcompile.runtime.rank.ops import sites_from
from sfcompile.torch_private import FakeTensorMode, OpOverload, takes_list

Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
Turns = Callable[[Sequence[int]], Iterable[int]]
"""Of the sizes of pieces, in calls: their numbers, each once, as they are to be compiled. It is asked for the next one
when the one before is compiled."""
NAMED = 3
"""So many differences between blocks are named."""
STRETCH = 100
"""Calls of the shortest stretch that is cut off only so that another rank can compile it meanwhile."""
CROSSES = 0.02
"""What crosses such a cut is at most this part of the bytes that all calls write."""


def in_a_row(sizes: Sequence[int]) -> Iterable[int]:
    """One piece after the other."""
    return range(len(sizes))


class Blocks(NamedTuple):
    """A graph as regions in order, some of which may be equal."""

    gm: fx.GraphModule
    regions: tuple[Region, ...]

    @property
    def spared(self) -> int:
        """Calls that need not be compiled, as an equal region is."""
        kept = {region.key: len(region.nodes) for region in self.regions}
        return sum(len(region.nodes) for region in self.regions) - sum(kept.values())

    @property
    def repeats(self) -> bool:
        """Whether some are equal."""
        return len({region.key for region in self.regions}) < len(self.regions)

    def __str__(self) -> str:
        counts = Counter(region.key for region in self.regions)
        if not self.repeats:
            return f"{len(counts)} stretches, which ranks compile side by side"
        kinds = [count for count in counts.values() if count > 1]
        others = len(counts) - len(kinds)
        between = f"; {others} stretch{'es' * (others > 1)} around them" if others else ""
        return f"{sum(kinds)} blocks, {len(kinds)} distinct, compiled once each{between}"

    def compiled(self, mode: FakeTensorMode, compile: Compile, turns: Turns = in_a_row) -> Callable[..., Any]:
        """The graph's callable. ``compile`` is called once for each distinct region."""
        runs: dict[Hashable, Callable[[list[Any]], Sequence[Any]]] = {}
        first: dict[Hashable, Region] = {}
        for region in self.regions:
            first.setdefault(region.key, region)
        distinct = list(first.values())
        for i in turns([len(region.nodes) for region in distinct]):
            runs[distinct[i].key] = takes_list(compile(*distinct[i].as_module(self.gm, mode)))
        return _in_turn(self.gm, self.regions, [runs[region.key] for region in self.regions])


def blocks_of(gm: fx.GraphModule) -> Blocks | None:
    """The repeated blocks of a local graph; None: it has none that are worth it, or is only right in one piece."""
    calls = _in_order(gm.graph)
    if not calls or not all(map(_can_leave, gm.graph.nodes)):
        return None
    letters: dict[Hashable, int] = {}
    text = [letters.setdefault(letter(node), len(letters)) for node in calls]
    places = cuts(text, _costs(calls))
    pieces = [calls[first:stop] for first, stop in zip([0, *places], [*places, len(calls)], strict=True)]
    blocks = Blocks(gm, _joined([region_of(nodes) for nodes in pieces]))
    if blocks.spared < WORTH or not all(region.outputs for region in blocks.regions):
        return None
    return blocks


def stretches_of(gm: fx.GraphModule, most: int) -> Blocks | None:
    """A local graph in up to ``most`` stretches of about as many calls, for as many ranks that compile at a time; None:
    it is too short, is only right in one piece, or too much crosses wherever it is cut."""
    calls = _in_order(gm.graph)
    count = min(most, len(calls) // STRETCH)
    if count < 2 or not all(map(_can_leave, gm.graph.nodes)):
        return None
    costs, nbytes = _costs(calls), sum(_size(node) for node in calls)
    reach = len(calls) // (4 * count)  # a cut lies so near to where stretches would be equally long
    places = []
    for i in range(1, count):
        middle = i * len(calls) // count
        place = min(range(middle - reach, middle + reach + 1), key=lambda at: (costs[at], abs(at - middle)))
        if costs[place] <= CROSSES * nbytes:
            places.append(place)
    pieces = [calls[first:stop] for first, stop in zip([0, *places], [*places, len(calls)], strict=True)]
    regions = tuple(map(region_of, pieces))
    return Blocks(gm, regions) if places and all(region.outputs for region in regions) else None


def _size(node: fx.Node) -> int:
    value = node.meta["val"]
    return math.prod(value.shape) * value.element_size() if isinstance(value, torch.Tensor) else 0


def why_distinct(gm: fx.GraphModule) -> str:
    """Where a graph's blocks call the same operators and are yet no two alike: how many, and what differs. Else ""."""
    calls = _in_order(gm.graph)
    loose: dict[Hashable, int] = {}
    text = [loose.setdefault((node.op, node.target), len(loose)) for node in calls]
    repeat = longest_repeat(np.asarray(text, dtype=np.int64)) if calls else None
    if repeat is None or repeat.spared < WORTH or not all(map(_can_leave, gm.graph.nodes)):
        return ""
    count = repeat.length // repeat.period
    rows = [calls[repeat.start + i :: repeat.period][:count] for i in range(repeat.period)]
    exact = [[letter(node) for node in row] for row in rows]
    different = [(row, letters) for row, letters in zip(rows, exact, strict=True) if len(set(letters)) > 1]
    distinct = len(set(zip(*exact, strict=True)))
    named = [_difference(row) for row, _ in different[:NAMED]]
    more = f", and {len(different) - NAMED} more" if len(different) > NAMED else ""
    if not named:
        return ""
    return f"{count} blocks call the same operators, {distinct} of them are distinct, by {'; '.join(named)}{more}"


def _difference(row: Sequence[fx.Node]) -> str:
    """What differs between calls of one place in every block, in words."""
    shapes = list(dict.fromkeys(str([tuple(node.meta["val"].shape) for node in (each, *each.all_input_nodes)
                                     if isinstance(node.meta.get("val"), torch.Tensor)]) for each in row))  # fmt: skip
    numbers = list(dict.fromkeys(", ".join(_constants((node.args, node.kwargs))) for node in row))
    values = numbers if len(numbers) > 1 else shapes
    what = "its numbers" if len(numbers) > 1 else "shapes" if len(shapes) > 1 else "strides or dtypes"
    shown = f" ({' / '.join(values[:NAMED])}{' / ...' if len(values) > NAMED else ''})" if len(values) > 1 else ""
    return f"{row[0].name} and its like: {what}{shown}"


def _constants(value: Any) -> list[str]:
    """The arguments of a call that are no values of other calls."""
    if isinstance(value, fx.Node):
        return []
    if isinstance(value, tuple | list):
        return [text for entry in value for text in _constants(entry)]
    if isinstance(value, dict):
        return [text for entry in value.values() for text in _constants(entry)]
    return [repr(value)]


def _in_order(graph: fx.Graph) -> list[fx.Node]:
    """The calls of a graph in their order, those that pick a result right behind what they pick it from."""
    order: dict[fx.Node, None] = {}

    def add(node: fx.Node) -> None:
        order.setdefault(node)
        for user in sorted(user for user in node.users if is_pick(user)):
            add(user)

    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            add(node)
    return list(order)


def _can_leave(node: fx.Node) -> bool:
    """Whether a node is right in a graph of its own too."""
    if node.op in ("output", "get_attr"):
        return True
    if node.op == "placeholder":
        return isinstance(node.meta.get("val"), torch.Tensor)
    if node.op != "call_function" or "val" not in node.meta:
        return False
    writes = isinstance(node.target, OpOverload) and node.target._schema.is_mutable
    return not writes and not call_draws(node.target, node.args, node.kwargs)


def _costs(calls: Sequence[fx.Node]) -> list[float]:
    """Bytes that are handed on where the calls are cut, before each and after the last; infinite: no cut there."""
    place = {node: i for i, node in enumerate(calls)}
    steps = [0.0] * (len(calls) + 1)
    barred = [0] * (len(calls) + 1)
    for node, i in place.items():
        last = max((place.get(user, len(calls)) for user in node.users), default=i)
        value = node.meta["val"]
        # A conjugated or negated view is its memory and a mark: what a region takes and gives is memory alone.
        if isinstance(value, torch.Tensor) and not value.is_conj() and not value.is_neg():
            steps[i] += _size(node)
            steps[last] -= _size(node)
        else:
            barred[i] += 1
            barred[last] -= 1
    for first, last in _held(calls, place):
        barred[first] += 1
        barred[last] -= 1
    costs, live, bars = [0.0], 0.0, 0
    for step, bar in zip(steps[:-1], barred[:-1], strict=True):
        live, bars = live + step, bars + bar
        costs.append(math.inf if bars else live)
    return costs


def _held(calls: Sequence[fx.Node], place: Mapping[fx.Node, int]) -> list[tuple[int, int]]:
    """From the first put of a site to the node that holds what it reads, where one does."""
    first: dict[tuple[str, int], int] = {}
    spans = []
    for node in calls:
        site = sites_of(node)
        if site is not None:
            first.setdefault(site, place[node])
            if node.kwargs.get("held"):
                spans.append((first[site], place[node]))
    return spans


def _joined(regions: Sequence[Region]) -> tuple[Region, ...]:
    """Regions of which those that are like no other are one with their neighbours of that kind."""
    counts = Counter(region.key for region in regions)
    joined: list[Region] = []
    alone = False
    for region in regions:
        if counts[region.key] > 1:
            joined.append(region)
        else:
            joined[-1:] = [region_of([*joined[-1].nodes, *region.nodes])] if alone else [*joined[-1:], region]
        alone = counts[region.key] == 1
    return tuple(joined)


class _RegionCall(NamedTuple):
    """One region in a call: ``takes`` and ``gives`` are places in the table of values, ``ends`` those read no more."""

    run: Callable[[list[Any]], Sequence[Any]]
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    ends: tuple[int, ...]
    first_site: dict[str, int]


def _in_turn(
    gm: fx.GraphModule, regions: Sequence[Region], runs: Sequence[Callable[[list[Any]], Sequence[Any]]]
) -> Callable[..., Any]:
    """A function of the graph's inputs that runs its regions."""
    place: dict[fx.Node, int] = {}
    constants: list[torch.Tensor] = []
    for kind in ("placeholder", "get_attr"):
        for node in gm.graph.nodes:
            if node.op == kind and (kind == "placeholder" or isinstance(node.meta.get("val"), torch.Tensor)):
                place[node] = len(place)
                if kind == "get_attr":
                    constants.append(_attribute(gm, str(node.target)))
    num_kept = len(place)
    for region in regions:
        for node in region.outputs:
            place[node] = len(place)
    result = gm.graph.output_node().args[0]
    last: dict[fx.Node, int] = {node: i for i, region in enumerate(regions) for node in region.inputs}
    for node in gm.graph.output_node().all_input_nodes:
        last[node] = len(regions)
    steps = []
    for i, (region, run) in enumerate(zip(regions, runs, strict=True)):
        ends = tuple(place[node] for node in (*region.inputs, *region.outputs) if last[node] == i)
        takes, gives = (tuple(map(place.__getitem__, nodes)) for nodes in (region.inputs, region.outputs))
        steps.append(_RegionCall(run, takes, gives, ends, region.first_site))
    rooms = [None] * (len(place) - num_kept)

    def call(*inputs: Any) -> Any:
        table = [*inputs, *constants, *rooms]
        for step in steps:
            args = [table[i] for i in step.takes]
            for i in step.ends:
                table[i] = None
            with sites_from(step.first_site):
                values = step.run(args)
            for i, value in zip(step.gives, values, strict=True):
                table[i] = value
            del args, value, values  # the next region is to hold the only reference to what it reads
        return fx.node.map_arg(result, lambda node: table[place[node]])

    return call


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
