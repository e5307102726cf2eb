"""The backend: ``torch.compile(model, backend="streamfusion")``.

Dynamo graph -> capture -> passes -> this rank's graph -> Inductor (or eager). The passes are in passes/; what a call
does before and after the graph is in graph_call.py.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import CodeType, MappingProxyType
from typing import Any

import torch
from torch import fx

from sfcompile.boundary import across, may_cross
from sfcompile.capture.aliases import refuse_overlap
from sfcompile.capture.by_sizes import KEPT, BySizes, SizedProgram, moving_inputs
from sfcompile.capture.fewer_breaks import fewer_breaks
from sfcompile.capture.graph import Captured, CaptureFacts, break_reason, capture, present, refuse_training
from sfcompile.capture.refused import unseen_write
from sfcompile.capture.wrappers import without_wrappers
from sfcompile.codegen.toolchain.loader import cache_folder
from sfcompile.device import device_of, dtype_of, engines_for, refuse_transport, start, topology_for
from sfcompile.errors import (
    InternalError,
    MeshError,
    OptionError,
    StreamFusionError,
    TopologyError,
    TrainingGraphError,
    UnsupportedError,
)
from sfcompile.extend import registered
from sfcompile.graph_call import (
    CallFacts,
    as_called,
    compared_inputs,
    compared_weights,
    not_shared,
    refuse_sharded,
    share_inputs,
    share_weights,
    watched,
)
from sfcompile.groups import in_group, refuse, refuse_together, session_for, world_size
from sfcompile.lowering.arrivals import arrivals_of
from sfcompile.lowering.compile_once import compile_once
from sfcompile.lowering.inner import run_inner
from sfcompile.lowering.kept_plans import VARIABLE, KeptPlans, agreed, new_mark
from sfcompile.lowering.rank_graph import compile_alike, run_passes
from sfcompile.measuring.auto import SourcedTopology, assumed_links, given_links, measured_links, resolved
from sfcompile.options import ASSUMED, Options
from sfcompile.passes.report.history import last_report, next_whole_call, remember, remember_skipped, reports
from sfcompile.passes.report.report import short_source
from sfcompile.passes.report.whole_call import Skipped
from sfcompile.passes.runner import Compiled
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.value_rows import ValueRows
from sfcompile.runtime.rank import values
from sfcompile.runtime.rank.calls import fingerprint
from sfcompile.runtime.rank.job_store import check_secret
from sfcompile.runtime.rank.process_group import check_ranks
from sfcompile.runtime.rank.session import Session, sessions, use_session
from sfcompile.runtime.rank.sharded_value import ShardedValue, with_wholes
from sfcompile.runtime.rank.sharded_weight import ShardedWeight
from sfcompile.runtime.wires.transport import peer_failed
from sfcompile.sharded_weights import by_machine, cut_of, cuts_weights, shares_of
from sfcompile.torch_logs import artifacts, speak
from sfcompile.torch_private import FakeTensorMode, autocast_off, is_plain
from sfcompile.tracing.trace import follow_environment
from sfcompile.verify import Verifier
from sfcompile.version import __version__

log = logging.getLogger("sfcompile")
_REFUSALS = (OptionError, MeshError, TopologyError)
"""What is found wrong with the options before ranks meet for a compile: on one rank, or on all of them."""


def _left_to_python(code: CodeType, reason: str) -> None:
    remember_skipped(Skipped(code.co_qualname, short_source(f"{code.co_filename}:{code.co_firstlineno}"), reason))


def _goes_over(options: Mapping[str, Any]) -> Callable[[Any], Any] | None:
    """What a compiled function returns is whole, also where a value crossed its graphs in shards."""
    return with_wholes if options.get("boundaries") == "shards" else None


def _programs(options: Mapping[str, Any]) -> int:
    """To Dynamo a value in shards of another size is another kind of input, and each size a program; so is each number
    of a block's own. Past its limit of eight it would run blocks whole on every rank."""
    return KEPT if options.get("boundaries", "whole") != "whole" else 0


def _refused(options: Mapping[str, Any], code: CodeType, reason: str) -> None:
    """Rank 0's inputs go into graphs, and of a function that runs as Python there are none.

    Raises:
        UnsupportedError: on every rank, where they were asked for.
    """
    if options.get("inputs") == "rank0" and world_size(in_group(Options.from_dict(options))) > 1:
        error = UnsupportedError(
            f"{code.co_qualname} ({short_source(f'{code.co_filename}:{code.co_firstlineno}')}) is not compiled "
            f"({reason.splitlines()[0].rstrip('.')}), and options={{'inputs': 'rank0'}}",
            "every rank would compute it from inputs of its own",
            "mend that, or use options={'inputs': 'checked'} and give every rank the same inputs",
        )
        refuse(error, options, {"function": code.co_qualname})


@functools.partial(fewer_breaks, skipped=_left_to_python, returned=_goes_over, programs=_programs, refused=_refused)
def streamfusion_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph for this rank.

    Every rank must call with the same graph and the same input shapes; each gets a callable that takes the same full
    inputs and returns the same full outputs. One rank: plain Inductor.

    Raises:
        OptionError, MeshError, TopologyError: bad options.
        TrainingGraphError: gradients are enabled and wanted.
        RankMismatchError: ranks compile different graphs.
        NotShardedError: ``strict=True`` and something is left replicated.
    """
    try:
        asked = in_group(Options.from_dict(options, mode))
        asked = replace(asked, topology=resolved(asked.topology))
        ranks = world_size(asked)
        asked.check_world(ranks)
        if ranks > 1:
            check_secret()
    except _REFUSALS as error:
        refuse(error, options, _describe(gm, example_inputs, Options()))
    try:
        refuse_training(example_inputs)
    except TrainingGraphError as error:
        if sessions():  # later the others may be in a call: waiting for them here would only make them wait longer
            raise
        refuse(error, options, _describe(gm, example_inputs, asked))
    if ranks == 1:
        if asked.group is None:
            _say_alone()
        return run_inner(gm, example_inputs, None, asked)
    gm, example_inputs, flat = without_wrappers(gm, example_inputs)
    run = _on_ranks(gm, example_inputs, asked)
    return run if flat is None else lambda *inputs: run(*flat(inputs))


@functools.cache
def _say_alone() -> None:
    """Once in a process: it may well be a rank that was started without its launcher."""
    speak(0)
    log.info(
        "one rank runs here: the model is compiled as by plain torch.compile, and nothing is sharded. Several are "
        "started by sfcompile run --ranks 4 script.py, or torchrun --nproc-per-node 4 script.py"
    )


def _on_ranks(gm: fx.GraphModule, example_inputs: Sequence[Any], asked: Options) -> Callable[..., Any]:
    """The callable of several ranks, of inputs that are plain tensors and numbers."""
    session = session_for(asked)
    with session.turn(), session.guard(), use_session(session):
        try:
            if "SFCOMPILE_TRACE" in os.environ:
                follow_environment()
            device = device_of(example_inputs)
            refuse_transport(device, asked.transport)
            session.reconfigure(asked.transport, asked.timeout_s)
            start(device, session, asked)
            refuse_sharded(asked, device, session.topology)
            named = _named_topology(asked, session)
        except _REFUSALS as error:
            refuse_together(error, session, _describe(gm, example_inputs, asked))
        first, any_size = _compile_rank(gm, example_inputs, asked, session, named)
    moving = moving_inputs(gm, example_inputs)
    if any_size or not moving:
        return first.run

    def compile(inputs: Sequence[Any]) -> SizedProgram:
        return _compile_rank(gm, inputs, asked, session, named)[0]

    return BySizes(gm, first, example_inputs, moving, compile, session)


def _compile_rank(
    gm: fx.GraphModule, example_inputs: Sequence[Any], asked: Options, session: Session, named: Topology | None
) -> tuple[SizedProgram, bool]:
    """A graph's program for the sizes of some inputs, and whether it serves other sizes too (an unsharded one does)."""
    began = time.perf_counter()
    device = device_of(example_inputs)
    plans = KeptPlans.of(gm, example_inputs, asked, cache_folder() / "plans", registered())
    try:
        arrivals = arrivals_of(example_inputs)
        captured = _captured(gm, example_inputs, plans)
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        refuse_overlap(example_inputs, captured.written, names)
        shares = shares_of(example_inputs, captured.written, cut_of(asked, session), cuts_weights(asked, session))
    except OptionError as error:
        refuse_together(error, session, _describe(gm, example_inputs, asked))
    except UnsupportedError as error:
        session.agree("unsharded", _describe(gm, example_inputs, asked))
        if asked.inputs == "rank0":
            raise not_shared(error) from error
        log.warning("a graph of %d nodes is not sharded: %s", len(gm.graph.nodes), error)
        eagerly = any(isinstance(value, ShardedWeight | ShardedValue) for value in example_inputs)
        eagerly = eagerly or unseen_write(gm) is not None  # Inductor would drop that call
        return SizedProgram(gm.forward if eagerly else run_inner(gm, example_inputs, None, asked)), True
    capture_s = time.perf_counter() - began
    samples = captured.samples if asked.inputs != "trusted" else 0
    digest = f"{captured.mark}\n{samples}\n{asked.as_dict()}\n{named or session.topology}"
    digest += f"\nshares {shares}" if shares else ""
    digest += f"\narrivals {arrivals}" if arrivals else ""
    described = _describe(gm, example_inputs, asked, captured.written)
    session.agree(f"{digest}\n{described}", described)
    # Only now: ranks that compile different things have said so, and those that are here share and measure together.
    kept = share_weights(names, example_inputs, captured, session, asked)
    links = _links(asked, named, session, example_inputs)
    topology = links.topology

    compiled, mode = _planned(gm, example_inputs, captured, shares, topology, asked, session, plans, arrivals)
    compiled.report.break_reason, compiled.report.links = break_reason(gm), links.source
    compiled.report.pass_seconds = {"capture": capture_s, **compiled.report.pass_seconds}
    engines, compiled.report.attention = engines_for(compiled.programs, device, session, asked, compiled.masks)
    compiled.report.transport = session.side.carried_by
    local_gm, boundary = across(compiled, captured, mode, arrivals, session, asked)
    compiled.report.boundary = boundary.line
    for program, schedules in compiled.programs.items():
        session.load(program, schedules, engines[program])
    name = hashlib.sha256(digest.encode()).hexdigest()
    shared = share_inputs(name, example_inputs, captured, session, asked)
    if shared is not None:
        compiled.report.inputs = shared.line(topology)
        compiled.report.programs[shared.program] = [schedule.site.name for schedule in shared.schedules]
    lines = [compiled.report.weights, "" if kept is None else kept.line]
    compiled.report.weights = "; ".join(line for line in lines if line)
    planned_s = time.perf_counter() - began
    _announce(compiled, session, planned_s)
    machine_of, report = session.topology.machine_of, compiled.report
    tell = functools.partial(setattr, report, "blocks")
    # The casts of autocast stand in the graph: with autocast still on around it they would be done twice.
    with autocast_off():
        local = compile_once(
            local_gm, mode, asked, session.rank, machine_of, session.exchange, tell,
            functools.partial(_say_progress, report.graph, time.perf_counter()),
            functools.partial(_heed, session), cache_folder() / "plans",
        )  # fmt: skip
    blocks = f", {report.blocks}" if report.blocks else ""
    all_s = time.perf_counter() - began
    log.info(
        "graph %d is ready after %.1f s: planned in %.1f, compiled in %.1f%s",
        report.graph, all_s, planned_s, all_s - planned_s, blocks,
    )  # fmt: skip
    session.meet()
    compared = compared_inputs(example_inputs, asked, captured)
    places = compared, [i for i in compared_weights(example_inputs, asked) if i not in captured.written]
    talks = shared is not None or any(compiled.programs.values())
    draw = captured.draws and asked.inputs != "trusted"
    verifier = None
    if asked.verify:
        assert isinstance(captured, Captured), "nothing is kept where calls are compared with one process"
        verifier = Verifier(gm, captured, asked.verify, asked.wire, functools.partial(setattr, report, "verified"))
    facts = CallFacts(session, name, names, captured, *places, shared, talks, draw, kept, shares, verifier, boundary)
    run = as_called(local, facts)
    if device.type == "cpu":
        run = watched(run, compiled, session, topology, shared, verifier)
    return SizedProgram(_second_call_speaks(run), captured.numbers), False


def _heed(session: Session) -> None:
    """Between pieces of long work: what another rank has told of its failure ends it here too."""
    notice = session.trouble()
    if notice is not None:
        raise peer_failed(session.rank, notice)


def _captured(gm: fx.GraphModule, inputs: Sequence[Any], plans: KeptPlans | None) -> CaptureFacts:
    """What a graph's capture finds: the capture itself, or what is known of it from an earlier start."""
    known = None if plans is None else plans.facts()
    if known is not None:
        return known
    captured = capture(gm, inputs, keep_numbers=True)
    if plans is not None:
        plans.keep_facts(captured.facts)
    return captured


def _planned(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    captured: CaptureFacts,
    shares: Sequence[int],
    topology: Topology,
    asked: Options,
    session: Session,
    plans: KeptPlans | None,
    arrivals: Mapping[int, ValueRows] = MappingProxyType({}),
) -> tuple[Compiled, FakeTensorMode]:
    """Collective: this rank's graph and the mode of its values, from the disk on every rank, or from the passes on
    every rank (lowering/kept_plans.py)."""
    began = time.perf_counter()
    on_gpu = device_of(inputs).type == "cuda" and torch.cuda.get_device_name(device_of(inputs))
    decided_by = repr((values.encode(topology), values.encode(session.topology), session.rank, session.group,
                       tuple(shares), session.side.no_kernels, on_gpu, arrivals, bool(break_reason(gm))))  # fmt: skip
    with artifacts(asked, session.rank) as wish:
        kept = plans.graph(decided_by) if plans is not None and wish.dump is None else None
        had = "" if kept is None else kept.mark
        take, mark = agreed(session.exchange([had, new_mark()], "look for their plans on disk"))
        if take and kept is not None:
            kept.compiled.report.pass_seconds = {"read from disk": time.perf_counter() - began}
            return kept.compiled, kept.mode
        whole = captured if isinstance(captured, Captured) else capture(gm, inputs, keep_numbers=True)
        if whole.facts != (captured.facts if isinstance(captured, Captured) else captured):
            raise InternalError(
                f"a graph of {len(gm.graph.nodes)} nodes was captured otherwise than at an earlier start",
                "what decides a capture is more than what it is kept under on disk",
                f"set {VARIABLE}=off, and report this model",
            )

        crossing = may_cross(gm, whole, asked)

        def passes(split_batch: bool) -> Compiled:
            return run_passes(
                whole, topology, session.rank, wish, session.from_first, split_batch, dump=True,
                kernels_put=not session.side.no_kernels, weights=shares, homes=session.topology.machine_of,
                by_machine=by_machine(asked, session), crossing=crossing, arrivals=arrivals,
            )  # fmt: skip

        compiled = compile_alike(passes, lambda mine: session.exchange(mine.order, "compare their graphs"))
    if plans is not None and wish.dump is None:
        plans.keep_graph(decided_by, compiled, mark)
    return compiled, whole.mode


def _say_progress(graph: int, began: float, done: int, own: int, every: int) -> None:
    """A line for each piece that this rank has compiled, where there are several; rank 0's is seen."""
    if every > 1:
        others = f", other ranks compile {every - own} more" if own < every else ""
        log.info("graph %d compiling: %d of %d pieces after %.1f s%s", graph, done, own, time.perf_counter() - began,
                 others)  # fmt: skip


def _second_call_speaks(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``; at its second call the model's first is over, and rank 0 says what it was if it was several graphs."""
    calls = itertools.count(1)

    def called(*args: Any) -> Any:
        if next(calls) == 2 and (said := next_whole_call()):
            log.info(said)
        return run(*args)

    return called


def _links(asked: Options, named: Topology | None, session: Session, inputs: Sequence[Any]) -> SourcedTopology:
    """What the graph is planned on. Collective: the first time they are wanted, links are measured."""
    if named is not None:
        return given_links(named)
    device = device_of(inputs)
    base = topology_for(device, session.topology)
    if device.type == "cuda":  # of several kinds are planned for as rank 0's: all have to plan alike
        base = session.exchange(base, "agree on constants of their GPUs")[0]
    if asked.topology == ASSUMED:
        return assumed_links(base)
    return measured_links(session, base, asked.transport, dtype_of(inputs))


def _named_topology(asked: Options, session: Session) -> Topology | None:
    """The topology that the options name; None: it is found, and measured.

    Raises:
        TopologyError: it cannot be read, or is not one of these ranks.
    """
    value = asked.topology
    if value in ("auto", ASSUMED):
        return None
    topology = value if isinstance(value, Topology) else Topology.parse(str(value))
    check_ranks(topology, session.topology.num_ranks)
    return topology


def _describe(gm: fx.GraphModule, inputs: Sequence[Any], asked: Options, written: Sequence[int] = ()) -> dict[str, str]:
    """What ranks compare when they disagree, in words: entry -> value. Buffers that are ``written`` to are compared at
    calls."""
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    described = {"outcome": "compiled"} | {f"options[{name!r}]": repr(value) for name, value in asked.as_dict().items()}
    described["graph"] = f"{len(gm.graph.nodes)} nodes"
    described["versions"] = f"sfcompile {__version__}, torch {torch.__version__}"
    for name, value in zip(names, inputs, strict=False):
        if isinstance(value, torch.Tensor) and is_plain(value):
            described[f"input {name}"] = f"{str(value.dtype).removeprefix('torch.')}{list(map(present, value.shape))}"
    weights = [inputs[i] for i in compared_weights(inputs, asked) if i not in written]
    if weights:
        described["weights (are they seeded or loaded alike?)"] = f"{fingerprint(weights):08x}"
    return described


def _announce(compiled: Compiled, session: Session, seconds: float) -> None:
    """Rank 0 says in a line what was planned; the whole plan is at level DEBUG and in ``last_report()``."""
    report = compiled.report
    remember(report)
    speak(session.global_rank)
    for warning in report.warnings:
        log.warning(warning)
    log.info(
        "graph %d planned for %d ranks in %.1f s, compiling it: %s",
        report.graph,
        report.num_ranks,
        seconds,
        report.headline,
    )
    log.debug("\n%s", report)


__all__ = ["StreamFusionError", "last_report", "reports", "streamfusion_backend"]
