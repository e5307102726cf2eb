"""Write one rank's graph by re-interpreting the captured one on local fake values.

Constants are not patched in place: every sharded op is written anew by its rule, from this rank's operands, so view
sizes, expands and slice bounds are this rank's own and uneven shards are exact. Values are kept whole, as shards, or
both; a whole value is made from shards by an all-gather, a shard from a whole value by slicing or from other shards by
an exchange (halos, other cuts, another dim), each at most once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sfcompile.errors import InternalError
from sfcompile.passes.graph.cost import exchange_seconds
from sfcompile.passes.graph.features import compute_by_features
from sfcompile.passes.graph.halo import Halo, beside
from sfcompile.passes.graph.layout import Key, Layout, OpLayouts, Owners, Window
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.graph.op_view import OpView, is_getitem, is_tensor, shape_of
from sfcompile.passes.rules.attention import Attention
from sfcompile.passes.rules.linked import Linked
from sfcompile.passes.rules.norm import GroupNorm, computed_in
from sfcompile.passes.rules.rule import statistics_bytes
from sfcompile.passes.state import Features, Layouts, Move, Placement, State, Tokens, Traffic
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.value_rows import ValueRows
from sfcompile.torch_private import OpOverload

Key4 = tuple[fx.Node, tuple[Key, Owners] | Window, int]


class CannotSplit(Exception):
    """Something in this graph cannot be computed part by part; the message says what."""


def run(state: State) -> None:
    """The pass: fills ``local`` and ``traffic``.

    Tokens are written in parts if the plan says so. Whether every op allows that is only seen here: if one does not,
    the graph is written anew with tokens whole, and ``choices`` become those that were planned for that.
    """
    try:
        _write(state)
    except CannotSplit as why:
        whole = state.choices.whole
        assert whole is not None, "one part can always be written"
        state.choices = replace(whole, notes=(*state.choices.notes, f"tokens stay whole: {why}"))
        _write(state)


def _write(state: State) -> None:
    local = LocalGraph(state.mode, state.layouts.owners, state.rank, state.program, state.asked.wire)
    parts, crossing = state.choices.parts, state.asked.crossing
    state.traffic = rewrite_local(
        state.gm, state.tokens, state.layouts, state.placement, local, parts, crossing, state.topology
    )
    state.local = local


class _Rewriter:
    def __init__(
        self,
        tokens: Tokens,
        layouts: Layouts,
        placement: Placement,
        local: LocalGraph,
        parts: int = 1,
        crossing: Sequence[int] = (),
        topology: Topology | None = None,
    ) -> None:
        self._topology = topology
        self._tokens = tokens
        self._layouts = layouts
        self._owners = layouts.owners if parts == 1 else layouts.owners.split(parts)
        self._placement = placement
        self.traffic = Traffic()
        self._crossing = crossing
        self._local = local
        self._views = [local.of_part(part, parts) for part in range(parts)]
        self._whole: dict[fx.Node, fx.Node] = {}
        # Shards by part, under the value's own layout; tuples of sharded ops too.
        self._shards: dict[fx.Node, list[fx.Node]] = {}
        self._cuts: dict[Key4, fx.Node] = {}
        # Behind a norm over tokens: the rows of others that came with its statistics, computed on as the shard is.
        self._rows: dict[fx.Node, tuple[Halo, fx.Node | None]] = {}

    def whole(self, value: fx.Node) -> fx.Node:
        """The value on every rank in full, gathering it if only shards exist."""
        if value not in self._whole:
            layout = self._layouts.chosen[value]
            self.traffic.gathers.append(value)
            shards = self._shards[value]
            if len(shards) == 1:
                self._whole[value] = self._local.gather(shards[0], layout, shape_of(value))
            elif layout.outer == 1:
                self._whole[value] = self._local.gather_parts(shards, layout, shape_of(value), self._owners)
            else:
                raise CannotSplit(f"{value.name} is gathered along a dim that holds more than tokens")
        return self._whole[value]

    def shard(self, value: fx.Node, need: Layout | Window, part: int) -> fx.Node:
        """The value as an op needs it: as it was made, cut from the whole, or moved between ranks."""
        owners, own = self._owners, self._layouts.chosen.get(value)
        if value in self._shards and (len(self._views) == 1 or isinstance(need, Layout)) and owners.holds(own, need):
            return self._shards[value][part]
        key = (value, need if isinstance(need, Window) else (need.key, owners.owners(need.runs)), part)
        if isinstance(need, Window) and value in self._rows and key not in self._cuts:
            halo, rows = self._rows[value]
            if (halo.dim, halo.wanted) == (need.dim, need.wanted):
                self._cuts[key] = beside(self._local, self._shards[value][0], rows, halo)
        if key not in self._cuts:
            if (value in self._shards and value not in self._whole) or isinstance(need, Window):
                if len(self._views) > 1:
                    raise CannotSplit(f"{value.name} changes hands, or neighbours' rows of it are needed")
            if value in self._shards and value not in self._whole:
                assert own is not None
                self.traffic.moves.append(Move(value, need, value.meta["val"].dtype))
                self._cuts[key] = self._local.exchange(self._shards[value][0], own, need, shape_of(value))
            elif isinstance(need, Window):
                self._cuts[key] = self._local.window(self.whole(value), need)
            else:
                self._cuts[key] = self._views[part].shard(self.whole(value), need)
        return self._cuts[key]

    def run(self, graph: fx.Graph) -> None:
        """Rewrite every node in order."""
        for node in self._placement.needs if len(self._views) > 1 else ():
            if any(layout and not self._owners.fits(layout) for layout in self._placement.chosen[node].outs):
                raise CannotSplit(f"{node.name} holds rows of a grid that do not divide")
        by_source: dict[fx.Node, list[Features]] = {}
        for group in self._placement.features:
            by_source.setdefault(group.source, []).append(group)
        due: list[Features] = []  # as early as can be, behind the inputs, among which the weights are
        for node in graph.nodes:
            if node.op != "placeholder":
                self._by_features(due)
                due = []
            due += by_source.get(node, [])
            self._local.origin = node
            for view in self._views:
                view.origin = node
            if node in self._whole:
                continue  # computed by features
            if node.op == "output":
                self._local.graph.output(self._results(node.args[0]))
            elif node in self._placement.needs:
                self._sharded(node)
            elif is_getitem(node) and node.args[0] in self._shards:
                outputs = [
                    # A rule may give the first result alone, where no other is used (per_head.py).
                    several if is_tensor(several) else view.getitem(several, node.args[1])
                    for view, several in zip(self._views, self._shards[node.args[0]], strict=True)
                ]
                if 0 in shape_of(node):  # nothing to gather: empty on every rank, in the shape of the whole
                    shape = list(shape_of(node))
                    self._whole[node] = self._local.call(torch.ops.aten.new_empty.default, [outputs[0], shape], {})
                else:
                    self._shards[node] = outputs
                    self._check(node)
            else:
                self._copy(node)

    def _by_features(self, groups: Sequence[Features]) -> None:
        """Products of one input, each rank some features of each, put together."""
        for group in groups:
            ops = [self._tokens.views[node] for node in group.nodes]
            weights = [[self.whole(operand.node) for operand in op.operands[1:]] for op in ops]
            outs = compute_by_features(self._local, ops, self.whole(group.source), weights, group.places)
            self._whole.update(zip(group.nodes, outs, strict=True))
            self.traffic.features.append(group)

    def _results(self, results: Any) -> Any:
        """What the graph returns: whole values, but for those that may leave in shards."""
        if not self._crossing:
            return fx.map_arg(results, self.whole)
        shards = {i: self._leave(i, results[i]) for i in self._crossing}
        whole = [shards.get(i) or fx.map_arg(result, self.whole) for i, result in enumerate(results)]
        return tuple(whole)

    def _leave(self, place: int, value: Any) -> fx.Node | None:
        """An output in shards, if it is made so and nobody needs it whole."""
        layout = self._layouts.chosen.get(value)
        if value not in self._shards or value in self._whole or layout is None:
            return None
        if len(self._views) > 1 and layout.outer > 1:
            return None
        shape, ranks = shape_of(value), range(self._layouts.owners.num_ranks)
        owned = tuple(self._layouts.owners.dim_runs(layout, rank) for rank in ranks)
        self.traffic.crossing[place] = ValueRows(shape, layout.dim, owned)
        shards = self._shards[value]
        return shards[0] if len(shards) == 1 else self._local.join_parts(shards, layout, self._owners)

    def _sharded(self, node: fx.Node) -> None:
        op, chosen = self._tokens.views[node], self._placement.chosen[node]
        operands = [
            [
                self.shard(operand.node, need, part) if need is not None else self.whole(operand.node)
                for operand, need in zip(op.operands, self._placement.needs[node], strict=True)
            ]
            for part in range(len(self._views))
        ]
        # Rules read the layouts that operands really have, which are those they asked for.
        ins = [need if isinstance(need, Layout) else None for need in self._placement.needs[node]]
        asked = OpLayouts(ins, chosen.outs, self._owners)
        rule = self._tokens.rules[node]
        combine = getattr(rule, "combine", None)
        if len(self._views) > 1 and combine is not None and not any(chosen.outs):
            self._copy(node)  # of what is gathered part by part: all parts may go on
            return
        if len(self._views) > 1 and statistics_bytes(rule, op, asked):
            raise CannotSplit(f"{node.name} meets other ranks inside")
        window = self._window_behind(node, op, asked)
        if len(self._views) > 1 and isinstance(rule, Attention) and rule.torus(op, asked):
            shards = self._local.attention_in_parts(op, asked, operands, self._views)
        elif window is not None and isinstance(rule, GroupNorm):
            shards = [self._norm_with_rows(rule, op, asked, operands[0], window)]
        else:
            shards = [rule.emit(op, asked, mine, view) for mine, view in zip(operands, self._views, strict=True)]
        if not any(chosen.outs):
            if len(self._views) > 1:
                raise CannotSplit(f"{node.name} is a sum over all tokens")
            if combine is None:
                self._whole[node] = self._local.all_reduce(shards[0], node.meta["val"].dtype)
            else:
                self._whole[node] = combine(op, asked, shards[0], self._local)
            return
        # Of this op's own, also where a rank has nothing to do (its rows lie in the slice, away from the padding):
        # what is put or read goes by where nodes stand (order_puts.py), which must be the same on every rank.
        alias = torch.ops.aten.alias.default
        shards = [
            view.call(alias, [shard], {}) if shard in mine else shard
            for shard, mine, view in zip(shards, operands, self._views, strict=True)
        ]
        self._shards[node] = shards
        if is_tensor(node):
            self._check(node)
        source = op.operands[0].node if op.operands else node
        if source in self._rows and source is not node and self._row_by_row(node, source):
            halo, rows = self._rows[source]
            self._rows[node] = halo, None if rows is None else rule.emit(op, asked, [rows], self._local)

    def _norm_with_rows(
        self, rule: GroupNorm, op: OpView, asked: OpLayouts, operands: list[fx.Node], window: Window
    ) -> fx.Node:
        """A norm over tokens whose exchange of statistics carries the rows for a window of what is made of it."""
        out, ranks = asked.outs[0], range(self._owners.num_ranks)
        assert out is not None
        halo = Halo(out.dim, tuple(self._owners.dim_runs(out, rank) for rank in ranks), window.wanted)
        own, rows = rule.emit_with_rows(op, asked, operands, self._local, halo)
        self._rows[op.node] = halo, rows
        x = op.operands[0].node
        self.traffic.moves.append(Move(x, window, computed_in(x.meta["val"].dtype)))
        return own

    def _window_behind(self, norm: fx.Node, op: OpView, asked: OpLayouts) -> Window | None:
        """The first window, in the order of readers, of a norm over tokens or of what is made of it row by row.

        It is read off the captured graph and the placement, which are the same on all ranks: so are the exchanges.
        """
        rule, own = self._tokens.rules[norm], asked.outs[0]
        if len(self._views) > 1 or own is None or not isinstance(rule, GroupNorm) or not rule.statistics(op, asked):
            return None
        values = [norm]
        for value in values:
            for user in value.users:
                needs = self._placement.needs.get(user, ())
                for operand, need in zip(self._tokens.views[user].operands if needs else (), needs, strict=True):
                    if operand.node is not value or not isinstance(need, Window) or need.dim != own.dim:
                        continue  # a window of another dim is no halo: an exchange switches dims
                    if not self._owners.holds(own, need):
                        return need if self._pays(op.operands[0].node, own, need) else None
                if self._row_by_row(user, value):
                    values.append(user)
        return None

    def _row_by_row(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether each row of a sharded op's output is made of that row of ``value``, whichever row it is."""
        own, rule = self._layouts.chosen.get(value), self._tokens.rules.get(node)
        if node not in self._placement.needs or type(rule) is not Linked or rule.fix is not None or own is None:
            return False
        op, out = self._tokens.views[node], self._placement.chosen[node].outs
        (need,) = self._placement.needs[node] if len(op.operands) == 1 else (None,)
        if len(out) != 1 or out[0] is None or not isinstance(need, Layout) or op.out_shapes != [op.operands[0].shape]:
            return False
        return own.dim == out[0].dim and self._owners.same(own, need) and self._owners.same(own, out[0])

    def _pays(self, value: fx.Node, own: Layout, window: Window) -> bool:
        """Whether rows go with statistics: statistics are fp32, and so are the rows then, which may be twice as much.

        Against that stand a message to either neighbour, a wait for it, and a latency.
        """
        top = self._topology
        if top is None or value.meta["val"].dtype.itemsize >= torch.float32.itemsize:
            return True
        latency_s = top.local_latency_s if top.num_machines == 1 else top.network_latency_s
        more_s = exchange_seconds(value, self._owners, own, window, top) - latency_s
        return more_s <= latency_s + 2 * (top.message_s + top.wait_s)

    def _check(self, node: fx.Node) -> None:
        layout = self._layouts.chosen.get(node)
        if layout is None:
            if node.users:
                raise InternalError(
                    f"output {node.name} of a sharded op carries no tokens",
                    "its rule gave it no layout although it is computed as a shard",
                    "report this graph",
                    node=node,
                )
            return
        for view, value in zip(self._views, self._shards[node], strict=True):
            shape = tuple(int(size) for size in value.meta["val"].shape)
            want = self._owners.local_shape(shape_of(node), layout, view.rank)
            if shape != want:
                raise InternalError(
                    f"the local form of {node.name} has shape {list(shape)}, its shard has {list(want)}",
                    f"the rule for {node.target} is wrong for the global shape {list(shape_of(node))}",
                    "report this graph",
                    node=node,
                    rank=self._local.rank,
                )

    def _copy(self, node: fx.Node) -> None:
        values: dict[fx.Node, fx.Node] = {}
        for value in node.all_input_nodes:
            values[value] = self._whole[value] if value in self._whole else self.whole(value)
        self._whole[node] = self._local.copy(node, values)


def rewrite_local(
    gm: fx.GraphModule,
    tokens: Tokens,
    layouts: Layouts,
    placement: Placement,
    local: LocalGraph,
    parts: int = 1,
    crossing: Sequence[int] = (),
    topology: Topology | None = None,
) -> Traffic:
    """Fill ``local`` with this rank's graph. Returns the values that had to be gathered or exchanged.

    Args:
        parts: every op on tokens is written so many times, each for a part of this rank's tokens: order_puts.py then
            lets one part travel while another is computed.
        crossing: outputs that may leave in shards.
        topology: what messages cost; None: they cost more than bytes.

    Raises:
        CannotSplit: with several parts, where an op needs more than its own part.
    """
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            setattr(local.root, str(node.target), getattr(gm, str(node.target)))
    rewriter = _Rewriter(tokens, layouts, placement, local, parts, crossing, topology)
    rewriter.run(gm.graph)
    local.origin = None
    _drop_dead(local.graph)
    return rewriter.traffic


def _drop_dead(graph: fx.Graph) -> None:
    """Remove pure nodes that nothing reads (views of operands that a rule did not use, say)."""
    for node in reversed(graph.nodes):
        pure: Any = node.op == "get_attr" or (
            node.op == "call_function"
            and (is_getitem(node) or isinstance(node.target, OpOverload))
            and not node.is_impure()
        )
        if pure and not node.users:
            graph.erase_node(node)
