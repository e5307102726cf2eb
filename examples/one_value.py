"""Follows one value, the queries of a tiny attention, from the model's line to the byte on the wire and back.

    python examples/one_value.py

One process plays two ranks: what is printed is made by the code of a real job. docs/one-value.md explains it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from sfcompile.capture.graph import Captured, capture
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.lowering.rank_graph import run_passes
from sfcompile.options import Options
from sfcompile.passes.runner import Compiled
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.wires.direct import DirectTransport
from sfcompile.runtime.wires.symmetric_heap import HeapSize, local_segment

RANKS, TOKENS, WIDTH, HEADS = 2, 8, 4, 2


class OneAttention(nn.Module):
    """[1, 8, 4] -> [1, 8, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, self.k(x), self.v(x)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def main() -> None:
    """Print every stage."""
    graph = captured(OneAttention(), torch.randn(1, TOKENS, WIDTH))
    print("\n# 1. The captured graph: what Dynamo saw, functional, ops whole\n")
    print(calls(graph.gm.graph))

    ranks = [compiled(graph, rank) for rank in range(RANKS)]
    print("\n# 2. What the passes decided: which tokens a rank owns, and how the attention runs\n")
    print(ranks[0].report.headline)
    schedule = next(iter(ranks[0].programs.values()))[0]
    for rank in range(RANKS):
        runs, heads = schedule.site.q_positions[rank], schedule.heads(rank)
        print(f"rank {rank} owns tokens {runs} (first, how many) and computes heads {heads} (first, end)")

    print("\n# 3. This rank's graph: the queries are computed for its own tokens, and put\n")
    print(calls(ranks[0].gm.graph))

    print("\n# 4. The schedule of the site: the same program on both ranks, in offsets\n")
    print(schedule)

    print("\n# 5. The put: bytes into the other rank's bank, then its signal word\n")
    put_queries(schedule)


def captured(model: nn.Module, *inputs: torch.Tensor) -> Captured:
    """The graph that the backend would see."""
    graphs: list[Captured] = []

    def backend(gm: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(capture(gm, example))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    return graphs[0]


def compiled(graph: Captured, rank: int) -> Compiled:
    """What a rank would run: Ulysses, so that the queries of other heads travel."""
    asked = Options.from_dict({"placement": "shard", "mesh": {"ulysses": RANKS}})
    return run_passes(graph, Topology.grid(1, RANKS), rank, asked, lambda plan: plan(), split_batch=False)


def calls(graph: fx.Graph) -> str:
    """The calls that make tensors, with their shapes."""
    lines = []
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            name = str(node.target).removesuffix(".default") if "." in str(node.target) else node.target.__name__
            args = ", ".join(str(arg) for arg in node.args if isinstance(arg, fx.Node))
            lines.append(f"{node.name:<29} {name:<33} {list(node.meta['val'].shape)!s:<13} of {args or 'nothing'}")
    return "\n".join(lines)


def put_queries(schedule: Schedule) -> None:
    """Rank 1 puts the queries of rank 0's heads; rank 0 waits for them and reads them where they lie."""
    segments = [local_segment(HeapSize(len(schedule.slots), schedule.heap_bytes)) for _ in range(RANKS)]
    wires = [DirectTransport(rank, segments, timeout_s=5.0) for rank in range(RANKS)]
    arrival = next(a for a in schedule.program(0).arrivals if a.tensor == "q")
    slot, epoch = schedule.slots[arrival.slot], 1
    queries = torch.arange(float(TOKENS)).reshape(schedule.shape(0, arrival))
    print(f"rank 1 puts {list(queries.shape)} into slot {arrival.slot}, {slot.name}, of rank 0: {queries.nbytes} bytes")
    print(f"the slot lies at byte {slot.offset} of a bank; epoch {epoch} uses bank {epoch % 2}")
    signals = segments[0].signals[epoch % 2]
    print(f"signal word of the slot before: epoch {int(signals[arrival.slot]) >> 24}")
    wires[1].put(0, arrival.slot, slot.offset, queries, epoch)
    wires[0].wait(arrival.src, arrival.slot, epoch)
    print(f"signal word of the slot after:  epoch {int(signals[arrival.slot]) >> 24}")
    arrived = segments[0].chunk(epoch % 2, slot.offset, queries.shape, queries.dtype)
    print(f"rank 0 attends to them where they lie: {arrived.flatten().tolist()}")


if __name__ == "__main__":
    main()
