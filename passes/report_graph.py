"""Count what the passes decided and put it into a report."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import fx

from sfcompile.codegen.plan.step import Step
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.errors import source_line
from sfcompile.options import AS_IT_IS
from sfcompile.passes.graph.cost import exchanged, flops, is_view, unpriced, value_bytes
from sfcompile.passes.graph.layout import Layout, Ownership, Window
from sfcompile.passes.graph.op_view import OpView, is_getitem
from sfcompile.passes.graph.stages import stages_of, without
from sfcompile.passes.report.report import GraphReport, Left, short_source
from sfcompile.passes.rules.per_head import PerHead
from sfcompile.passes.rules.rule import parts_of
from sfcompile.passes.state import COPIES, Geometry, Move, State
from sfcompile.runtime.program.formats import words
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.rank.ops import attention_flops


def run(state: State) -> None:
    """The pass: fills ``report``. The runner adds how long every pass took."""
    state.report = report_graph(state)


def report_graph(state: State) -> GraphReport:
    """What was decided, counted. Where the batch was split, the passes saw one group's part: the report is of all."""
    main, group, schedules = state.choices.main, state.group, state.programs[state.local.program]
    report = GraphReport(
        state.topology.num_ranks,
        state.topology.num_machines,
        *(main.best.degrees if main is not None else (1, state.topology.num_ranks)),
        state.layouts.axes,
        programs={state.local.program: [site.name for site in state.local.sites]},
        topology=state.topology,
        other_s=state.choices.other_s,
        stages=stages_of(state.local.graph, state.topology),
        fused_puts=state.fused_puts,
    )
    report.wire = _wire(state)
    _count_work(state, report)
    if group is not None:
        report.batch, report.copies = group.batch, group.copies
        report.num_ranks *= len(group.groups)
        report.num_machines = group.num_machines
        report.total_flops *= report.batch / group.share
        report.rank_flops *= len(group.groups)
    if group is not None and group.sites:
        report.programs[group.program] = [site.name for site in group.sites]
        schedules = [*schedules, *state.programs[group.program]]
    if state.weights is not None:
        report.weights = _weights(state, report)
        report.programs[state.weights.program] = [schedule.site.name for schedule in state.weights.schedules]
        schedules = [*schedules, *state.weights.schedules]
    report.schedules = len(set(map(id, schedules)))
    report.heap_bytes = 2 * max((schedule.heap_bytes for schedule in schedules), default=0)
    report.plans = [*state.choices.notes]
    report.plans += [
        f"{count} attention{'s' * (count > 1)} like this\n{state.choices.plans[key]}"
        for key, count in state.choices.counts.items()
    ]
    if main is not None and main.price.seconds is not None:
        split = f"batch {report.batch} x " if report.batch > 1 else ""
        report.schedule = f"{split}{main.best}{f', {report.copies} copies' if report.copies > 1 else ''}"
        report.predicted_s = main.price.seconds
        report.exposed_s, report.limit_s = main.price.exposed_s, main.price.limit_s
    names = {site.name for site in state.local.sites if isinstance(site, AttentionSite)}
    report.sharded_sites = sum(site.node.name in names for site in state.sites)
    report.local_sites = len(state.sites) - report.sharded_sites
    report.by_heads = sum(isinstance(state.tokens.rules.get(node), PerHead) for node in state.placement.needs)
    _list_traffic(state, report)
    _list_whole_ops(state, report)
    report.warnings += _likely_attentions(state)
    if not state.sites and not state.placement.needs:
        report.warnings.append("no attention found: nothing was sharded, every rank computes the whole graph")
    elif not state.placement.needs and (group is None or group.batch == 1):
        report.warnings.append("nothing was sharded: on this topology every rank computing the whole graph is cheaper")
    return report


def _weights(state: State, report: GraphReport) -> str:
    """What of the weights this rank holds, what it gathers, and what that adds to the step."""
    weights, job, stages = state.weights, state.asked.weights, report.stages
    assert weights is not None and job is not None and stages is not None
    step = Step(stages, state.programs, job.rank, job.topology)
    alone = Step(without(stages, weights.program), state.programs, job.rank, job.topology)
    place = [schedule.members(job.rank)[0] for schedule in weights.schedules]
    come = sum(
        int(schedule.arrival_bytes(arrival)[at])
        for schedule, at in zip(weights.schedules, place, strict=True)
        for arrival in schedule.origin.arrivals
    )
    return (
        f"{weights.count} in shares: a rank holds {weights.own_bytes / 2**20:.1f} of "
        f"{weights.whole_bytes / 2**20:.1f} MiB; {weights.gathers} gatherings a step, {come / 2**20:.1f} MiB come to a "
        f"rank, each starts {weights.early}: "
        f"{step.seconds * 1e3:.3f} ms a step predicted, {alone.seconds * 1e3:.3f} ms with whole weights"
    )


def _likely_attentions(state: State) -> list[str]:
    """A warning for each kind of op that looks like an attention, which no reader or rule knows: by its name, or as it
    takes three tensors of one shape [.., .., .., ..]."""
    kinds: Counter[str] = Counter()
    for node in state.gm.graph.nodes:
        op = OpView.of(node)
        if op is None or op.namespace == "aten" or node in state.placement.needs:
            continue
        shapes = Counter(operand.shape for operand in op.operands if len(operand.shape) == 4)
        named = "attn" in op.name.lower() or "attention" in op.name.lower()
        if (named and len(op.operands) >= 3) or max(shapes.values(), default=0) >= 3:
            kinds[f"{op.namespace}::{op.name}"] += 1
    return [
        f"{count} x {kind} look{'s' * (count == 1)} like attention and {'is' if count == 1 else 'are'} computed whole: "
        "say where q, k and v stand with sfcompile.extend.register_attention"
        for kind, count in kinds.items()
    ]


def _wire(state: State) -> str:
    """How chunks travel, if another wire was asked for than they have anyway."""
    asked = state.asked.wire
    if asked == AS_IT_IS:
        return ""
    counts = Counter(site.wire for site in state.local.sites if isinstance(site, AttentionSite))
    lines = [f"{words(wire)} ({n} attention{'s' * (n > 1)})" for wire, n in counts.items() if wire != AS_IT_IS]
    if len(lines) < len(counts) or not counts:
        lines.append(f"{asked} was asked for and makes nothing smaller: {counts[AS_IT_IS]} attentions as they are")
    return ", ".join([*lines, "all else as it is"])


def _count_work(state: State, report: GraphReport) -> None:
    """Ops and FLOPs of the graph that the token passes saw, and each rank's share of them."""
    owners, placement = state.layouts.owners, state.placement
    per_rank = np.zeros(state.topology.num_ranks)
    shares: dict[Layout, NDArray[np.float64]] = {}
    by_features = {node for group in placement.features for node in group.nodes}
    attended = _attended(state)
    for node, op in state.tokens.views.items():
        cost = flops(op)
        report.total_flops += cost
        if unpriced(op):
            report.unpriced.append(f"{op.namespace}.{op.name}")
        layout = None
        if node in by_features:
            report.sharded_ops += 1
            per_rank += cost / len(per_rank)
            continue
        if node in placement.needs:
            cuts = (*placement.chosen[node].outs, *placement.needs[node])
            layout = next(cut for cut in cuts if isinstance(cut, Layout))
            report.sharded_ops += 1
        else:
            report.replicated_ops += 1
        if node.name in attended:
            per_rank += attended[node.name]
            continue
        parts = parts_of(state.tokens.rules[node], op, placement.chosen[node]) if node in placement.needs else None
        if parts is not None:
            per_rank += cost * np.array(parts)
            continue
        if layout is None:
            per_rank += cost
            continue
        if layout not in shares:
            counts = [owners.count(layout.runs, rank) for rank in range(len(per_rank))]
            shares[layout] = np.array(counts) / max(layout.tokens, 1)
        per_rank += cost * shares[layout]
    report.rank_flops = tuple(per_rank.tolist())


def _attended(state: State) -> dict[str, NDArray[np.float64]]:
    """By the name of an attention that ranks compute together, what each of them computes: heads need not divide, nor
    do they go by tokens."""
    flops_of: dict[Geometry, NDArray[np.float64]] = {}
    attended: dict[str, NDArray[np.float64]] = {}
    for site, schedule in zip(state.local.sites, state.programs[state.local.program], strict=True):
        if not isinstance(site, AttentionSite) or not isinstance(schedule, AttentionSchedule):
            continue
        key = site.geometry()
        if key not in flops_of:
            ranks = range(state.topology.num_ranks)
            flops_of[key] = np.array([float(attention_flops(schedule, rank)) for rank in ranks])
        attended[site.name] = flops_of[key]
    return attended


def _list_traffic(state: State, report: GraphReport) -> None:
    """What moves between ranks beside attention, and why."""
    outputs = set(state.gm.graph.output_node().all_input_nodes)
    report.gathered = [
        _left(value, "model output" if value in outputs else _reader(value, state.placement.reasons), 0.0)
        for value in state.traffic.gathers
    ]
    report.gathered += [
        replace(
            _left(group.nodes[0], f"{len(group.nodes)} products of {group.source.name}, by features", 0.0),
            nbytes=sum(map(value_bytes, group.nodes)),
        )
        for group in state.traffic.features
    ]
    if state.group is not None and state.group.sites:
        report.gathered += [
            Left(schedule.site.name, "batch gather", "", "every rank returns all samples", 0.0, schedule.heap_bytes)
            for schedule in state.programs[state.group.program]
            if schedule.site.name != COPIES
        ]
    report.moved = [
        _moved(move, state.layouts.owners, state.layouts.chosen[move.value]) for move in state.traffic.moves
    ]


def _list_whole_ops(state: State, report: GraphReport) -> None:
    """The ops that touch tokens and are computed whole, the costliest first."""
    views, reasons = state.tokens.views, state.placement.reasons
    ops = [(node, views[node], why) for node, why in reasons.items() if node in views]
    if state.group is not None:
        ops += [(node, op, f"batch: {why}") for node, (op, why) in state.group.left.items()]
    left = [_left(node, why, flops(op), is_view(op)) for node, op, why in ops]
    report.replicated = sorted(left, key=lambda row: (-row.flops, -row.nbytes))


def _moved(move: Move, owners: Ownership, layout: Layout) -> Left:
    value, need = move.value, move.need
    kind = "halo" if isinstance(need, Window) else "another cut" if need.dim == layout.dim else "another dim"
    row = _left(value, f"{kind}, read by {', '.join(user.name for user in list(value.users)[:3])}", 0.0)
    whole = value.meta["val"].numel() * move.dtype.itemsize
    return replace(row, nbytes=round(whole * float(exchanged(owners, layout, need)[0].sum())))


def _reader(value: fx.Node, reasons: dict[fx.Node, str]) -> str:
    for user in value.users:
        if user in reasons:
            return f"read by {user.name}: {reasons[user]}"
    return "read whole by " + ", ".join(user.name for user in list(value.users)[:3])


def _left(node: fx.Node, reason: str, cost: float, is_view: bool = False) -> Left:
    size = value_bytes(node) if node.meta.get("val") is not None else 0
    source = source_line(node.stack_trace) or ""
    target = getattr(node.target, "__name__", "") if is_getitem(node) else str(node.target)
    return Left(node.name, target.removeprefix("aten."), short_source(source), reason, cost, size, is_view)
