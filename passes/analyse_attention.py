"""Find the attention sites: the only places where tokens look at one another, and the seeds of the token analysis."""

from __future__ import annotations

from torch import fx

from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.state import Site, State


def run(state: State) -> None:
    """The pass: fills ``sites``."""
    state.sites = analyse_attention(state.gm.graph)


def analyse_attention(graph: fx.Graph) -> list[Site]:
    """All attention sites of a captured graph, in order."""
    sites = []
    for node in graph.nodes:
        op = OpView.of(node)
        if op is not None and op.name == "scaled_dot_product_attention":
            q, k, v = (op.args[name].node for name in ("query", "key", "value"))
            sites.append(Site(node, q, k, v))
    return sites
