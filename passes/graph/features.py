"""Products of one input, each rank some features of each, put together in one exchange (place_features.py).

this rank's features of the first product, of the second, ...        [rows, own features]
every rank's                                                         [ranks, rows, own features]
all features of the first product: its columns of every rank         [rows, features]

Which features a rank computes goes by its place among the ranks: its number or, where ranks hold weights in shares,
the stretch of rows that it holds. These rows are the weight of these features, so such a weight is read where it lies
and nobody gathers it (rewrite_weights.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView, shape_of
from sfcompile.runtime.program.sites import ExchangeSite

aten = torch.ops.aten

OWN_ROWS = "own_rows"
"""Marks a slice that takes, on every rank, the rows of a weight that belong to the rank's place."""


def site_of(nodes: Sequence[fx.Node], places: Sequence[int]) -> ExchangeSite:
    """The exchange of some products of one input, whose features are a multiple of the ranks; ``places`` by rank."""
    ranks = len(places)
    rows, own = math.prod(shape_of(nodes[0])[:-1]), sum(shape_of(node)[-1] for node in nodes) // ranks
    runs = tuple(((place, 1),) for place in places)
    return ExchangeSite.gather(nodes[0].name, (ranks, rows, own), nodes[0].meta["val"].dtype, 0, runs)


def compute_by_features(
    local: LocalGraph, ops: Sequence[OpView], x: fx.Node, weights: Sequence[Sequence[fx.Node]], places: Sequence[int]
) -> list[fx.Node]:
    """The products, whole on every rank.

    Args:
        x: their input, whole; ``weights``: of each product the weight and perhaps the bias, whole.
        places: by rank.
    """
    ranks, own = local.owners.num_ranks, []
    rows = math.prod(ops[0].operands[0].shape[:-1])
    for op, whole in zip(ops, weights, strict=True):
        local.origin, features = op.node, op.out_shapes[0][-1] // ranks
        mine = [local.narrow(weight, 0, places[local.rank] * features, features) for weight in whole]
        for weight in mine:
            weight.meta[OWN_ROWS] = True
        args, kwargs = op.rebuild([x, *mine])
        out = local.call(op.node.target, args, kwargs)
        own.append(local.call(aten.reshape.default, [out, [rows, features]], {}))
    local.origin = ops[0].node
    everyone = local.of_all(own[0] if len(own) == 1 else local.call(aten.cat.default, [own, 1], {}), places)
    outs, at = [], 0
    for op in ops:
        local.origin, features = op.node, op.out_shapes[0][-1] // ranks
        theirs = local.call(aten.permute.default, [local.narrow(everyone, 2, at, features), [1, 0, 2]], {})
        out = local.call(aten.clone.default, [theirs], {"memory_format": torch.contiguous_format})
        outs.append(local.call(aten.reshape.default, [out, list(op.out_shapes[0])], {}))
        at += features
    return outs
