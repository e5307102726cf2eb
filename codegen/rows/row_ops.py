"""Compiles a stretch of a graph to a row program, by the rules in row_views.py and row_math.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

# Imported for what they add to the table of ops.
from sfcompile.codegen.rows import row_math, row_views  # noqa: F401
from sfcompile.codegen.rows.elements import DTYPES
from sfcompile.codegen.rows.op_table import OPS, VIEWS
from sfcompile.codegen.rows.rows import CannotFollowError, RowProgram, RowText

FREE = frozenset(VIEWS - {"clone.default", "contiguous.default", "repeat_interleave.self_int"})
"""Views that no op has to compute: a plain put reads through them."""


def compile_rows(root: fx.Node, inline: frozenset[fx.Node]) -> tuple[RowProgram, list[fx.Node]]:
    """The program of a node [B, H, L, W] and its sources.

    Args:
        inline: nodes that may be computed in it, the root among them.

    Raises:
        CannotFollowError: one of them cannot; its ``node`` should be a source.
    """
    value = root.meta["val"]
    if value.dim() != 4 or value.dtype not in DTYPES or 0 in value.shape:
        raise CannotFollowError(root, f"rows of {value.dtype}{list(value.shape)}")
    text = RowText(root, inline, OPS)
    result = text.result()
    eager, sources = _eager(root, inline, text.sources)
    values = [source.meta["val"] for source in sources]
    unread = [source for source, value in zip(sources, values, strict=True) if value.dtype not in DTYPES]
    if unread:
        raise CannotFollowError(root, f"{unread[0]} is no source")
    program = RowProgram(
        DTYPES[value.dtype],
        int(value.shape[-1]),
        tuple(tuple(sorted(text.dims.get(source, ()))) for source in sources),
        tuple(DTYPES[entry.dtype] for entry in values),
        tuple(text.head),
        tuple(text.lines),
        result.name,
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
