"""Predicted against measured: attention layers on real processes, timed beside the simulator's prediction.

    python benchmarks/emulated_machines.py --machines 2 --ranks 1 --rate 200mbit benchmarks/predict_steps.py

Every rank runs this script. The constants are measured first, in the same job (sfcompile/commands/measure.py); then
each schedule runs each workload several times, interleaved, and rank 0 prints medians, predictions and errors. A layer
is a matmul of some length, the puts, attention, and collect. The planner's pick is marked, with how far it is from the
best.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from sfcompile.codegen.plan.choose_plan import Candidate, plan_site
from sfcompile.codegen.plan.simulator import simulate
from sfcompile.codegen.plan.step import layer
from sfcompile.codegen.proof.checker import check
from sfcompile.commands.paper import even_positions
from sfcompile.measuring.precise import measure
from sfcompile.measuring.wording import table
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank import ops
from sfcompile.runtime.rank.process_group import ProcessWorld
from sfcompile.runtime.rank.session import Session, get_session

sf = torch.ops.streamfusion
assert ops.COMMUNICATION


def candidates(topology: Topology) -> list[Candidate]:
    """What peers run, and ours."""
    ranks, machines = topology.num_ranks, topology.num_machines
    inside = ranks // machines
    found = [Candidate("ulysses", ranks, 1), Candidate("ring", 1, ranks), Candidate("torus", ranks, 1)]
    if inside > 1 and machines > 1:
        found += [
            Candidate("usp", inside, machines, "ring"),
            Candidate("tas", machines, inside),
            Candidate("torus", machines, inside),
            Candidate("torus", ranks, 1, "ulysses", inside),
        ]
    return [*found, Candidate("torus", ranks, 1, "ulysses", 1, 2, 2)]


class Work:
    """One workload on one rank: its tensors, and a layer of any schedule."""

    def __init__(self, session: Session, tokens: int, heads: int, dim: int, other: int) -> None:
        ranks = session.topology.num_ranks
        places = even_positions(tokens, ranks)
        self.site = AttentionSite("site", 1, heads, heads, dim, dim, torch.float32, places, places, dim**-0.5)
        mine = places[session.rank][0][1]
        self.q, self.k, self.v = (torch.randn(1, heads, mine, dim) for _ in range(3))
        self.a, self.b = torch.randn(512, 1024), torch.randn(1024, 1024)
        self.other = other
        self.ticket = torch.zeros(1, dtype=torch.int64)

    def compute(self) -> None:
        for _ in range(self.other):
            self.a @ self.b

    def layer(self, program: str) -> None:
        self.compute()
        ticket = sf.put_k(self.k, self.ticket, program, 0)
        ticket = sf.put_v(self.v, ticket, program, 0)
        ticket = sf.put_q(self.q, ticket, program, 0)
        ticket = sf.attend(ticket, None, program, 0)
        sf.collect(ticket, program, 0, list(self.q.shape), torch.float32)


def seconds(session: Session, work: Work, program: str) -> float:
    """The slowest rank's time of one layer."""
    session.meet()
    start = time.perf_counter()
    work.layer(program)
    return max(session.exchange(time.perf_counter() - start, "time a layer"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 3072])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--other", type=int, default=4, help="matmuls of 1 GFLOP before the puts")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    session = get_session(lambda: ProcessWorld("auto", 120.0))
    topology = session.exchange(measure(session), "measure")[0]
    first = session.rank == 0
    if first:
        print(table(topology), flush=True)
    for tokens in args.tokens:
        work = Work(session, tokens, args.heads, args.dim, args.other)
        other_s = 2.0 * 512 * 1024 * 1024 * args.other / topology.flops_per_s
        plan = session.from_first(lambda site=work.site, other=other_s: plan_site(site, topology, other))  # type: ignore[misc]
        wanted = list(dict.fromkeys([*candidates(topology), plan.best]))
        predicted = {}
        for candidate in wanted:
            schedule = candidate.schedule(work.site, topology)
            check(schedule)
            session.load(str(candidate), [schedule])
            predicted[candidate] = simulate(layer(schedule, 1, other_s), topology)
            work.layer(str(candidate))
        measured: dict[Candidate, list[float]] = {candidate: [] for candidate in wanted}
        for _ in range(args.rounds):
            for candidate in wanted:
                measured[candidate].append(seconds(session, work, str(candidate)))
        if first:
            report(tokens, args, wanted, plan.best, measured, predicted)
    session.meet()


def report(tokens, args, wanted, best, measured, predicted) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """The table of one workload."""
    print(
        f"\n{tokens} tokens, {args.heads} heads x {args.dim}, {args.other} matmuls; ms a layer, median of {args.rounds}"
    )
    print(f"{'schedule':<34}{'measured':>10}{'spread':>16}{'predicted':>10}{'error':>8}{'limit':>9}{'exposed':>9}")
    medians = {candidate: statistics.median(measured[candidate]) for candidate in wanted}
    for candidate in sorted(wanted, key=lambda c: medians[c]):
        times, line = measured[candidate], predicted[candidate]
        mark = " *" if candidate == best else ""
        print(
            f"{str(candidate) + mark:<34}{medians[candidate] * 1e3:>10.1f}"
            f"{f'{min(times) * 1e3:.1f}..{max(times) * 1e3:.1f}':>16}{line.seconds * 1e3:>10.1f}"
            f"{line.seconds / medians[candidate] - 1:>+8.0%}{line.limit_s * 1e3:>9.1f}{line.exposed * 1e3:>9.1f}"
        )
    errors = [abs(predicted[c].seconds / medians[c] - 1) for c in wanted]
    print(f"mean error {sum(errors) / len(errors):.0%}, largest {max(errors):.0%}")
    print(f"* the planner's pick: {medians[best] / min(medians.values()) - 1:.0%} above the best")


if __name__ == "__main__":
    main()
