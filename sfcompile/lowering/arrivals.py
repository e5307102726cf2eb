"""Values that come from another graph in shards: a graph that only takes its rank's rows of one takes the shard.

The passes write a rank's graph for whole inputs, of which it slices what it owns; most often the graph before has cut
the value in the same places. Then the slices become slices of the shard, and nothing is gathered. Where a graph reads
more of a value than the shard, on whichever rank, the value is made whole before the call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from sfcompile.lowering.own_rows import bounds_of_slice
from sfcompile.runtime.program.intervals import count
from sfcompile.runtime.program.value_rows import ValueRows
from sfcompile.runtime.rank.sharded_value import ShardedValue
from sfcompile.torch_private import FakeTensorMode


def arrivals_of(inputs: Sequence[Any]) -> dict[int, ValueRows]:
    """Which inputs of a graph are values in shards, and how they are cut."""
    return {i: value.cut for i, value in enumerate(inputs) if isinstance(value, ShardedValue)}


def takes_shard(gm: fx.GraphModule, place: int, cut: ValueRows, rank: int) -> bool:
    """Whether a rank's graph reads nothing of an input but rows that lie in this rank's shard."""
    node = _placeholder(gm, place)
    if count(cut.owned[rank]) == cut.shape[cut.dim]:
        return True
    return all(_place(user, node, cut, rank) is not None for user in node.users)


def take_shards(gm: fx.GraphModule, mode: FakeTensorMode, cuts: Mapping[int, ValueRows], rank: int) -> fx.GraphModule:
    """A copy of a rank's graph whose inputs at the places of ``cuts`` are shards; all satisfy :func:`takes_shard`."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copied = fx.GraphModule(gm, graph)
    for place, cut in cuts.items():
        if count(cut.owned[rank]) == cut.shape[cut.dim]:
            continue
        node = _placeholder(copied, place)
        whole = node.meta["val"]
        for user in list(node.users):
            at, size = _place(user, node, cut, rank), user.meta["val"].shape[cut.dim]
            assert at is not None, user
            if size == cut.local_shape(rank)[cut.dim]:
                user.replace_all_uses_with(node)
                graph.erase_node(user)
            else:
                user.args = (node, cut.dim, at, at + size)
        with mode:
            node.meta["val"] = torch.empty(cut.local_shape(rank), dtype=whole.dtype, device=whole.device)
    # A slice of a shard has other strides than one of the whole value, and so on from there.
    with mode, torch.no_grad():
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
    graph.lint()
    copied.recompile()
    return copied


def _placeholder(gm: fx.GraphModule, place: int) -> fx.Node:
    node: fx.Node = [node for node in gm.graph.nodes if node.op == "placeholder"][place]
    return node


def _place(user: fx.Node, node: fx.Node, cut: ValueRows, rank: int) -> int | None:
    """Where in the shard the rows begin that a reader takes; None: it reads others too, or something else."""
    bounds = bounds_of_slice(user)
    if bounds is None or user.args[0] is not node:
        return None
    dim, start, stop, step = bounds
    return cut.place(rank, start, stop) if dim == cut.dim and step == 1 else None
