"""What puts may still read when their node has run, made visible in the graph.

On a GPU a put runs on a stream of its own and reads its sources some time between its own node and the node that waits
for it, its *join*: the attend of an attention, the finish of an exchange. A compiler that plans memory knows nothing of
streams: after the last reader of a value it gives the value's memory to the next one. So every join takes what the
puts of its site read as arguments (``held``), and the values live until then, whoever plans their memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from sfcompile.errors import InternalError
from sfcompile.passes.graph.local_graph import COMMUNICATION
from sfcompile.passes.graph.op_view import OpView, is_getitem
from sfcompile.runtime.program.phases import JOINS, STARTS

_Key = tuple[str, int]


def hold_sources(graph: fx.Graph) -> None:
    """Give every join the sources of its site's puts. The last edit of a graph: it adds readers, and nothing else."""
    reads: dict[_Key, dict[fx.Node, None]] = {}
    for node, kind, key in _talks(graph):
        if kind in STARTS:
            reads.setdefault(key, {}).update(dict.fromkeys(_sources(node)))
        elif kind in JOINS and key in reads:
            node.kwargs = {**node.kwargs, "held": list(reads.pop(key))}


def check_lifetimes(graph: fx.Graph) -> None:
    """Make sure that what puts read lives, and stays what it is, until their joins.

    Raises:
        InternalError: a put without a join, one whose join does not hold its sources, or a node between the two that
            writes to them.
    """
    reading: dict[_Key, dict[fx.Node, fx.Node]] = {}  # open sites: source -> put
    kinds = {node: (kind, key) for node, kind, key in _talks(graph)}
    for node in graph.nodes:
        kind, key = kinds.get(node, ("", ("", 0)))
        if kind in STARTS:
            reading.setdefault(key, {}).update(dict.fromkeys(_sources(node), node))
        elif kind in JOINS:
            held = {value for value in node.kwargs.get("held", ())}
            for source, put in reading.pop(key, {}).items():
                if source not in held:
                    raise _fault(put, f"{put.name} reads {source.name}, and {node.name}, which waits for it, does not")
        else:
            for written in _written(node):
                for sources in reading.values():
                    for source, put in sources.items():
                        if _memory(source) is written:
                            raise _fault(put, f"{put.name} may still read {source.name} when {node.name} writes to it")
    for sources in reading.values():
        for source, put in sources.items():
            raise _fault(put, f"{put.name} reads {source.name}, and nothing waits for it")


def _talks(graph: fx.Graph) -> Iterator[tuple[fx.Node, str, _Key]]:
    """The nodes that talk to other ranks: what they are ("put_q", "attend", ...) and their site."""
    for node in graph.nodes:
        if node.target in COMMUNICATION:
            op = OpView.of(node)
            assert op is not None
            kind = op.args["phase"] if op.name == "put_fused" else op.name
            yield node, str(kind), (str(op.args["program"]), int(op.args["site"]))


def _sources(put: fx.Node) -> list[fx.Node]:
    """What a put sends, or makes it of: its first argument."""
    return [put.args[0]] if isinstance(put.args[0], fx.Node) else list(put.args[0])  # type: ignore[arg-type]


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The memory that a node writes to, as the node that made it."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return
    values = {entry.name: value for entry, value in zip(schema.arguments, node.args, strict=False)} | node.kwargs
    for entry in schema.arguments:
        value = values.get(entry.name)
        if entry.alias_info is not None and entry.alias_info.is_write and isinstance(value, fx.Node):
            yield _memory(value)


def _memory(value: fx.Node) -> fx.Node:
    """The node whose memory a value lies in: views, and what writes in place, lead to what they were made of."""
    while value.op == "call_function":
        schema = getattr(value.target, "_schema", None)
        if is_getitem(value):
            step = value.args[0]
        elif schema is not None and any(entry.alias_info is not None for entry in schema.returns):
            step = next(
                arg for arg, entry in zip(value.args, schema.arguments, strict=False) if entry.alias_info is not None
            )
        else:
            return value
        assert isinstance(step, fx.Node)
        value = step
    return value


def _fault(put: fx.Node, what: str) -> InternalError:
    return InternalError(
        what,
        "on a GPU a put reads what it sends on a stream of its own, and its memory would be given to others",
        "if a pass of yours edits the graph after order_puts, let it write to no operand; else report this graph",
        node=put,
    )
