"""What the passes decided, for people: a table of the plan, what is sharded, what is not and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from sfcompile.passes.report.steps import StepWatch
from sfcompile.runtime.program.stages import GraphStages
from sfcompile.runtime.program.topology import Topology

PLAN_ROWS = 10
"""Lines of each planner's table that a printed report shows."""
LEFT_ROWS = 12
"""And of each list of what was left whole or gathered."""


@dataclass(frozen=True)
class Left:
    """An op that touches tokens and is computed whole on every rank, or a value that had to be gathered."""

    node: str
    op: str
    source: str
    reason: str
    flops: float
    nbytes: int
    is_view: bool = False


@dataclass
class GraphReport:
    """The plan of one graph.

    Attributes:
        num_ranks, num_machines: the topology.
        batch, ulysses, ring: the mesh.
        axes: per token axis ``(tokens, segments, attention FLOPs)``, heaviest first.
        sharded_sites, local_sites: attentions rewritten to put / attend / collect, and those that run on local queries.
        sharded_ops, replicated_ops: op counts.
        by_heads: attentions that stay in their library's kernel, on all tokens of a rank's heads.
        total_flops, rank_flops: matmul, convolution and attention FLOPs of the whole graph and of each rank.
        replicated: token ops left whole, costliest first; gathered: all-gathers in the graph; moved: values that ranks
            exchange in part (halos, other cuts, another dim), with the bytes that arrive at all ranks.
        heap_bytes: symmetric heap per rank.
        schedules: distinct schedules of the sites.
        schedule: how the heaviest attention runs, and the seconds predicted for it and the compute before it: in all,
            exposed communication, and the limit (predicted_s, exposed_s, limit_s).
        batch, copies: into how many parts the batch is split, and how many groups of machines compute the same.
        plans: the planner's table for each distinct attention, every rejected candidate with its reason.
        pass_seconds: wall time per pass.
        warnings: what a user should know.
        programs: keys of the graph's programs in the session, and the names of their sites.
        topology: that the plan was made for, of this rank's group.
        other_s: seconds of compute that the plan assumes between two attentions.
        stages: what this rank's graph computes and when it talks to others: what a prediction of its step is made of.
        unpriced: ops whose arithmetic nobody knows, which no FLOPs above count.
        graph: number of the graph in this process, from 1; break_reason: what made Dynamo end it before the model did
            (a graph break, with the user's line), or "".
        verified: how far first calls were from one process, if that was asked for.
        inputs: how ranks come to equal inputs, where it costs traffic; "": they are given them.
        weights: how much of the weights the ranks of a machine hold once, or each rank in shares; "": every rank
            holds all of them.
        links: the constants that the plan was made with, and where they come from.
        transport: what carries chunks between GPU ranks, and why not what would be better; "": CPU ranks.
        steps: how long calls of the graph took on this rank; None: nobody looks.
        boundary: which inputs come and which outputs leave in shards, in words; "": all are whole.
        wire: how the chunks of attentions travel if not as they are, with the error bound.
        blocks: the pieces that the graph was compiled in: repeated blocks, of which so many are distinct, or stretches;
            why no blocks are alike; "": in one piece.
        fused_puts: puts whose kernels compute what they send, and all puts of q, k and v; None: puts are no kernels.
    """

    num_ranks: int
    num_machines: int
    ulysses: int
    ring: int
    axes: tuple[tuple[int, int, float], ...] = ()
    sharded_sites: int = 0
    local_sites: int = 0
    by_heads: int = 0
    sharded_ops: int = 0
    replicated_ops: int = 0
    total_flops: float = 0.0
    rank_flops: tuple[float, ...] = ()
    replicated: list[Left] = field(default_factory=list)
    gathered: list[Left] = field(default_factory=list)
    moved: list[Left] = field(default_factory=list)
    heap_bytes: int = 0
    schedules: int = 0
    batch: int = 1
    copies: int = 1
    schedule: str = ""
    attention: str = ""
    predicted_s: float = 0.0
    exposed_s: float = 0.0
    limit_s: float = 0.0
    plans: list[str] = field(default_factory=list)
    pass_seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    programs: dict[str, list[str]] = field(default_factory=dict)
    topology: Topology | None = None
    other_s: float = 0.0
    stages: GraphStages | None = None
    unpriced: list[str] = field(default_factory=list)
    graph: int = 0
    break_reason: str = ""
    boundary: str = ""
    wire: str = ""
    fused_puts: tuple[int, int] | None = None
    verified: str = ""
    inputs: str = ""
    weights: str = ""
    links: str = ""
    transport: str = ""
    blocks: str = ""
    steps: StepWatch | None = None

    @property
    def share(self) -> float:
        """The busiest rank's FLOPs over ``total / num_ranks``: 1.0 is perfect."""
        return max(self.rank_flops) * self.num_ranks / self.total_flops if self.total_flops else 0.0

    @property
    def headline(self) -> str:
        """The plan in one line."""
        gathers = f"{len(self.gathered)} gather{'s' * (len(self.gathered) != 1)}"
        by_heads = f", {self.by_heads} by heads in their library's kernel" if self.by_heads else ""
        broken = f"; ended by a graph break: {self.break_reason}" if self.break_reason else ""
        plan = self.schedule or ("attention by heads" if self.by_heads else "no attention sharded")
        return (
            f"{plan}, {self.sharded_sites} sharded and {self.local_sites} local attentions{by_heads}, {gathers}, "
            f"busiest rank {self.share:.2f} x FLOPs/{self.num_ranks}, "
            f"{len(self.left_behind)} token ops not sharded{self._unknown}{broken}"
        )

    @property
    def _copies(self) -> str:
        return f"; {self.copies} groups of machines {groups_do(1, self.copies)}" if self.copies > 1 else ""

    @property
    def _unknown(self) -> str:
        """What the FLOPs do not count, for the headline."""
        if not self.unpriced:
            return ""
        kinds = sorted(set(self.unpriced))
        shown = ", ".join(kinds[:3]) + (f" and {len(kinds) - 3} more kinds" if len(kinds) > 3 else "")
        count = len(self.unpriced)
        return f", FLOPs of {count} op{'s' * (count > 1)} unknown and not counted ({shown})"

    @property
    def left_behind(self) -> list[Left]:
        """What ``strict`` objects to: token ops that do work (more than a view) and were not sharded."""
        return [row for row in self.replicated if not row.is_view]

    def __str__(self) -> str:
        rows = [
            ("ranks", f"{self.num_ranks} on {self.num_machines} machine{'s' * (self.num_machines > 1)}"),
            ("mesh", f"batch {self.batch} x ulysses {self.ulysses} x ring {self.ring}{self._copies}"),
            (
                "plan",
                f"{self.schedule or 'none'}: {self.predicted_s * 1e3:.3f} ms a layer predicted, "
                f"{self.exposed_s * 1e3:.3f} ms exposed, limit {self.limit_s * 1e3:.3f} ms",
            ),
        ]
        for tokens, segments, flops in self.axes:
            split = f"{segments} segment{'s' * (segments > 1)}"
            rows.append(("token axis", f"{tokens} tokens in {split}, {flops / 1e9:.2f} GFLOP of attention"))
        rows += [
            ("attention", f"{self.sharded_sites} sharded, {self.local_sites} local (keys whole on every rank)"),
            ("runs as", self.attention or "ATen"),
            ("ops", f"{self.sharded_ops} sharded, {self.replicated_ops} replicated"),
            (
                "FLOPs",
                f"{self.total_flops / 1e9:.2f} G in all; busiest rank {self.share:.3f} x total/{self.num_ranks}"
                f"{self._unknown}",
            ),
            (
                "schedules",
                f"{self.schedules} distinct, each proved for all ranks before use",
            ),
            ("heap", f"{self.heap_bytes / 2**20:.1f} MiB symmetric memory per rank, shared by all layers"),
            ("compile", ", ".join(f"{name} {s * 1e3:.0f} ms" for name, s in self.pass_seconds.items())),
        ]
        if self.links:
            rows.insert(1, ("links", self.links))
        if self.transport:
            rows.insert(-1, ("transport", self.transport))
        if self.fused_puts is not None:
            fused, puts = self.fused_puts
            rows.insert(
                5 + bool(self.links) + len(self.axes),
                ("puts", f"{fused} of {puts} compute what they send (norms, RoPE, casts)"),
            )
        if self.blocks:
            rows.append(("blocks", self.blocks))
        if self.wire:
            rows.insert(-1, ("wire", self.wire))
        if self.boundary:
            rows.insert(-1, ("boundary", self.boundary))
        if self.verified:
            rows.insert(-1, ("verified", self.verified))
        if self.inputs:
            rows.insert(-1, ("inputs", self.inputs))
        if self.weights:
            rows.insert(-1, ("weights", self.weights))
        if self.steps is not None and self.steps.summary:
            rows.append(("steps", self.steps.summary))
        if self.break_reason:
            rows.insert(0, ("graph break", f"graph {self.graph} ends at: {self.break_reason}"))
        lines = [f"  {name:<12} {text}" for name, text in rows]
        lines += _table("gathered (sharded values that some reader needs whole)", self.gathered)
        if self.moved:
            lines += _table("exchanged in part (halos, other cuts, another dim)", self.moved)
        lines += _table("not sharded (token ops computed whole on every rank)", self.replicated)
        lines += [f"  warning: {text}" for text in self.warnings]
        for table in self.plans:
            shown = table.splitlines()
            lines += ["  " + line for line in shown[:PLAN_ROWS]]
            if len(shown) > PLAN_ROWS:
                lines.append(f"    ... and {len(shown) - PLAN_ROWS} more candidates (report.plans has them all)")
        return "\n".join(lines)


def short_source(source: str) -> str:
    """A source line ``/a/b.py:3: text`` without its folders."""
    path, _, rest = source.partition(":")
    return f"{path.rsplit('/', 1)[-1]}:{rest}" if rest else path


def _table(title: str, rows: list[Left]) -> list[str]:
    if not rows:
        return [f"  {title}: none"]
    lines = [f"  {title}: {len(rows)}"]
    for row in rows[:LEFT_ROWS]:
        cost = f"{row.flops / 1e6:.1f} MFLOP" if row.flops else f"{row.nbytes / 2**10:.1f} KiB"
        lines.append(f"    {row.node:<28} {row.op:<22} {cost:>14}  {row.source:<44} {row.reason}")
    if len(rows) > LEFT_ROWS:
        lines.append(f"    ... and {len(rows) - LEFT_ROWS} more")
    return lines


def groups_do(batch: int, copies: int) -> str:
    """What groups of ranks do, of which ``batch`` share out a batch, ``copies`` times."""
    if batch == 1:
        return "compute the same each, as links between them would cost more than that"
    part = "take a part of the batch each"
    return part if copies == 1 else f"{part}, every part by {copies} of them, as links between them would cost more"
