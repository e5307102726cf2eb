"""One rank's graph while it is being written: local calls with fake values, slices, gathers, attention subgraphs."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from sfcompile.options import AS_IT_IS, Wire
from sfcompile.passes.graph.attention_site import attention_site
from sfcompile.passes.graph.layout import Layout, OpLayouts, Ownership, Shape, Window
from sfcompile.passes.graph.op_view import FakeMode, OpView
from sfcompile.runtime.program.intervals import Runs
from sfcompile.runtime.program.sites import AnySite, ExchangeSite
from sfcompile.runtime.rank import ops as runtime_ops  # registers torch.ops.streamfusion

_MAX_SLICES = 8
"""A shard of up to this many runs is written as slices and a cat; beyond, as one index_select."""

COMMUNICATION = frozenset(runtime_ops.COMMUNICATION)
"""Targets of the nodes that talk to other ranks."""


class LocalGraph:
    """Emits the graph of one rank.

    Args:
        mode: fake mode of the captured values; local values are computed in it as nodes are written.
        owners: who owns which token.
        rank: whose graph this is.
        program: key under which the runtime will find this graph's schedules.
        wire: how the chunks of its attentions travel.
    """

    def __init__(self, mode: FakeMode, owners: Ownership, rank: int, program: str, wire: Wire = AS_IT_IS) -> None:
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.owners = owners
        self.rank = rank
        self.program = program
        self.wire = wire
        self.sites: list[AnySite] = []
        self.origin: fx.Node | None = None  # the captured node being rewritten, for names and stack traces
        self.part: int | None = None  # which part of this rank's tokens is being written, if they come in several
        self._mode = mode
        self._ticket: fx.Node | None = None
        self._constants: dict[tuple[Any, ...], fx.Node] = {}

    @property
    def device(self) -> torch.device:
        """Where the graph's inputs live: all of one rank's tensors are on one device."""
        values = [node.meta["val"] for node in self.graph.nodes if node.op == "placeholder"]
        # A size dressed as a 0-dim tensor may stay on the CPU.
        devices = {value.device for value in values if isinstance(value, torch.Tensor) and value.dim()}
        return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))

    # ------------------------------------------------------------------ calls

    def call(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> fx.Node:
        """Append a call and compute its fake value."""
        node = self.graph.call_function(target, tuple(args), kwargs)
        values = fx.map_arg((tuple(args), kwargs), lambda n: n.meta["val"])
        with self._mode, torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        self._inherit(node)
        return node

    def of_part(self, part: int, parts: int) -> LocalGraph:
        """The same graph, written for one part of this rank's tokens: a rank among ``parts`` times as many."""
        if parts == 1:
            return self
        view = copy.copy(self)
        view.owners, view.rank, view.part = self.owners.split(parts), self.rank * parts + part, part
        return view

    def _inherit(self, node: fx.Node) -> None:
        if self.part is not None:
            node.meta["part"] = self.part
        if self.origin is not None:
            node.meta["origin"] = self.origin.name  # sfcompile/prediction/code.py says for each line what was decided
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                if key in self.origin.meta:
                    node.meta[key] = self.origin.meta[key]

    def copy(self, node: fx.Node, args: dict[fx.Node, fx.Node]) -> fx.Node:
        """Append a captured node unchanged (computed whole on every rank).

        A captured graph may communicate already (rewrite_batch.py): its nodes join this graph's one order.
        """
        if node.target not in COMMUNICATION:
            copied = self.graph.node_copy(node, lambda n: args[n])
            if copied.target is torch.ops.aten.view.default:  # gathered values have strides of their own
                copied.target = torch.ops.aten.reshape.default
            return copied
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        place = [argument.name for argument in schema].index("ticket")
        old = node.args[place]
        assert isinstance(old, fx.Node)
        copied = self.graph.node_copy(node, lambda n: self.ticket() if n is old else args[n])
        self._ticket = copied if isinstance(node.meta["val"], torch.Tensor) else self.getitem(copied, 1)
        return copied

    def constant(self, value: torch.Tensor) -> fx.Node:
        """A CPU tensor baked into the graph, on the graph's device; equal ones are shared."""
        key = (value.dtype, tuple(value.shape), value.numpy().tobytes())
        if key not in self._constants:
            name = next(n for n in (f"_sf_constant{i}" for i in itertools.count()) if not hasattr(self.root, n))
            self.root.register_buffer(name, value.to(self.device), persistent=False)
            node = self.graph.get_attr(name)
            node.meta["val"] = self._mode.from_tensor(getattr(self.root, name))
            self._constants[key] = node
        return self._constants[key]

    def getitem(self, source: fx.Node, index: int) -> fx.Node:
        """Pick one output of a node with several."""
        node = self.graph.call_function(operator.getitem, (source, index))
        node.meta["val"] = source.meta["val"][index]
        self._inherit(node)
        return node

    def out_shapes(self, op: OpView, chosen: OpLayouts) -> list[Shape]:
        """Shapes of this rank's outputs of an op."""
        return [
            shape if layout is None else self.owners.local_shape(shape, layout, self.rank)
            for shape, layout in zip(op.out_shapes, chosen.outs, strict=True)
        ]

    def empty(self, op: OpView, chosen: OpLayouts, like: fx.Node) -> fx.Node:
        """The output of an op of one output, of which this rank owns nothing: torch refuses some ops on nothing."""
        shape, dtype = list(self.out_shapes(op, chosen)[0]), op.node.meta["val"].dtype
        return self.call(torch.ops.aten.new_zeros.default, [like, shape], {"dtype": dtype})

    # ------------------------------------------------------------------ shards

    def take(self, node: fx.Node, dim: int, positions: NDArray[np.int64]) -> fx.Node:
        """``node`` at ascending ``positions`` of ``dim``."""
        size = int(node.meta["val"].shape[dim])
        count = len(positions)
        if count == size:
            return node
        if count == 0:
            return self._slice(node, dim, 0, 0)
        breaks = np.flatnonzero(np.diff(positions) != 1) + 1
        steps = np.unique(np.diff(positions)) if count > 1 else np.array([1])
        if len(breaks) and len(steps) == 1:
            first, last, step = int(positions[0]), int(positions[-1]), int(steps[0])
            return self.call(torch.ops.aten.slice.Tensor, [node, dim, first, last + 1, step], {})
        if len(breaks) >= _MAX_SLICES:
            index = self.constant(torch.from_numpy(positions))
            return self.call(torch.ops.aten.index_select.default, [node, dim, index], {})
        runs = np.split(positions, breaks)
        slices = [self._slice(node, dim, int(run[0]), int(run[-1]) + 1) for run in runs]
        return slices[0] if len(slices) == 1 else self.call(torch.ops.aten.cat.default, [slices, dim], {})

    def narrow(self, node: fx.Node, dim: int, start: int, length: int) -> fx.Node:
        """``length`` positions of ``dim`` from ``start`` on."""
        whole = start == 0 and int(node.meta["val"].shape[dim]) == length
        return node if whole else self._slice(node, dim, start, start + length)

    def _slice(self, node: fx.Node, dim: int, start: int, stop: int) -> fx.Node:
        return self.call(torch.ops.aten.slice.Tensor, [node, dim, start, stop], {})

    def shard(self, node: fx.Node, layout: Layout) -> fx.Node:
        """This rank's shard of a whole value: the positions it owns, cut out locally."""
        positions = self.owners.rows(layout, self.rank)
        if layout.outer == layout.inner == 1:
            return self.take(node, layout.dim, positions)
        shape = [int(size) for size in node.meta["val"].shape]
        split = [*shape[: layout.dim], layout.outer, layout.positions, layout.inner, *shape[layout.dim + 1 :]]
        parts = self.call(torch.ops.aten.reshape.default, [node, split], {})
        taken = self.take(parts, layout.dim + 1, positions)
        local = list(self.owners.local_shape(tuple(shape), layout, self.rank))
        return self.call(torch.ops.aten.reshape.default, [taken, local], {})

    # ------------------------------------------------------------------ communication

    def ticket(self) -> fx.Node:
        """The value that threads one total order through all communication (see runtime/rank/ops.py)."""
        if self._ticket is None:
            self._ticket = self.call(torch.ops.aten.zeros.default, [[1]], {"dtype": torch.int64, "device": self.device})
        return self._ticket

    def _communicate(self, target: Any, args: Sequence[Any]) -> fx.Node:
        node = self.call(target, args, {})
        self._ticket = node if isinstance(node.meta["val"], torch.Tensor) else self.getitem(node, 1)
        return node

    def gather(self, node: fx.Node, layout: Layout, shape: Shape) -> fx.Node:
        """The whole value from every rank's shard."""
        dtype = node.meta["val"].dtype
        site = len(self.sites)
        runs = tuple(self.owners.row_runs(layout, r) for r in range(self.owners.num_ranks))
        name = f"{self.origin.name if self.origin else 'value'}"
        self.sites.append(ExchangeSite.gather(name, shape, dtype, layout.dim, runs, layout.outer, layout.inner))
        return self._exchange(node, site, shape, dtype)

    def gather_parts(self, parts: Sequence[fx.Node], layout: Layout, shape: Shape, owners: Ownership) -> fx.Node:
        """The whole value from every rank's parts, each gathered by itself, so that the first leave early.

        Args:
            owners: of the parts (Ownership.split).
        """
        count, ranks = len(parts), self.owners.num_ranks
        dtype, gathers = parts[0].meta["val"].dtype, []
        name = f"{self.origin.name if self.origin else 'value'}"
        stretches: list[tuple[int, fx.Node, int, int]] = []  # position, where it was gathered, place there, length
        for part, shard in enumerate(parts):
            compact, at = [], 0
            runs = [owners.row_runs(layout, rank * count + part) for rank in range(ranks)]
            for mine in runs:
                compact.append(((at, sum(n for _, n in mine)),) if mine else ())
                at += sum(n for _, n in mine)
            size = (*shape[: layout.dim], at * layout.inner, *shape[layout.dim + 1 :])
            site_name, owned = f"{name}.{part}", tuple(compact)
            self.sites.append(ExchangeSite.gather(site_name, size, dtype, layout.dim, owned, inner=layout.inner))
            site = len(self.sites) - 1
            ops = torch.ops.streamfusion
            start = self._communicate(ops.exchange_start.default, [shard, self.ticket(), self.program, site])
            start.meta["part"] = part
            gathers.append((site, size, runs))
        for site, size, runs in gathers:
            ops = torch.ops.streamfusion
            args = [self.ticket(), self.program, site, list(size), dtype]
            gathered = self.getitem(self._communicate(ops.exchange_finish.default, args), 0)
            at = 0
            for mine in runs:
                for first, n in mine:
                    stretches.append((first, gathered, at * layout.inner, n * layout.inner))
                    at += n
        return self._in_order(stretches, layout.dim)

    def join_parts(self, parts: Sequence[fx.Node], layout: Layout, owners: Ownership) -> fx.Node:
        """This rank's shard in one, from its parts.

        Args:
            owners: of the parts (Ownership.split).
        """
        stretches: list[tuple[int, fx.Node, int, int]] = []
        for part, shard in enumerate(parts):
            at = 0
            for first, n in owners.row_runs(layout, self.rank * len(parts) + part):
                stretches.append((first, shard, at * layout.inner, n * layout.inner))
                at += n
        return self._in_order(stretches, layout.dim) if stretches else parts[0]

    def _in_order(self, stretches: list[tuple[int, fx.Node, int, int]], dim: int) -> fx.Node:
        """Stretches of rows put together: each with its position, where it is, its place there and its length."""
        stretches.sort(key=lambda entry: entry[0])
        slices = [self._slice(source, dim, place, place + n) for _, source, place, n in stretches]
        return self.call(torch.ops.aten.cat.default, [slices, dim], {})

    def window(self, node: fx.Node, window: Window) -> fx.Node:
        """This rank's window of a whole value, cut out locally."""
        wanted = window.wanted[self.rank]
        positions = np.concatenate([np.arange(first, first + n) for first, n in wanted] or [np.zeros(0, np.int64)])
        return self.take(node, window.dim, positions)

    def exchange(self, node: fx.Node, layout: Layout, need: Layout | Window, shape: Shape) -> fx.Node:
        """Another shard of the value than the one that was made, from those who own it."""
        ranks = range(self.owners.num_ranks)
        owned = tuple(self.owners.dim_runs(layout, rank) for rank in ranks)
        if isinstance(need, Window):
            wanted = need.wanted
        else:
            wanted = tuple(self.owners.dim_runs(need, rank) for rank in ranks)
        return self.trade(node, shape, layout.dim, owned, need.dim, wanted)

    def trade(
        self, node: fx.Node, shape: Shape, dim: int, owned: tuple[Runs, ...], into: int, wanted: tuple[Runs, ...]
    ) -> fx.Node:
        """What this rank wants along ``into`` of a value of ``shape``, of which ranks own positions of ``dim``."""
        dtype = node.meta["val"].dtype
        name = f"{self.origin.name if self.origin else 'value'}"
        site = ExchangeSite(name, shape, dtype, dim, 1, 1, owned, into, wanted)
        self.sites.append(site)
        return self._exchange(node, len(self.sites) - 1, site.wanted_shape(self.rank), dtype)

    def of_all(self, node: fx.Node, places: Sequence[int] = ()) -> fx.Node:
        """Every rank's value of one shape, stacked: [ranks, *shape], in the order of their places (none: of ranks)."""
        value = node.meta["val"]
        ranks = self.owners.num_ranks
        site = len(self.sites)
        name = f"{self.origin.name if self.origin else 'value'}"
        runs = tuple(((place, 1),) for place in places or range(ranks))
        shape = (ranks, *(int(size) for size in value.shape))
        self.sites.append(ExchangeSite.gather(name, shape, value.dtype, 0, runs))
        return self._exchange(self.call(torch.ops.aten.unsqueeze.default, [node, 0], {}), site, shape, value.dtype)

    def meet(self, name: str, count: int) -> None:
        """An exchange of nothing with ``count`` ranks of other groups, where the graph begins.

        Chunks carry the mark of the call that they belong to, so ranks that were given other inputs, or are in another
        call, get an error. What comes is not read: what this group's graph communicates later keeps it by its ticket.
        """
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            kwargs = {"dtype": torch.float32, "device": self.device}
            value = self.call(torch.ops.aten.zeros.default, [[1, 1]], kwargs)
            ticket = self.call(torch.ops.aten.zeros.default, [[1]], {"dtype": torch.int64, "device": self.device})
            site = len(self.sites)
            runs = tuple(((other, 1),) for other in range(count))
            self.sites.append(ExchangeSite.gather(name, (count, 1), torch.float32, 0, runs))
            ops = torch.ops.streamfusion
            start = self.call(ops.exchange_start.default, [value, ticket, self.program, site], {})
            args = [start, self.program, site, [count, 1], torch.float32]
            self.call(ops.exchange_finish.default, args, {})

    def all_reduce(self, node: fx.Node, dtype: torch.dtype | None = None) -> fx.Node:
        """The sum over ranks of a partial value, added in rank order, in fp32 or wider: the same bits everywhere.

        Args:
            dtype: of the sum; None: that of the partial value.
        """
        value = node.meta["val"]
        parts = self.of_all(node)
        narrow = value.dtype in (torch.float16, torch.bfloat16)
        wide = {"dtype": torch.float32 if narrow else value.dtype}  # a sum of int32 would be int64
        total = self.call(torch.ops.aten.sum.dim_IntList, [parts, [0]], wide)
        dtype = dtype or value.dtype
        same = total.meta["val"].dtype == dtype
        return total if same else self.call(torch.ops.aten._to_copy.default, [total], {"dtype": dtype})

    def _exchange(self, node: fx.Node, site: int, shape: Shape, dtype: torch.dtype) -> fx.Node:
        ops = torch.ops.streamfusion
        self._communicate(ops.exchange_start.default, [node, self.ticket(), self.program, site])
        finish = self._communicate(ops.exchange_finish.default, [self.ticket(), self.program, site, list(shape), dtype])
        return self.getitem(finish, 0)

    def attention(self, op: OpView, chosen: OpLayouts, operands: Sequence[fx.Node]) -> fx.Node:
        """Torus attention of sharded q, k, v [B, H, L, D] as visible put / attend / collect nodes."""
        out = chosen.outs[0]
        assert out is not None
        dtype = operands[0].meta["val"].dtype
        mask = operands[3] if len(operands) > 3 else None
        site = len(self.sites)
        attention = attention_site(op, chosen, dtype, wire=self.wire)
        assert attention is not None
        self.sites.append(attention)
        ops = torch.ops.streamfusion
        for put, operand in zip((ops.put_q, ops.put_k, ops.put_v), operands[:3], strict=True):
            self._communicate(put.default, [operand, self.ticket(), self.program, site])
        self._communicate(ops.attend.default, [self.ticket(), mask, self.program, site])
        size = list(self.owners.local_shape(op.out_shapes[0], out, self.rank))
        collect = self._communicate(ops.collect.default, [self.ticket(), self.program, site, size, dtype])
        return self.getitem(collect, 0)

    def attention_in_parts(
        self, op: OpView, chosen: OpLayouts, operands: Sequence[Sequence[fx.Node]], views: Sequence[LocalGraph]
    ) -> list[fx.Node]:
        """The same, q, k and v coming and the output going part by part.

        Args:
            chosen: with the owners of parts (Ownership.split); ``operands`` and ``views`` are by part.
        """
        out = chosen.outs[0]
        assert out is not None
        parts = len(views)
        dtype = operands[0][0].meta["val"].dtype
        mask = operands[0][3] if len(operands[0]) > 3 else None
        attention = attention_site(op, chosen, dtype, parts, self.wire)
        assert attention is not None  # the plan was made for this site (choose_schedules.py)
        site = len(self.sites)
        self.sites.append(attention)
        ops = torch.ops.streamfusion
        for part, mine in enumerate(operands):
            for put, operand in zip((ops.put_q, ops.put_k, ops.put_v), mine[:3], strict=True):
                node = self._communicate(put.default, [operand, self.ticket(), self.program, site, part])
                node.meta["part"] = part
        self._communicate(ops.attend.default, [self.ticket(), mask, self.program, site])
        outputs = []
        for part, view in enumerate(views):
            size = list(view.owners.local_shape(op.out_shapes[0], out, view.rank))
            args = [self.ticket(), self.program, site, size, dtype, part]
            collect = self._communicate(ops.collect.default, args)
            outputs.append(self.getitem(collect, 0))
            for node in (collect, *collect.users):
                node.meta["part"] = part
        return outputs
