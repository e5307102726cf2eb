"""What the compiler plans for convolutional networks: shares, gathers, exchanges, a predicted step beside the limit.

    python benchmarks/conv_plans.py [--topology 1x4:a100-efa] [--placement shard] [--full] [--why] [names ...]

One process, nothing is computed. The small models are those of ``diffusers_zoo/convolutional.py``; ``--full`` takes
autoencoders and U-Nets at the sizes that they are used at, on the meta device. *even* is the step if every op of the
captured graph were shared evenly and nothing had to travel; of an op whose weights take longer to read than its share
takes, it counts the weights alone. *alone* counts beside weights, which every rank reads whole, the activations that
it reads and writes for an even share of the rows: what a rank computes, with nothing to wait for. No plan that cuts
rows is faster than that. ``--why`` lists what is computed whole and what is gathered.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers_zoo import ZOO
from diffusers_zoo.convolutional import FULL, SMALL
from torch import fx

from sfcompile.capture.graph import Captured
from sfcompile.passes.graph.cost import seconds, shard_seconds, value_bytes
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.report.report import GraphReport
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.prediction.predict import each_graph, step_of
from sfcompile.runtime.program.topology import Topology


@dataclass
class Row:
    """One model: its graphs' reports, and seconds predicted for rank 0."""

    name: str
    reports: list[GraphReport]
    step_s: float = 0.0
    exposed_s: float = 0.0
    even_s: float = 0.0
    alone_s: float = 0.0
    taken_s: float = 0.0

    def __str__(self) -> str:
        total = sum(report.total_flops for report in self.reports)
        ranks = self.reports[0].num_ranks
        busiest = max(sum(report.rank_flops[rank] for report in self.reports) for rank in range(ranks))
        gathers = sum(len(report.gathered) for report in self.reports)
        moved = sum(len(report.moved) for report in self.reports)
        whole = sum(len(report.left_behind) for report in self.reports)
        times = "".join(f"{seconds * 1e3:>10.3f}" for seconds in (self.step_s, self.exposed_s))
        for limit_s in (self.even_s, self.alone_s):
            times += f"{limit_s * 1e3:>10.3f}{self.step_s / limit_s:>7.2f}"
        return (
            f"{self.name:<18}{total / 1e9:>10.2f}{busiest * ranks / total:>8.3f}{gathers:>8}{moved:>10}{whole:>7}"
            f"{times}{self.taken_s:>9.1f}"
        )


HEAD = (
    f"{'model':<18}{'GFLOP':>10}{'share':>8}{'gathers':>8}{'exchanges':>10}{'whole':>7}"
    f"{'step ms':>10}{'waits ms':>10}{'even ms':>10}{'ratio':>7}{'alone ms':>10}{'ratio':>7}{'took s':>9}"
)


def even(op: OpView, where: Topology) -> float:
    """Seconds of a rank's even share of an op, or of its weights, which the rank reads whole."""
    read = sum(value_bytes(op.operands[i].node) for i in weights_of(op)) / where.memory_bytes_per_s
    return max(seconds(op, where) / where.num_ranks, read)


def alone(op: OpView, where: Topology) -> float:
    """Seconds of an op on an even share of the rows: its weights are read whole, and its activations beside them."""
    return shard_seconds(op, where, 1 / where.num_ranks, weights_of(op))


def weights_of(op: OpView) -> list[int]:
    """Which operands of an op are weights."""
    return [o.index for o in op.operands if o.index and o.node.op in ("placeholder", "get_attr")]


def plan(name: str, build: Callable[[], tuple[torch.nn.Module, dict[str, Any]]], where: Topology, shard: bool) -> Row:
    """The plan of a model for rank 0."""
    model, kwargs = build()
    row, begun = Row(name, []), time.perf_counter()

    def visit(gm: fx.GraphModule, captured: Captured) -> None:
        state = State(captured.gm, captured.mode, where, 0, Asked(shard_everything=shard))
        compiled = run_pipeline(state)
        row.reports.append(compiled.report)
        step = step_of(compiled, 0, where)
        row.step_s += step.seconds
        row.exposed_s += step.exposed_s
        ops = [op for node in captured.gm.graph.nodes if (op := OpView.of(node)) is not None]
        row.even_s += sum(even(op, where) for op in ops)
        row.alone_s += sum(alone(op, where) for op in ops)

    each_graph(model, (), kwargs, visit)
    row.taken_s = time.perf_counter() - begun
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="1x4:a100-efa")
    parser.add_argument("--placement", choices=("auto", "shard"), help="shard for small models, auto with --full")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--why", action="store_true")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    builders = FULL if args.full else {name: ZOO[name] for name in SMALL}
    placement = args.placement or ("auto" if args.full else "shard")
    print(HEAD)
    for name in args.names or builders:
        row = plan(name, builders[name], Topology.parse(args.topology), placement == "shard")
        print(row, flush=True)
        if args.why:
            for report in row.reports:
                print(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
