"""The ordered list of passes, and the runner that times, checks and dumps.

Read ``PIPELINE`` from top to bottom: that is the compiler. Passes are plain functions of a :class:`State`; others may
be registered, and an order of names (``State.order``) adds, drops or moves them (sfcompile/extend.py is the door).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import fx

from sfcompile.codegen.engines.launch import mask_kind
from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.toolchain.files import kernel_files
from sfcompile.errors import InternalError, NotShardedError, OptionError
from sfcompile.passes.analyse_attention import analyse_attention
from sfcompile.passes.analyse_tokens import analyse_tokens, folded_seeds, seeds_of
from sfcompile.passes.choose_axes import Preference, choose_axes
from sfcompile.passes.choose_layouts import Layouts, choose_layouts
from sfcompile.passes.choose_schedules import choose_schedules, groups_of
from sfcompile.passes.fuse_puts import schedule_fused_puts
from sfcompile.passes.graph.local_graph import COMMUNICATION, LocalGraph
from sfcompile.passes.order_puts import schedule_puts
from sfcompile.passes.place_min_cut import Placement, place_min_cut
from sfcompile.passes.report.dump import Dump
from sfcompile.passes.report.report import GraphReport
from sfcompile.passes.report_graph import report_graph
from sfcompile.passes.rewrite_batch import rewrite_batch
from sfcompile.passes.rewrite_local import CannotSplit, rewrite_local
from sfcompile.passes.state import State
from sfcompile.runtime.rank.ops import ATTEND, PUT_FUSED
from sfcompile.torch_private import autocast_off


@dataclass
class Compiled:
    """One rank's graph, the schedules of its communication sites by program, and the plan for people."""

    gm: fx.GraphModule
    programs: dict[str, list[Schedule]]
    report: GraphReport
    kernel_attention: bool = False

    def kernels(self, machine_of: tuple[int, ...], cubins: bool = True) -> dict[str, bytes]:
        """The generated kernels of its attentions as files, if it runs attention that way (codegen/toolchain/files.py).

        Args:
            machine_of: machine of each rank of the job.
            cubins: compile them too, where Triton is installed.
        """
        found: dict[str, bytes] = {}
        if self.kernel_attention:
            for node in self.gm.graph.nodes:
                if node.target is ATTEND:
                    _, mask, program, site = node.args
                    kind = mask_kind(None if mask is None else mask.meta["val"])
                    found |= kernel_files(self.programs[program][site], machine_of, kind, compile=cubins)
        return found

    @property
    def order(self) -> list[str]:
        """The communication of the graph in its order: the same on every rank, or they would wait for ever.

        Programs are numbered: groups with different samples give them different keys.
        """
        number: dict[object, object] = {program: i for i, program in enumerate(self.programs)}
        found = []
        for node in self.gm.graph.nodes:
            if node.target in COMMUNICATION:
                name, args = str(node.target), [arg for arg in node.args if isinstance(arg, (str, int))]
                if node.target is PUT_FUSED:  # what a put computes is a rank's own business
                    name, args = f"streamfusion.{args[2]}.default", args[:2]
                found.append(f"{name} {[number.get(arg, arg) for arg in args]}")
        return found


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
    for name, run, _ in passes_of(s):
        if name == "rewrite_batch":
            break
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


def _schedule_fused_puts(s: State) -> None:
    if s.fuse_puts:
        assert s.local is not None
        s.fused_puts = schedule_fused_puts(s.local.graph)


def _schedule_sites(s: State) -> None:
    assert s.local is not None and s.choices is not None
    known: dict[object, Schedule] = {}  # layers repeat: build each distinct site once
    for site in s.local.sites:
        key = site.geometry()
        if key not in known:
            known[key] = replace(s.choices.schedule(site), groups=s.groups)
            check(known[key])
        s.schedules.append(known[key])


Pass = tuple[str, Callable[[State], None], str]
"""Name, function, and why it stands where it does."""

PIPELINE: list[Pass] = [
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
    ("schedule_fused_puts", _schedule_fused_puts, "on GPUs: what makes q, k, v moves into the kernel that sends them"),
    ("schedule_sites", _schedule_sites, "one schedule per attention and gather, for all ranks, proved before use"),
]


REGISTERED: dict[str, Pass] = {}
"""Passes from outside, by name; they run where an order names them."""


def passes_of(state: State) -> list[Pass]:
    """The passes of a state in their order.

    Raises:
        OptionError: a name that is neither in PIPELINE nor registered.
    """
    if not state.order:
        return list(PIPELINE)
    known = {entry[0]: entry for entry in PIPELINE} | REGISTERED
    unknown = [name for name in state.order if name not in known]
    if unknown:
        raise OptionError(
            f"pass {unknown[0]!r} is unknown",
            f"there are {', '.join(known)}",
            "register a pass of your own with sfcompile.extend.register_pass before the model is compiled",
        )
    return [known[name] for name in state.order]


def run_until(state: State, last: str) -> None:
    """Run the passes up to and including ``last``: enough for a prediction, nothing is rewritten."""
    for name, run, _ in passes_of(state):
        run(state)
        if name == last:
            return


def run_pipeline(state: State, strict: bool = False, dump: Path | None = None) -> Compiled:
    """Run every pass and return this rank's program.

    Args:
        dump: a directory that rank 0 fills: the graph after each pass, schedules, kernels and plan
        (passes/report/dump.py).
            What was known is written even when a pass fails.

    Raises:
        NotShardedError: ``strict`` and token work is left replicated; names the nodes.
        InternalError: an analysis pass changed the graph, or a rule wrote a wrong shape.
        OptionError: an order that names an unknown pass, or that leaves out one which others need.
    """
    timings: dict[str, float] = {}
    captured, job_rank, machines = state.gm.graph, state.rank, state.topology.machine_of
    before = _fingerprint(captured)
    writer = Dump(dump, captured) if dump is not None and job_rank == 0 else None
    for name, run, why in passes_of(state):
        start = time.perf_counter()
        try:
            with autocast_off():  # values of rewritten calls are those of the casts that the capture wrote
                run(state)
        except AssertionError as error:
            raise OptionError(
                f"pass {name} lacks what an earlier pass finds",
                f"the order is {', '.join(entry[0] for entry in passes_of(state))}",
                "put back the pass that finds it; each pass says in its docstring or its line what it needs",
            ) from error
        timings[name] = time.perf_counter() - start
        if _fingerprint(captured) != before:
            raise InternalError(f"pass {name} edited the captured graph", "passes write into a graph of their own")
        if writer is not None:
            graph = state.local.graph if state.local is not None else state.gm.graph
            writer.after(name, why, timings[name], graph, _found(state))
    if state.local is None:
        raise OptionError(
            "no pass wrote this rank's graph",
            f"the order is {', '.join(state.order)}",
            "keep rewrite_local, or write state.local in a pass of your own",
        )
    state.local.graph.lint()
    gm = fx.GraphModule(state.local.root, state.local.graph, "StreamFusionRank")
    report = report_graph(state, timings)
    programs = {state.program: state.schedules}
    if state.part is not None:
        programs[state.part.program] = state.part.schedules
    compiled = Compiled(gm, programs, report, state.kernels)
    if writer is not None:
        tables = "\n\n".join(["every candidate of the planner:", *report.plans])
        writer.write("plan.txt", f"{report}\n\n{tables}\n")
        distinct = dict.fromkeys(schedule for schedules in programs.values() for schedule in schedules)
        writer.write("schedules.txt", "\n\n".join(str(schedule) for schedule in distinct) + "\n")
        for file, data in compiled.kernels(machines, cubins=False).items():
            writer.write(f"kernels/{file}", data.decode())
    if strict and report.left_behind:
        worst = report.left_behind[0]
        raise NotShardedError(
            f"{len(report.left_behind)} token ops are not sharded; the costliest is {worst.node} ({worst.op})",
            worst.reason,
            "leave strict=False to run them replicated, or see the report for each node",
            node=worst.node,
            source=worst.source or None,
        )
    return compiled


def _fingerprint(graph: fx.Graph) -> tuple[int, int]:
    return len(graph.nodes), hash(tuple((node.name, node.op) for node in graph.nodes))


def _found(state: State) -> dict[str, str]:
    """What the passes have found so far, as text."""
    found = {"sites": "\n".join(str(site.node) for site in state.sites)}
    if state.layouts is not None:
        found["layouts"] = "\n".join(f"{node}: {layout}" for node, layout in state.layouts.chosen.items())
    if state.choices is not None:
        found["choices"] = "\n".join([*state.choices.notes, str(state.choices)])
    if state.part is not None:
        found["groups"] = str(state.groups)
    if state.placement is not None:
        found["sharded"] = " ".join(str(node) for node in state.placement.needs)
        found["whole"] = "\n".join(f"{node}: {why}" for node, why in state.placement.reasons.items())
    if state.schedules:
        found["schedules"] = "\n".join(f"site {i}: {schedule.title}" for i, schedule in enumerate(state.schedules))
    return found
