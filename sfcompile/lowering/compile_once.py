"""Ranks whose graphs are equal share one compile: the first of them on a machine compiles, the others find it.

Inductor keeps what it makes on disk under a key of all that it depends on. That key decides alone what is taken from
there: where ranks are wrong about their graphs being equal, one of them compiles for itself, and nothing else happens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sfcompile.lowering.inner import run_inner, runs_eagerly
from sfcompile.lowering.own_rows import OwnRows, can_take_out, differing, slices_of, take_out, with_rows
from sfcompile.options import Options
from sfcompile.torch_private import FakeTensorMode, inductor_keeps

Exchange = Callable[[Any, str], list[Any]]
"""Collective: every rank's value, by rank; and what the ranks do, in words."""


def compile_once(
    gm: fx.GraphModule,
    mode: FakeTensorMode,
    asked: Options,
    rank: int,
    machine_of: Sequence[int],
    exchange: Exchange,
    tell: Callable[[str], None] = lambda _: None,
) -> Callable[..., Any]:
    """What runs a rank's graph, compiled once on each machine for all ranks whose graphs are equal. Collective.

    Ranks with graphs of their own compile side by side, as the first ones of each kind do.

    Args:
        tell: is told of repeated blocks that are compiled once, in words.
    """
    inputs = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    text, bounds = slices_of(gm)
    kept = not runs_eagerly(inputs, asked) and inductor_keeps() and bool(inputs)
    mark = hashlib.sha256(text.encode()).hexdigest() if kept else f"rank {rank}"
    everyone = exchange([mark, bounds], "compare their graphs before they are compiled")
    alike = [other for other, (its_mark, _) in enumerate(everyone) if its_mark == mark]
    names = differing([everyone[other][1] for other in alike])
    rows: list[OwnRows] = []
    if names and can_take_out(gm, names):
        gm, rows = take_out(gm, mode, names)
        inputs = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    elif names:
        alike = [other for other in alike if everyone[other][1] == everyone[rank][1]]
    first = min(other for other in alike if machine_of[other] == machine_of[rank])

    def compile() -> Callable[..., Any]:
        return with_rows(run_inner(gm, inputs, mode, asked, tell), rows, _device(inputs))

    mine = compile() if first == rank else None
    # A word for all to wait by: who compiles is not known of other kinds of graph, and a meeting is of all ranks.
    exchange(None, "compile their graphs")
    return compile() if mine is None else mine


def _device(inputs: Sequence[Any]) -> torch.device:
    """Of the first input that is a tensor."""
    return next((value.device for value in inputs if isinstance(value, torch.Tensor)), torch.device("cpu"))
