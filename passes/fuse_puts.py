"""Put and compute in one kernel: what makes q, k or v just before its put moves into the put.

The norm, the RoPE, the casts and the views between a projection and the put of its result are computed by the kernel
that sends the rows (codegen/rows/rows.py): the tensor that was sent never lies in memory. For each put this finds the
longest such stretch of the graph. A value that others read too ends it and becomes a source, unless it costs nothing to
do again: a view, or a pointwise op on an input of the graph. Where a node has no text for a kernel, the stretch ends
after it; where nothing but views is left, the put stays as it is, for it reads through strides anyway.
"""

from __future__ import annotations

import heapq

from torch import fx

from sfcompile.codegen.rows.op_table import OPS, POINTWISE, VIEWS
from sfcompile.codegen.rows.row_ops import FREE, compile_rows
from sfcompile.codegen.rows.rows import CannotFollowError, RowProgram, name_of
from sfcompile.passes.state import State
from sfcompile.runtime.program.phases import PUTS
from sfcompile.runtime.rank.ops import PUT_FUSED, ROW_PROGRAMS


def run(state: State) -> None:
    """The pass: edits ``local``, this rank's graph, where puts are kernels; counts in ``fused_puts``."""
    if state.asked.fuse_puts:
        state.fused_puts = fuse_puts(state.local.graph)


def fuse_puts(graph: fx.Graph) -> tuple[int, int]:
    """Fuse what can be fused. Returns the number of fused puts and of all puts of q, k and v."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    puts = [node for node in graph.nodes if _phase(node) in PUTS.values()]
    fused = 0
    for put in puts:
        root, ticket, program, site, *part = put.args
        assert isinstance(root, fx.Node)
        stretch = None if part and part[0] != -1 else _longest(root, position)
        if stretch is None:
            continue
        rows, sources = stretch
        ROW_PROGRAMS[rows.key] = rows
        with graph.inserting_before(put):
            fused_put = graph.call_function(PUT_FUSED, (sources, ticket, program, site, _phase(put), rows.key))
        fused_put.meta = dict(put.meta)
        position[fused_put] = position[put]
        put.replace_all_uses_with(fused_put)
        graph.erase_node(put)
        _erase_unread(graph, root)
        fused += 1
    return fused, len(puts)


def _phase(node: fx.Node) -> str:
    name = str(node.target)
    return name.split(".")[1] if name.startswith("streamfusion.") else ""


def _longest(root: fx.Node, position: dict[fx.Node, int]) -> tuple[RowProgram, list[fx.Node]] | None:
    """The program of the longest stretch before a put, and its sources; None: there is nothing to fuse."""
    ends: set[fx.Node] = set()
    while True:
        inline = _stretch(root, ends, position)
        if all(name_of(node) in FREE for node in inline):
            return None
        try:
            return compile_rows(root, inline)
        except CannotFollowError as why:
            if why.node is root or why.node not in inline:
                return None
            ends.add(why.node)


def _stretch(root: fx.Node, ends: set[fx.Node], position: dict[fx.Node, int]) -> frozenset[fx.Node]:
    """The nodes above a put that may move into it, ``ends`` left outside."""
    inline: set[fx.Node] = set()
    moved: set[fx.Node] = set()  # those that nobody else reads
    todo, seen = [(-position[root], root)], {root}
    while todo:  # later nodes first: a node's readers are decided when its turn comes
        _, node = heapq.heappop(todo)
        alone = len(node.users) == 1 if node is root else all(user in moved for user in node.users)
        if name_of(node) not in OPS or node in ends or not (alone or _is_cheap(node)):
            continue
        inline.add(node)
        if alone:
            moved.add(node)
        for value in node.all_input_nodes:
            if value not in seen:
                seen.add(value)
                heapq.heappush(todo, (-position[value], value))
    return frozenset(inline)


def _is_cheap(node: fx.Node) -> bool:
    """Whether a node may be computed again for a put though others read its value too."""
    name = name_of(node)
    return name in VIEWS or (name in POINTWISE and all(map(_is_given, node.all_input_nodes)))


def _is_given(node: fx.Node) -> bool:
    while name_of(node) in VIEWS:
        node = node.all_input_nodes[0]
    return node.op in ("placeholder", "get_attr")


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    todo, gone = [node], set()
    while todo:
        node = todo.pop()
        if node.op == "call_function" and not node.users and node not in gone:
            todo += node.all_input_nodes
            graph.erase_node(node)
            gone.add(node)
