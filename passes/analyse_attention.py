"""Find the attention sites: the only places where tokens look at one another, and the seeds of the token analysis."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sfcompile.passes.graph.op_view import OpView, shape_of


@dataclass(frozen=True)
class Site:
    """One softmax attention: ``q [..., Lq, D]``, ``k [..., Lk, D]``, ``v [..., Lk, E]``."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node

    @property
    def flops(self) -> float:
        """Multiply-adds counted twice: ``2 * heads * Lq * Lk * (D + E)``."""
        q, k, v = shape_of(self.q), shape_of(self.k), shape_of(self.v)
        rows = 1.0
        for size in q[:-1]:
            rows *= size
        return 2.0 * rows * k[-2] * (q[-1] + v[-1])


def analyse_attention(graph: fx.Graph) -> list[Site]:
    """All attention sites of a captured graph, in order."""
    sites = []
    for node in graph.nodes:
        op = OpView.of(node)
        if op is not None and op.name == "scaled_dot_product_attention":
            q, k, v = (op.args[name].node for name in ("query", "key", "value"))
            sites.append(Site(node, q, k, v))
    return sites
