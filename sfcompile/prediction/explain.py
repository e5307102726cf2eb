"""What the compiler would do with a model on a topology, and why: in one process, without ranks, without a GPU.

``explain`` runs every pass that a compile runs, for one rank, on fake tensors. The numbers it shows are predictions of
the simulator and of the cost model on the topology's constants; nothing is timed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from sfcompile.capture.graph import Captured, break_reason
from sfcompile.codegen.plan.step import Step
from sfcompile.codegen.plan.volumes import volume
from sfcompile.errors import OptionError, StreamFusionError, UnsupportedError
from sfcompile.one_style import model_call
from sfcompile.passes.runner import Compiled, run_pipeline
from sfcompile.passes.state import State
from sfcompile.prediction.code import Facts, blocks_of, input_names
from sfcompile.prediction.explained import Attentions, Axis, Explained, ExplainedGraph, written
from sfcompile.prediction.html import page
from sfcompile.prediction.predict import asked_of, each_graph, step_of, travels, with_shares
from sfcompile.prediction.text import text_of
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology


class Explanation(Explained):
    """What :func:`explain` found. Prints as tables; ``to_html`` gives a page and ``to_json`` data for tools."""

    def to_html(self, path: str | Path | None = None) -> str:
        """One page that needs nothing else: plan, timeline, graph. Also written to ``path`` if one is given.

        Raises:
            OptionError: the file cannot be written.
        """
        return written(page(self), path)

    def __str__(self) -> str:
        return text_of(self)

    def full(self) -> str:
        """Like ``str()``, with every line of the graph, every candidate and every schedule."""
        return text_of(self, full=True)


def explain(
    model: torch.nn.Module,
    *inputs: Any,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    topology: Topology | str = "4x8:a100-efa",
    options: Mapping[str, Any] | None = None,
    mesh: Mapping[str, int] | None = None,
    schedule: str = "auto",
    placement: str = "auto",
    wire: str | Mapping[str, str] = "same",
    rank: int = 0,
    name: str = "",
    **named: Any,
) -> Explanation:
    """Run every pass on a model for a topology and say what each decided. Nothing is computed, no rank is started.

    Args:
        model: any module; it may be on the meta device, at full size.
        args, kwargs: what it is called with: meta tensors, or real ones if the model's own code looks at values between
            graphs. Or ``inputs`` and ``named``, behind the model.
        topology: as in the backend's option: "4x8:a100-efa", a file, or a Topology.
        options: the backend's; those that do not change the plan (timeouts, transports) are only checked.
        mesh, schedule, placement, wire: as in the backend's options, of which they are.
        rank: whose graph is shown.
        name: of the model, for titles.

    Raises:
        TopologyError: it cannot be read.
        OptionError: no such rank, a bad option, or something is given twice.
        MeshError: mesh or schedule are not possible.
        UnsupportedError: torch.compile traces nothing of the model.
    """
    where, asked = _topology(topology, rank)
    args, kwargs = model_call(model, inputs, named, args, kwargs)
    wish, kind = asked_of(options, {"mesh": mesh, "schedule": schedule, "placement": placement, "wire": wire})
    begun = time.perf_counter()
    graphs: list[ExplainedGraph] = []

    def visit(gm: fx.GraphModule, captured: Captured) -> None:
        state = State(captured.gm, captured.mode, where, rank, with_shares(wish, kind, captured, where, rank))
        compiled = run_pipeline(state)
        compiled.report.graph, compiled.report.break_reason = len(graphs) + 1, break_reason(gm)
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        tensors = input_names([names[i] for i in captured.tensor_inputs])
        graphs.append(_graph(state, compiled, tensors, step_of(compiled, rank, where)))

    def refused(gm: fx.GraphModule, error: UnsupportedError) -> None:
        graphs.append(ExplainedGraph(len(graphs) + 1, None, break_reason=break_reason(gm), refused=str(error)))

    try:
        each_graph(model, args, kwargs, visit, refused)
        stopped = ""
    except StreamFusionError:
        raise
    except Exception as error:
        # Code between two graphs looked at values, which nobody computed: what was found so far is still true.
        if not graphs or not graphs[-1].break_reason:
            raise
        stopped = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    weights = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return Explanation(
        name or type(model).__name__, asked, where, rank, tuple(graphs), sum(weights.values()),
        time.perf_counter() - begun, stopped, kind,
    )  # fmt: skip


def _topology(asked: Topology | str, rank: int) -> tuple[Topology, str]:
    """The topology that was asked for, and how it is called; it must have the rank."""
    where = asked if isinstance(asked, Topology) else Topology.parse(asked)
    if not 0 <= rank < where.num_ranks:
        raise OptionError(
            f"There is no rank {rank}", f"The topology has ranks 0 to {where.num_ranks - 1}", "Name one of them"
        )
    return where, asked if isinstance(asked, str) else f"{where.num_machines} machines, {where.num_ranks} ranks"


def _graph(state: State, compiled: Compiled, names: list[str], step: Step) -> ExplainedGraph:
    """What is to be said about a graph whose passes have run."""
    reasons = {node.name: reason for node, reason in state.placement.reasons.items()}
    if state.group is not None:
        reasons |= {node.name: f"batch: {why}" for node, (_, why) in state.group.left.items()}
    by_features = [node for group in state.placement.features for node in group.nodes]
    sharded = frozenset(node.name for node in (*state.placement.needs, *by_features))
    blocks = blocks_of(state.local.graph, Facts(state.topology, names, sharded, reasons, step))
    report = compiled.report
    return ExplainedGraph(
        report.graph, report, _axes(state, names), _attentions(state), blocks, state.choices, step,
        report.break_reason, groups=state.num_groups,
    )  # fmt: skip


def _axes(state: State, names: list[str]) -> tuple[Axis, ...]:
    owners, chosen = state.layouts.owners, state.layouts.chosen
    segments: dict[int, list[int]] = {}
    for first, length in owners.segments:
        segments.setdefault(owners.axis_of(((first, length),)), []).append(length)
    inputs: dict[int, list[tuple[str, int, int]]] = {}
    placeholders = [node for node in state.gm.graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=False):
        if node in chosen:
            layout = chosen[node]
            inputs.setdefault(owners.axis_of(layout.runs), []).append((name, layout.dim, layout.tokens))
    axes = []
    left = dict(segments)
    for tokens, count, work in state.layouts.axes:
        axis = next(key for key, parts in left.items() if sum(parts) == tokens and len(parts) == count)
        axes.append(Axis(tokens, tuple(left.pop(axis)), work, tuple(inputs.get(axis, ()))))
    return tuple(axes)


def _attentions(state: State) -> tuple[Attentions, ...]:
    """The kinds of attention that ranks share, and how often each occurs in this rank's graph."""
    kinds = []
    for key, plan in state.choices.plans.items():
        count = sum(isinstance(s, AttentionSite) and s.geometry() == key for s in state.local.sites)
        if not count:
            continue
        site = state.choices.sites[key]
        schedule = plan.best.schedule(site, state.choices.topology)
        forms, sent = volume(schedule, state.choices.topology), schedule.bytes_by_link(state.choices.topology)
        inside, across = (
            (str(form), value, moved)
            for form, value, moved in zip((forms.inside, forms.across), forms.bytes, sent, strict=True)
        )
        symbols = {str(symbol): value for symbol, value in forms.numbers.items()}
        kinds.append(Attentions(count, _what(site), plan, inside, across, symbols, str(schedule)))
    return tuple(kinds)


def _what(site: AttentionSite) -> str:
    queries, keys = (sum(n for runs in places for _, n in runs) for places in (site.q_positions, site.kv_positions))
    tokens = f"{queries} tokens" if queries == keys else f"{queries} queries on {keys} keys"
    grouped = f" over {site.kv_heads} K/V heads" if site.kv_heads != site.heads else ""
    more = "".join([", causal" if site.causal else "", ", with a mask" if site.mask else ""])
    return f"{tokens}, {site.heads} heads{grouped} x {site.head_dim}, batch {site.batch}{more}{travels(site)}"
