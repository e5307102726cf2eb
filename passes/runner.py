"""Run the list of pipeline.py: in order, timed, checked, and written down where a dump is asked for.

What is checked around every pass: the fields that it needs are there before it runs, those that it makes are there
after it, and the captured graph is as it was. A wrong order of the user's is an OptionError that says which pass makes
what is missing; a mistake inside a pass of ours is an InternalError.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from torch import fx

from sfcompile.codegen.engines.launch import mask_kind
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.toolchain.files import kernel_files
from sfcompile.errors import InternalError, NotShardedError, OptionError, StreamFusionError
from sfcompile.passes import pipeline
from sfcompile.passes.graph.lifetimes import check_lifetimes, hold_sources
from sfcompile.passes.graph.local_graph import COMMUNICATION
from sfcompile.passes.pipeline import Pass, Restart
from sfcompile.passes.report.dump import Dump
from sfcompile.passes.report.report import GraphReport
from sfcompile.passes.state import State
from sfcompile.runtime.program.value_rows import ValueRows
from sfcompile.runtime.rank.ops import ATTEND, PUT_FUSED
from sfcompile.torch_private import autocast_off, module_of

OLD_NAMES = {"schedule_puts": "order_puts", "schedule_fused_puts": "fuse_puts", "schedule_sites": "build_schedules"}
"""What passes were called once: orders may still use these names."""

FIELDS = tuple(entry.name for entry in fields(State) if not entry.init)
"""The fields of a state that passes make."""


@dataclass
class Compiled:
    """One rank's graph, the schedules of its communication sites by program, the plan for people, and the outputs that
    leave in shards."""

    gm: fx.GraphModule
    programs: dict[str, list[Schedule]]
    report: GraphReport
    kernel_attention: bool = False
    crossing: Mapping[int, ValueRows] = field(default_factory=dict)

    def kernels(self, machine_of: tuple[int, ...], cubins: bool = True) -> dict[str, bytes]:
        """The generated kernels of its attentions as files, if it runs attention that way (codegen/toolchain/files.py).

        Args:
            machine_of: machine of each rank of the job.
            cubins: compile them too, where Triton is installed.
        """
        files: dict[str, bytes] = {}
        if self.kernel_attention:
            for (program, site), kind in self.masks.items():
                files |= kernel_files(self.programs[program][site], machine_of, kind, compile=cubins)
        return files

    @property
    def masks(self) -> dict[tuple[str, int], tuple[str, bool]]:
        """By program and site, the kind of an attention's mask (codegen/engines/launch.py's mask_kind)."""
        kinds = {}
        for node in self.gm.graph.nodes:
            if node.target is ATTEND:
                _, mask, program, site = node.args
                kinds[program, site] = mask_kind(None if mask is None else mask.meta["val"])
        return kinds

    @property
    def order(self) -> list[str]:
        """The communication of the graph in its order: the same on every rank, or they would wait for ever.

        Programs are numbered: groups with different samples give them different keys.
        """
        number: dict[object, object] = {program: i for i, program in enumerate(self.programs)}
        calls = []
        for node in self.gm.graph.nodes:
            if node.target in COMMUNICATION:
                name, args = str(node.target), [arg for arg in node.args if isinstance(arg, (str, int))]
                if node.target is PUT_FUSED:  # what a put computes is a rank's own business
                    name, args = f"streamfusion.{args[2]}.default", args[:2]
                calls.append(f"{name} {[number.get(arg, arg) for arg in args]}")
        return calls


def passes_of(order: Sequence[str]) -> list[Pass]:
    """The passes of an order of names; of an empty one, PIPELINE.

    ``report_graph`` runs last where an order does not name it: a compile always has a report.

    Raises:
        OptionError: a name that is neither in PIPELINE nor registered.
    """
    if not order:
        return list(pipeline.PIPELINE)
    known = {entry.name: entry for entry in pipeline.PIPELINE} | pipeline.REGISTERED
    names = [OLD_NAMES.get(name, name) for name in order]
    unknown = [name for name in names if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        meant = f"Did you mean {close[0]!r}? " if close else ""
        raise OptionError(
            f"pass {unknown[0]!r} is unknown",
            f"{meant}There are {', '.join(known)}",
            "register a pass of your own with sfcompile.extend.register_pass before the model is compiled",
        )
    if "report_graph" not in names and "report_graph" in known:
        names.append("report_graph")
    return [known[name] for name in names]


def run_pipeline(state: State, strict: bool = False, dump: Path | None = None) -> Compiled:
    """Run every pass and return this rank's program.

    Args:
        dump: a directory that rank 0 fills: the graph after each pass, schedules, kernels and plan
            (passes/report/dump.py). What was known is written even when a pass fails.

    Raises:
        NotShardedError: ``strict`` and token work is left replicated; names the nodes.
        InternalError: a pass edited the captured graph, or failed a check of its own; or a rule wrote a wrong shape.
        OptionError: an order that names an unknown pass, or that leaves out one which others need.
    """
    entries = passes_of(state.asked.order)
    machines = state.topology.machine_of  # of the job: the state's own may become that of a group
    writer = Dump(dump, state.gm.graph) if dump is not None and state.rank == 0 else None
    timings: dict[str, float] = {}

    def after(entry: Pass, seconds: float, again: str) -> None:
        timings[entry.name] = timings.get(entry.name, 0.0) + seconds
        if writer is not None:
            graph = state.local.graph if hasattr(state, "local") else state.gm.graph
            writer.after(entry.name, again + entry.why, seconds, graph, _known(state))

    names = [entry.name for entry in entries]
    splits = "rewrite_batch" in names[: names.index("place_min_cut")] if "place_min_cut" in names else False
    if not splits:  # nobody makes a group's part of the batch: plan for whole batches
        state.asked = replace(state.asked, split_batch=False)
    _run(entries, state, after)
    if state.asked.weights is not None and state.weights is None:
        raise _missing(entries[-1], "weights", entries)
    if state.asked.late_reads:  # not a pass: an order of the user's own cannot leave it out
        hold_sources(state.local.graph)
        check_lifetimes(state.local.graph)
    state.local.graph.lint()
    state.report.pass_seconds = timings
    gm = module_of(state.local.root, state.local.graph, "StreamFusionRank")
    compiled = Compiled(gm, state.programs, state.report, state.asked.kernels, state.traffic.crossing)
    if writer is not None:
        _write_plan(writer, compiled, machines)
    if strict:
        _refuse_whole_ops(compiled.report)
    return compiled


def _run(entries: Sequence[Pass], state: State, after: Callable[[Pass, float, str], None], again: str = "") -> None:
    """Run passes; after each ``after`` is told the seconds that it took, and in words if it runs again."""
    for i, entry in enumerate(entries):
        start = time.perf_counter()
        restart = _checked(entry, entries, state)
        after(entry, time.perf_counter() - start, again)
        if restart:
            _run(entries[:i], state, after, f"again, after {entry.name}: ")


def _checked(entry: Pass, entries: Sequence[Pass], state: State) -> bool:
    """Run one pass, with the checks of the head of the file. Returns whether the passes above shall run once more."""
    for name in entry.needs.split():
        if not hasattr(state, name):
            raise _missing(entry, name, entries)
    captured = state.gm.graph
    before = _fingerprint(captured)
    try:
        with autocast_off():  # values of rewritten calls are those of the casts that the capture wrote
            restart = entry.run(state)
    except AttributeError as error:
        if error.obj is state and error.name in FIELDS:  # a pass that did not say that it needs it
            raise _missing(entry, error.name, entries) from error
        raise
    except AssertionError as error:
        if entry not in pipeline.PIPELINE:
            raise  # a check of the user's own
        raise InternalError(
            f"pass {entry.name} failed a check of its own: {error or 'assert'}",
            "what the passes before it found does not fit together, which no graph or option should bring about",
            "report this model, with the folder that options={'dump': DIR} writes",
        ) from error
    for name in entry.makes.split():
        if not hasattr(state, name):
            raise _fault(entry, f"pass {entry.name} did not make {name}", "it says that it makes it")
    if _fingerprint(captured) != before:
        raise _fault(entry, f"pass {entry.name} edited the captured graph", "passes write into a graph of their own")
    return isinstance(entry, Restart) and bool(restart)


def _missing(entry: Pass, name: str, entries: Sequence[Pass]) -> OptionError:
    """The error that a pass lacks a field: it is the order that is wrong."""
    known = [*pipeline.PIPELINE, *pipeline.REGISTERED.values()]
    makers = [other.name for other in known if name in other.makes.split() and name not in other.needs.split()]
    return OptionError(
        f"pass {entry.name} needs {name}, which no pass before it makes",
        f"{' or '.join(makers) or 'no pass'} makes it; the order is {', '.join(other.name for other in entries)}",
        f"put {makers[0] if makers else 'a pass'} before {entry.name}, or set state.{name} in a pass of your own",
    )


def _fault(entry: Pass, what: str, why: str) -> StreamFusionError:
    """The error that a pass breaks a rule of the runner: our mistake, or that of a pass from outside."""
    if entry in pipeline.PIPELINE:
        return InternalError(what, why, "report this")
    return OptionError(what, why, "correct that pass: it was registered from outside")


def _fingerprint(graph: fx.Graph) -> tuple[int, int]:
    return len(graph.nodes), hash(tuple((node.name, node.op) for node in graph.nodes))


def _refuse_whole_ops(report: GraphReport) -> None:
    """Object, as ``strict`` asks, to token ops that are computed whole on every rank."""
    if report.left_behind:
        worst = report.left_behind[0]
        raise NotShardedError(
            f"{len(report.left_behind)} token ops are not sharded; the costliest is {worst.node} ({worst.op})",
            worst.reason,
            "leave strict=False to run them replicated, or see the report for each node",
            node=worst.node,
            source=worst.source or None,
        )


def _write_plan(writer: Dump, compiled: Compiled, machines: tuple[int, ...]) -> None:
    """What a dump holds beside the passes: the plan, the schedules, the kernels' sources."""
    tables = "\n\n".join(["every candidate of the planner:", *compiled.report.plans])
    writer.add("plan.txt", f"{compiled.report}\n\n{tables}\n")
    distinct = dict.fromkeys(schedule for schedules in compiled.programs.values() for schedule in schedules)
    writer.add("schedules.txt", "\n\n".join(str(schedule) for schedule in distinct) + "\n")
    for file, data in compiled.kernels(machines, cubins=False).items():
        writer.add(f"kernels/{file}", data.decode())


def _known(state: State) -> dict[str, str]:
    """What the passes have found so far, as text."""
    known: dict[str, str] = {}
    if hasattr(state, "sites"):
        known["sites"] = "\n".join(str(site.node) for site in state.sites)
    if hasattr(state, "layouts"):
        known["layouts"] = "\n".join(f"{node}: {layout}" for node, layout in state.layouts.chosen.items())
    if hasattr(state, "choices"):
        known["choices"] = "\n".join([*state.choices.notes, str(state.choices)])
    if state.group is not None:
        known["groups"] = str(state.group.groups)
    if hasattr(state, "placement"):
        known["sharded"] = " ".join(str(node) for node in state.placement.needs)
        known["whole"] = "\n".join(f"{node}: {why}" for node, why in state.placement.reasons.items())
    if hasattr(state, "programs"):
        schedules = state.programs[state.local.program]
        known["schedules"] = "\n".join(f"site {i}: {schedule.title}" for i, schedule in enumerate(schedules))
    return known
