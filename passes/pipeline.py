"""The ordered list of passes, and the runner that times, checks and dumps.

Read ``PIPELINE`` from top to bottom: that is the compiler.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import fx

import sfcompile.passes.op_rules_attention
import sfcompile.passes.op_rules_conv
import sfcompile.passes.op_rules_index
import sfcompile.passes.op_rules_linked
import sfcompile.passes.op_rules_lookup
import sfcompile.passes.op_rules_reduce
import sfcompile.passes.op_rules_view  # noqa: F401  the rule files register themselves
from sfcompile.codegen.checker import check
from sfcompile.codegen.schedule import Schedule
from sfcompile.errors import InternalError, NotShardedError
from sfcompile.passes.analyse_attention import Site, analyse_attention
from sfcompile.passes.analyse_tokens import Tokens, analyse_tokens, folded_seeds, seeds_of
from sfcompile.passes.choose_axes import Preference, choose_axes
from sfcompile.passes.choose_layouts import Layouts, choose_layouts
from sfcompile.passes.choose_schedules import Agree, Choices, choose_schedules, groups_of
from sfcompile.passes.local_graph import COMMUNICATION, LocalGraph
from sfcompile.passes.op_view import FakeMode
from sfcompile.passes.place_min_cut import Placement, place_min_cut
from sfcompile.passes.report import GraphReport
from sfcompile.passes.report_graph import report_graph
from sfcompile.passes.rewrite_batch import BatchPart, rewrite_batch
from sfcompile.passes.rewrite_local import CannotSplit, rewrite_local
from sfcompile.passes.schedule_puts import schedule_puts
from sfcompile.runtime.topology import Topology


@dataclass
class State:
    """What the passes hand on. Inputs first; each pass fills the field named in its line of ``PIPELINE``.

    ``mesh_asked``, ``schedule_asked`` and ``agree`` are those of choose_schedules.py.
    """

    gm: fx.GraphModule
    mode: FakeMode
    topology: Topology
    rank: int
    mesh_asked: Mapping[str, int] | None = None
    schedule_asked: str = "auto"
    agree: Agree = lambda plan: plan()  # noqa: E731
    shard_everything: bool = False
    sites: list[Site] = field(default_factory=list)
    tokens: Tokens = field(default_factory=Tokens)
    layouts: Layouts | None = None
    choices: Choices | None = None
    part: BatchPart | None = None
    groups: tuple[tuple[int, ...], ...] = ()
    split_batch: bool = True
    parts: tuple[int, ...] = (2, 3)
    placement: Placement | None = None
    local: LocalGraph | None = None
    schedules: list[Schedule] = field(default_factory=list)

    @property
    def program(self) -> str:
        """Key of this program: the same on every rank, different for another graph, topology or option."""
        assert self.choices is not None
        text = f"{self.gm.code}|{self.topology}|{self.choices}|{self.shard_everything}"
        shapes = [tuple(n.meta["val"].shape) for n in self.gm.graph.nodes if n.op == "placeholder"]
        return hashlib.sha256(f"{text}|{shapes}".encode()).hexdigest()[:16]


@dataclass
class Compiled:
    """One rank's graph, the schedules of its communication sites by program, and the plan for people."""

    gm: fx.GraphModule
    programs: dict[str, list[Schedule]]
    report: GraphReport

    @property
    def order(self) -> list[str]:
        """The communication of the graph in its order: the same on every rank, or they would wait for ever.

        Programs are numbered: groups with different samples give them different keys.
        """
        number: dict[object, object] = {program: i for i, program in enumerate(self.programs)}
        return [
            f"{node.target} {[number.get(arg, arg) for arg in node.args if isinstance(arg, (str, int))]}"
            for node in self.gm.graph.nodes
            if node.target in COMMUNICATION
        ]


def _analyse_attention(s: State) -> None:
    s.sites = analyse_attention(s.gm.graph)


def _analyse_tokens(s: State) -> None:
    s.tokens = analyse_tokens(
        s.gm.graph, [*seeds_of(s.sites), *folded_seeds(s.gm.graph, s.sites)], s.topology.num_ranks
    )


def _choose_layouts(s: State) -> None:
    s.layouts = choose_layouts(s.tokens, s.sites, s.topology.num_ranks)


def _choose_axes(s: State) -> None:
    assert s.layouts is not None
    if s.split_batch and (s.mesh_asked or {}).get("batch", 1) > 1:
        return  # chosen for the part of the batch that a group gets
    ranks = s.topology.num_ranks

    def make(prefer: Preference) -> Layouts:
        return choose_layouts(s.tokens, s.sites, ranks, prefer=prefer)

    def price(layouts: Layouts) -> float:
        choices = choose_schedules(
            s.tokens, layouts, s.sites, s.topology, s.mesh_asked, s.schedule_asked, s.agree, split_batch=False
        )
        # Products must be sharded if the user says so; the small ops around them go where traffic is least.
        forced, traffic_s = s.shard_everything, choices.exchange_s
        return place_min_cut(s.gm.graph, s.tokens, layouts, s.topology, forced, traffic_s, force_s=0.0).seconds

    s.layouts = choose_axes(s.gm.graph, s.tokens, s.sites, s.layouts, make, price)


def _choose_schedules(s: State) -> None:
    assert s.layouts is not None
    s.choices = choose_schedules(
        s.tokens, s.layouts, s.sites, s.topology, s.mesh_asked, s.schedule_asked, s.agree, s.split_batch, s.parts
    )


def _rewrite_batch(s: State) -> None:
    assert s.choices is not None
    if s.choices.batch == 1:
        return
    groups = groups_of(s.topology, s.choices.batch)
    notes = s.choices.notes
    always = s.shard_everything or (s.mesh_asked or {}).get("batch", 1) > 1
    s.part = rewrite_batch(s.gm, s.mode, s.topology, groups, s.rank, f"{s.program}-batch", always)
    if s.part is None:
        s.split_batch = False
        _choose_schedules(s)
        return
    for schedule in s.part.schedules:
        check(schedule)
    s.groups, s.split_batch = tuple(groups), False
    mine = next(group for group in groups if s.rank in group)
    # From here on the job is this group and the model is its part of the batch.
    s.gm, s.topology, s.rank = s.part.gm, s.topology.subset(mine), mine.index(s.rank)
    for run in (_analyse_attention, _analyse_tokens, _choose_layouts, _choose_axes, _choose_schedules):
        run(s)
    s.choices = replace(s.choices, notes=notes)


def _place_min_cut(s: State) -> None:
    assert s.layouts is not None and s.choices is not None
    if s.topology.num_ranks == 1:  # a group of one rank: its part of the batch is whole
        s.placement = Placement({}, {}, {})
        return
    s.placement = place_min_cut(s.gm.graph, s.tokens, s.layouts, s.topology, s.shard_everything, s.choices.exchange_s)


def _rewrite_local(s: State) -> None:
    assert s.layouts is not None and s.placement is not None
    assert s.choices is not None
    while True:
        s.local = LocalGraph(s.mode, s.layouts.owners, s.rank, s.program)
        try:
            rewrite_local(s.gm, s.tokens, s.layouts, s.placement, s.local, s.choices.parts)
            return
        except CannotSplit as why:
            assert s.choices.whole is not None
            s.choices = replace(s.choices.whole, notes=(*s.choices.notes, f"tokens stay whole: {why}"))
            s.placement.gathers.clear()
            s.placement.moves.clear()


def _schedule_puts(s: State) -> None:
    assert s.local is not None
    schedule_puts(s.local.graph)


def _schedule_sites(s: State) -> None:
    assert s.local is not None and s.choices is not None
    known: dict[object, Schedule] = {}  # layers repeat: build each distinct site once
    for site in s.local.sites:
        key = site.geometry()
        if key not in known:
            known[key] = replace(s.choices.schedule(site), groups=s.groups)
            check(known[key])
        s.schedules.append(known[key])


PIPELINE: list[tuple[str, Callable[[State], None], str]] = [
    ("analyse_attention", _analyse_attention, "the only places where tokens meet; seeds of everything below"),
    ("analyse_tokens", _analyse_tokens, "labels flow both ways from the seeds through every op rule"),
    ("choose_layouts", _choose_layouts, "label classes are final: owners of tokens, one layout per value"),
    (
        "choose_axes",
        _choose_axes,
        "where an attention could be sharded along its batch instead: prices both, and switches",
    ),
    ("choose_schedules", _choose_schedules, "needs the owners of tokens, to price every way to run each attention"),
    ("rewrite_batch", _rewrite_batch, "if the plan splits the batch: the passes above again, for one group's part"),
    ("place_min_cut", _place_min_cut, "needs layouts, to know which ops have a local form, and prices of traffic"),
    ("rewrite_local", _rewrite_local, "every decision is made: write this rank's graph"),
    ("schedule_puts", _schedule_puts, "moves communication inside the finished graph"),
    ("schedule_sites", _schedule_sites, "one schedule per attention and gather, for all ranks, proved before use"),
]


def run_until(state: State, last: str) -> None:
    """Run the passes up to and including ``last``: enough for a prediction, nothing is rewritten."""
    for name, run, _ in PIPELINE:
        run(state)
        if name == last:
            return


def run_pipeline(state: State, strict: bool = False, dump: Path | None = None) -> Compiled:
    """Run every pass and return this rank's program.

    Raises:
        NotShardedError: ``strict`` and token work is left replicated; names the nodes.
        InternalError: an analysis pass changed the graph, or a rule wrote a wrong shape.
    """
    timings: dict[str, float] = {}
    captured, job_rank = state.gm.graph, state.rank
    before = _fingerprint(captured)
    for name, run, _ in PIPELINE:
        start = time.perf_counter()
        run(state)
        timings[name] = time.perf_counter() - start
        if _fingerprint(captured) != before:
            raise InternalError(f"pass {name} edited the captured graph", "passes write into a graph of their own")
    assert state.local is not None
    state.local.graph.lint()
    gm = fx.GraphModule(state.local.root, state.local.graph, "StreamFusionRank")
    report = report_graph(state, timings)
    if dump is not None and job_rank == 0:
        _dump(dump, state, gm, report)
    if strict and report.left_behind:
        worst = report.left_behind[0]
        raise NotShardedError(
            f"{len(report.left_behind)} token ops are not sharded; the costliest is {worst.node} ({worst.op})",
            worst.reason,
            "leave strict=False to run them replicated, or see the report for each node",
            node=worst.node,
            source=worst.source or None,
        )
    programs = {state.program: state.schedules}
    if state.part is not None:
        programs[state.part.program] = state.part.schedules
    return Compiled(gm, programs, report)


def _fingerprint(graph: fx.Graph) -> tuple[int, int]:
    return len(graph.nodes), hash(tuple((node.name, node.op) for node in graph.nodes))


def _dump(directory: Path, state: State, gm: fx.GraphModule, report: GraphReport) -> None:
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stem = directory / state.program
    stem.with_suffix(".captured.txt").write_text(str(state.gm.graph) + "\n")
    stem.with_suffix(".rank0.txt").write_text(str(gm.graph) + "\n")
    stem.with_suffix(".schedules.txt").write_text("\n\n".join(str(s) for s in dict.fromkeys(state.schedules)) + "\n")
    tables = "\n\n".join(["every candidate of the planner:", *report.plans])
    stem.with_suffix(".plan.txt").write_text(f"{report}\n\n{tables}\n")
