"""Count what the passes decided and put it into a report."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from sfcompile.errors import source_line
from sfcompile.passes.graph.cost import flops, is_view, nbytes, reshard_fraction
from sfcompile.passes.graph.layout import Layout, Ownership, Window
from sfcompile.passes.graph.op_view import is_getitem
from sfcompile.passes.graph.stages import stages_of
from sfcompile.passes.report.report import GraphReport, Left, short_source
from sfcompile.passes.state import State
from sfcompile.runtime.program.sites import AttentionSite


def report_graph(state: State, timings: dict[str, float]) -> GraphReport:
    """The report of a finished pipeline run."""
    assert state.layouts is not None and state.placement is not None
    assert state.choices is not None and state.local is not None
    owners, placement, layouts = state.layouts.owners, state.placement, state.layouts.chosen
    ranks = range(state.topology.num_ranks)
    main = state.choices.main
    report = GraphReport(
        state.topology.num_ranks,
        state.topology.num_machines,
        *(main.best.degrees if main is not None else (1, state.topology.num_ranks)),
        state.layouts.axes,
        pass_seconds=dict(timings),
        programs={state.local.program: [site.name for site in state.local.sites]},
        topology=state.topology,
        other_s=state.choices.other_s,
        stages=stages_of(state.local.graph, state.topology),
        fused_puts=state.fused_puts,
    )
    per_rank = [0.0 for _ in ranks]
    for node, op in state.tokens.views.items():
        cost = flops(op)
        report.total_flops += cost
        if node in placement.needs:
            report.sharded_ops += 1
            layout = next(
                cut for cut in (*placement.chosen[node].outs, *placement.needs[node]) if isinstance(cut, Layout)
            )
            for rank in ranks:
                per_rank[rank] += cost * _share(owners, layout, rank)
        else:
            report.replicated_ops += 1
            for rank in ranks:
                per_rank[rank] += cost
    if state.part is not None:  # what was counted is one group's part
        report.programs[state.part.program] = [schedule.site.name for schedule in state.part.schedules]
        parts = len(state.groups)
        report.batch = parts
        report.num_ranks *= parts
        report.num_machines = state.part.num_machines
        report.total_flops *= parts / state.part.share
        per_rank = per_rank * parts
    report.plans = list(state.choices.notes)
    report.rank_flops = tuple(per_rank)
    schedules = [*state.schedules, *(state.part.schedules if state.part is not None else [])]
    report.schedules = len(set(map(id, schedules)))
    names = {site.name for site in state.local.sites if isinstance(site, AttentionSite)}
    report.plans += [
        f"{count} attention{'s' * (count > 1)} like this\n{state.choices.plans[key]}"
        for key, count in state.choices.counts.items()
    ]
    if main is not None and main.price.seconds is not None:
        report.schedule = str(main.best) if state.part is None else f"batch {len(state.groups)} x {main.best}"
        report.predicted_s = main.price.seconds
        report.exposed_s, report.limit_s = main.price.exposed_s, main.price.limit_s
    report.sharded_sites = sum(site.node.name in names for site in state.sites)
    report.local_sites = len(state.sites) - report.sharded_sites
    report.heap_bytes = 2 * max((schedule.heap_bytes for schedule in schedules), default=0)
    outputs = set(state.gm.graph.output_node().all_input_nodes)
    report.gathered = [
        _left(value, "model output" if value in outputs else _reader(value, placement.reasons), 0.0)
        for value in placement.gathers
    ]
    report.moved = [_moved(value, need, owners, layouts[value]) for value, need in placement.moves]
    report.gathered += [
        Left(schedule.site.name, "batch gather", "", "every rank returns all samples", 0.0, schedule.heap_bytes)
        for schedule in (state.part.schedules if state.part is not None else [])
    ]
    left = [
        _left(node, reason, flops(state.tokens.views[node]), is_view(state.tokens.views[node]))
        for node, reason in placement.reasons.items()
        if node in state.tokens.views
    ]
    if state.part is not None:
        left += [_left(node, f"batch: {why}", flops(op), is_view(op)) for node, (op, why) in state.part.left.items()]
    report.replicated = sorted(left, key=lambda row: (-row.flops, -row.nbytes))
    if not state.sites and not placement.needs:
        report.warnings.append("no attention found: nothing was sharded, every rank computes the whole graph")
    elif not placement.needs and state.part is None:
        report.warnings.append("nothing was sharded: on this topology every rank computing the whole graph is cheaper")
    return report


def _moved(value: fx.Node, need: Layout | Window, owners: Ownership, made: Layout) -> Left:
    kind = "halo" if isinstance(need, Window) else "another cut" if need.dim == made.dim else "another dim"
    row = _left(value, f"{kind}, read by {', '.join(user.name for user in list(value.users)[:3])}", 0.0)
    return replace(row, nbytes=int(nbytes(value) * reshard_fraction(owners, made, need) * (owners.num_ranks - 1)))


def _share(owners: Ownership, layout: Layout, rank: int) -> float:
    return owners.count(layout.runs, rank) / max(layout.tokens, 1)


def _reader(value: fx.Node, reasons: dict[fx.Node, str]) -> str:
    for user in value.users:
        if user in reasons:
            return f"read by {user.name}: {reasons[user]}"
    return "read whole by " + ", ".join(user.name for user in list(value.users)[:3])


def _left(node: fx.Node, reason: str, cost: float, is_view: bool = False) -> Left:
    size = nbytes(node) if node.meta.get("val") is not None else 0
    source = source_line(node.stack_trace) or ""
    target = getattr(node.target, "__name__", "") if is_getitem(node) else str(node.target)
    return Left(node.name, target.removeprefix("aten."), short_source(source), reason, cost, size, is_view)
