"""Helpers of the tests: capture a function, run every rank's graph in one process without the runtime."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from threads import run_threads
from torch import fx

from sfcompile.capture.graph import Captured, capture
from sfcompile.passes.analyse_tokens import analyse_tokens
from sfcompile.passes.choose_layouts import choose_layouts
from sfcompile.passes.graph.layout import Layout
from sfcompile.passes.graph.local_graph import LocalGraph
from sfcompile.passes.place_min_cut import place_min_cut
from sfcompile.passes.report.report import GraphReport
from sfcompile.passes.rewrite_local import rewrite_local
from sfcompile.passes.runner import Compiled, run_pipeline
from sfcompile.passes.state import Asked, Placement, State, Traffic
from sfcompile.runtime.program.sites import AttentionSite, ExchangeSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import current_session


def captured(fn: Callable[..., Any], *args: torch.Tensor) -> Captured:
    """The captured graph of a function of tensors."""
    got: list[Captured] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        got.append(capture(gm, inputs))
        order = got[-1].tensor_inputs
        return lambda *full: got[-1].gm(*(full[i] for i in order))

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend, fullgraph=True)(*args)
    return got[0]


@dataclass
class Box:
    """Where rank threads leave and find one another's tensors."""

    barrier: threading.Barrier
    tensors: dict[Any, torch.Tensor]


class RankInterpreter(fx.Interpreter):
    """Runs one rank's graph; communication goes through a Box, in the plainest way that can be right."""

    def __init__(self, gm: fx.GraphModule, sites: list[Any], rank: int, ranks: int, box: Box) -> None:
        super().__init__(gm)
        self._sites = sites
        self._rank = rank
        self._ranks = ranks
        self._box = box

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Emulate the communication ops, run the rest."""
        name = str(target)
        if not name.startswith("streamfusion.") or "opaque" in name:
            return super().call_function(target, args, kwargs)
        ticket = torch.zeros(1, dtype=torch.int64)
        kind = name.split(".")[1]
        box, rank = self._box.tensors, self._rank
        if kind in ("put_q", "put_k", "put_v", "exchange_start"):
            box[kind, args[3], rank] = args[0]
            return ticket
        if kind == "attend":
            box["mask", args[3], rank] = args[1]
            return ticket
        site = args[2]
        self._box.barrier.wait(60)
        if kind == "exchange_finish":
            return self._exchanged(site), ticket
        return self._attended(site), ticket

    def _whole(
        self, kind: str, site: int, shape: Sequence[int], runs: Any, exchange: ExchangeSite | None = None
    ) -> torch.Tensor:
        parts = [self._box.tensors[kind, site, r] for r in range(self._ranks)]
        dim, outer, inner = (exchange.dim, exchange.outer, exchange.inner) if exchange else (2, 1, 1)
        tokens = shape[dim] // (outer * inner)
        full = parts[0].new_full([*shape[:dim], outer, tokens, inner, *shape[dim + 1 :]], 0)
        for part, mine in zip(parts, runs, strict=True):
            rows = [i for start, n in mine for i in range(start, start + n)]
            if rows:
                split = part.reshape(*shape[:dim], outer, len(rows), inner, *shape[dim + 1 :])
                full.index_copy_(dim + 1, torch.tensor(rows), split)
        return full.reshape(list(shape))

    def _exchanged(self, index: int) -> torch.Tensor:
        site = self._sites[index]
        whole = self._whole("exchange_start", index, site.shape, site.owned, site)
        if site.is_gather:
            return whole
        rows = [i for first, n in site.wanted[self._rank] for i in range(first, first + n)]
        return whole.index_select(site.into, torch.tensor(rows, dtype=torch.int64))

    def _attended(self, index: int) -> torch.Tensor:
        site = self._sites[index]
        assert isinstance(site, AttentionSite)
        lq = sum(n for runs in site.q_positions for _, n in runs)
        lk = sum(n for runs in site.kv_positions for _, n in runs)
        q = self._whole("put_q", index, (site.batch, site.heads, lq, site.head_dim), site.q_positions)
        k = self._whole("put_k", index, (site.batch, site.kv_heads, lk, site.head_dim), site.kv_positions)
        v = self._whole("put_v", index, (site.batch, site.kv_heads, lk, site.v_head_dim), site.kv_positions)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, self._box.tensors["mask", index, self._rank], is_causal=site.causal, scale=site.scale,
            enable_gqa=site.heads != site.kv_heads,
        )  # fmt: skip
        rows = [i for start, n in site.q_positions[self._rank] for i in range(start, start + n)]
        return out[:, :, torch.tensor(rows, dtype=torch.int64)].contiguous()


def run_lockstep(
    make: Callable[[int], tuple[fx.GraphModule, list[Any]]], ranks: int, inputs: Sequence[torch.Tensor]
) -> list[Any]:
    """Run every rank's graph on threads; ``make(rank)`` gives its graph and sites."""
    box = Box(threading.Barrier(ranks), {})
    results: list[Any] = [None] * ranks
    errors: list[BaseException] = []
    graphs = [make(rank) for rank in range(ranks)]

    def work(rank: int) -> None:
        try:
            gm, sites = graphs[rank]
            with torch.no_grad():
                results[rank] = RankInterpreter(gm, sites, rank, ranks, box).run(*inputs)
        except BaseException as error:
            errors.append(error)
            box.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)] or errors
    if real:
        raise real[0]
    return results


def placeholder_values(got: Captured) -> list[torch.Tensor]:
    """Values for the placeholders: any of the right shape will do, the same for all ranks."""
    torch.manual_seed(1)
    values = []
    for node in got.gm.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            shape = tuple(value.shape)
            values.append(torch.rand(shape) > 0.3 if value.dtype == torch.bool else torch.randn(shape) * 0.3)
    return values


def run_compiled(
    compiled: Sequence[Compiled],
    topology: Topology,
    inputs: Sequence[torch.Tensor],
    delay: Callable[[int], None] | None = None,
) -> list[Any]:
    """Every rank's outputs, on threads, through the real runtime; each program runs twice. ``delay``: of threads.py."""

    def work(rank: int) -> Any:
        for program, schedules in compiled[rank].programs.items():
            current_session().load(program, schedules)
        with torch.no_grad():
            for _ in range(2):
                out = compiled[rank].gm(*inputs)
        return out

    return run_threads(topology.num_ranks, work, topology.machine_of, delay)


def shard_of(value: torch.Tensor, layout: Layout, local: LocalGraph) -> torch.Tensor:
    """The part of a whole value that the rank of ``local`` owns."""
    positions = torch.from_numpy(local.owners.rows(layout, local.rank))
    shape = list(value.shape)
    split = [*shape[: layout.dim], layout.outer, layout.positions, layout.inner, *shape[layout.dim + 1 :]]
    taken = value.reshape(split).index_select(layout.dim + 1, positions)
    return taken.reshape(local.owners.local_shape(tuple(shape), layout, local.rank))


def rewritten(got: Captured, seeds: Sequence[tuple[int, int]], ranks: int) -> tuple[
    Placement, list[Traffic], list[LocalGraph]
]:  # fmt: skip
    """Shard a captured graph from seeds ``(input, dim)`` wherever a rule allows; traffic and graph by rank."""
    inputs = [node for node in got.gm.graph.nodes if node.op == "placeholder"]
    tokens = analyse_tokens(got.gm.graph, [(inputs[i], dim) for i, dim in seeds])
    layouts = choose_layouts(tokens, [], ranks)
    topology = Topology.grid(1, ranks)
    placement = place_min_cut(got.gm.graph, tokens, layouts, topology, shard_everything=True)
    locals_ = [LocalGraph(got.mode, layouts.owners, rank, "test") for rank in range(ranks)]
    traffic = [rewrite_local(got.gm, tokens, layouts, placement, local) for local in locals_]
    return placement, traffic, locals_


ANY: Sequence[str] = ("any op may be computed whole",)


def check_sharded(
    fn: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    *seeds: tuple[int, int],
    ranks: int = 3,
    whole: Sequence[str] = (),
    exact: bool = False,
) -> None:
    """Apply a function to shards and compare with the shards of the function, for every rank.

    Every op that touches tokens must really run on shards, except those whose names are in ``whole``, which must not
    (ANY: no op must).
    """
    got = capture(fx.symbolic_trace(fn), inputs)
    placement, _, locals_ = rewritten(got, seeds, ranks)
    names = {str(node.target).split(".")[1] for node in placement.reasons}
    assert whole is ANY or names == set(whole), f"computed whole: {placement.reasons}"
    assert placement.needs or whole, "nothing was sharded"
    graphs = [(fx.GraphModule(local.root, local.graph), local.sites) for local in locals_]
    with torch.no_grad():
        want = got.gm(*inputs)
    for rank, result in enumerate(run_lockstep(lambda r: graphs[r], ranks, inputs)):
        for mine, theirs in zip(result, want, strict=True):
            assert mine.shape == theirs.shape, f"rank {rank}"
            if exact:
                assert torch.equal(mine, theirs), f"rank {rank}"
            else:
                torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5, equal_nan=True)


def run_sharded(
    model: torch.nn.Module, inputs: Sequence[torch.Tensor], ranks: int, tolerance: float = 1e-5
) -> list[GraphReport]:
    """Run every graph of a model on emulated ranks that shard whatever they can; every rank must get what one gets.

    Args:
        tolerance: of a value's largest element.
    """
    reports: list[GraphReport] = []

    def backend(gm: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        got = capture(gm, example)
        states = [
            State(got.gm, got.mode, Topology.grid(1, ranks), rank, Asked(shard_everything=True, split_batch=False))
            for rank in range(ranks)
        ]
        compiled = [run_pipeline(state) for state in states]
        assert all(mine.order == compiled[0].order for mine in compiled)
        reports.append(compiled[0].report)
        locals_ = [(mine.gm, state.local.sites) for mine, state in zip(compiled, states, strict=True)]

        def call(*full: Any) -> Any:
            given = [full[i] for i in got.tensor_inputs]
            want = got.gm(*given)
            for rank, out in enumerate(run_lockstep(lambda r: locals_[r], ranks, given)):
                for mine, whole in zip(out, want, strict=True):
                    assert (mine.shape, mine.dtype) == (whole.shape, whole.dtype), f"rank {rank}"
                    scale = float(whole.abs().max().clamp(min=1e-6))
                    torch.testing.assert_close(mine, whole, rtol=0, atol=tolerance * scale)
            return want

        return call

    torch._dynamo.reset()
    with torch.no_grad():
        want = torch.utils._pytree.tree_leaves(model(*inputs))
        out = torch.utils._pytree.tree_leaves(torch.compile(model, backend=backend, fullgraph=True)(*inputs))
    for mine, whole in zip(out, want, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)
    return reports
