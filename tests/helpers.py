"""Helpers of the tests: capture a function, run every rank's graph in one process without the runtime."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sfcompile.capture import Captured, capture
from sfcompile.codegen.sites import AttentionSite, GatherSite
from sfcompile.passes.layout import Layout
from sfcompile.passes.local_graph import LocalGraph


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
class Exchange:
    """Where rank threads leave and find one another's tensors."""

    barrier: threading.Barrier
    box: dict[Any, torch.Tensor]


class RankInterpreter(fx.Interpreter):
    """Runs one rank's graph; communication goes through an Exchange, in the plainest way that can be right."""

    def __init__(self, gm: fx.GraphModule, sites: list[Any], rank: int, ranks: int, exchange: Exchange) -> None:
        super().__init__(gm)
        self._sites = sites
        self._rank = rank
        self._ranks = ranks
        self._exchange = exchange

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Emulate the communication ops, run the rest."""
        name = str(target)
        if not name.startswith("streamfusion."):
            return super().call_function(target, args, kwargs)
        ticket = torch.zeros(1, dtype=torch.int64)
        kind = name.split(".")[1]
        box, rank = self._exchange.box, self._rank
        if kind in ("put_q", "put_k", "put_v", "gather_start"):
            box[kind, args[3], rank] = args[0]
            return ticket
        if kind == "attend":
            box["mask", args[3], rank] = args[1]
            return ticket
        site = args[2]
        self._exchange.barrier.wait(60)
        if kind == "gather_finish":
            return self._gathered(site), ticket
        return self._attended(site), ticket

    def _whole(self, kind: str, site: int, shape: Sequence[int], layout: GatherSite | None, runs: Any) -> torch.Tensor:
        parts = [self._exchange.box[kind, site, r] for r in range(self._ranks)]
        dim, outer, inner = (layout.dim, layout.outer, layout.inner) if layout else (2, 1, 1)
        tokens = shape[dim] // (outer * inner)
        full = parts[0].new_full([*shape[:dim], outer, tokens, inner, *shape[dim + 1 :]], 0)
        for part, mine in zip(parts, runs, strict=True):
            rows = [i for start, n in mine for i in range(start, start + n)]
            if rows:
                split = part.reshape(*shape[:dim], outer, len(rows), inner, *shape[dim + 1 :])
                full.index_copy_(dim + 1, torch.tensor(rows), split)
        return full.reshape(list(shape))

    def _gathered(self, index: int) -> torch.Tensor:
        site = self._sites[index]
        return self._whole("gather_start", index, site.shape, site, site.owners)

    def _attended(self, index: int) -> torch.Tensor:
        site = self._sites[index]
        assert isinstance(site, AttentionSite)
        lq = sum(n for runs in site.q_positions for _, n in runs)
        lk = sum(n for runs in site.kv_positions for _, n in runs)
        q = self._whole("put_q", index, (site.batch, site.heads, lq, site.head_dim), None, site.q_positions)
        k = self._whole("put_k", index, (site.batch, site.kv_heads, lk, site.head_dim), None, site.kv_positions)
        v = self._whole("put_v", index, (site.batch, site.kv_heads, lk, site.v_head_dim), None, site.kv_positions)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, self._exchange.box["mask", index, self._rank], is_causal=site.causal, scale=site.scale,
            enable_gqa=site.heads != site.kv_heads,
        )  # fmt: skip
        rows = [i for start, n in site.q_positions[self._rank] for i in range(start, start + n)]
        return out[:, :, torch.tensor(rows, dtype=torch.int64)].contiguous()


def run_lockstep(
    make: Callable[[int], tuple[fx.GraphModule, list[Any]]], ranks: int, inputs: Sequence[torch.Tensor]
) -> list[Any]:
    """Run every rank's graph on threads; ``make(rank)`` gives its graph and sites."""
    exchange = Exchange(threading.Barrier(ranks), {})
    results: list[Any] = [None] * ranks
    errors: list[BaseException] = []
    graphs = [make(rank) for rank in range(ranks)]

    def work(rank: int) -> None:
        try:
            gm, sites = graphs[rank]
            with torch.no_grad():
                results[rank] = RankInterpreter(gm, sites, rank, ranks, exchange).run(*inputs)
        except BaseException as error:
            errors.append(error)
            exchange.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)] or errors
    if real:
        raise real[0]
    return results


def shard_of(value: torch.Tensor, layout: Layout, local: LocalGraph) -> torch.Tensor:
    """The part of a whole value that the rank of ``local`` owns."""
    positions = torch.from_numpy(local.owners.positions(layout.runs, local.rank))
    shape = list(value.shape)
    split = [*shape[: layout.dim], layout.outer, layout.tokens, layout.inner, *shape[layout.dim + 1 :]]
    taken = value.reshape(split).index_select(layout.dim + 1, positions)
    return taken.reshape(local.owners.local_shape(tuple(shape), layout, local.rank))
