"""Ranks whose graphs are equal share one compile: on a machine each compiles some of the pieces, the others find them.

A graph's pieces are its distinct blocks, or a stretch of it for each core, or the whole of it. They are dealt out to
the ranks of a machine whose graphs are equal, the largest first, each to who has least so far. All ranks of the job
meet when theirs are compiled, and then each takes from the disk what it did not compile. A rank that fails fails all of
them, in its own words, there or before the next piece that they would compile.

Inductor keeps what it makes on disk under a key of all that it depends on. That key decides alone what is taken from
there: where ranks are wrong about their graphs being equal, one of them compiles for itself, and nothing else happens.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from sfcompile.lowering.inner import run_inner, runs_eagerly
from sfcompile.lowering.kept_start import keep_start, take_start
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
    progress: Callable[[int, int, int], None] = lambda done, own, every: None,
    heed: Callable[[], None] = lambda: None,
    folder: Path | None = None,
) -> Callable[..., Any]:
    """What runs a rank's graph, compiled once on each machine for all ranks whose graphs are equal. Collective.

    Ranks with graphs of their own compile side by side.

    Args:
        tell: is told of repeated blocks that are compiled once, in words, or why none are.
        progress: is told how many pieces this rank has compiled, of how many that are its own, and of how many in all.
        heed: raises what another rank has told of its failure, if one has; called before each piece.
        folder: where what Inductor finds out at a start is kept (kept_start.py); None: nowhere.
    """
    inputs = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    text, bounds = slices_of(gm)
    kept = not runs_eagerly(inputs, asked) and inductor_keeps() and bool(inputs)
    mark = hashlib.sha256(text.encode()).hexdigest() if kept else f"rank {rank}"
    everyone = exchange([mark, bounds, os.cpu_count() or 1], "compare their graphs before they are compiled")
    alike = [other for other, (its_mark, *_) in enumerate(everyone) if its_mark == mark]
    # One number for all ranks, whatever their graphs: what each of them computes whole is to have the same bits on all,
    # and in a lower precision a cut rounds what crosses it.
    most_alike = max(Counter((its_mark, machine_of[other]) for other, (its_mark, *_) in enumerate(everyone)).values())
    stretches = min(most_alike, *(cores for *_, cores in everyone))
    names = differing([everyone[other][1] for other in alike])
    rows: list[OwnRows] = []
    if names and can_take_out(gm, names):
        gm, rows = take_out(gm, mode, names)
        inputs = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    elif names:
        alike = [other for other in alike if everyone[other][1] == everyone[rank][1]]
    mates = [other for other in alike if machine_of[other] == machine_of[rank]]
    meetings = 0

    def meet() -> None:
        """Once on every rank, also where a graph has no pieces: a meeting is of all ranks, whatever theirs are like."""
        nonlocal meetings
        if not meetings:
            meetings += 1
            exchange(None, "compile their graphs")

    def turns(sizes: Sequence[int]) -> Iterator[int]:
        own = dealt(sizes, len(mates))[mates.index(rank)]
        take_start(folder)
        for done, piece in enumerate(own, 1):
            heed()
            yield piece
            progress(done, len(own), len(sizes))
        if own:
            keep_start(folder)
        meet()
        if not own:
            take_start(folder)
        yield from (piece for piece in range(len(sizes)) if piece not in own)

    run = run_inner(gm, inputs, mode, asked, tell, stretches, turns)
    meet()
    return with_rows(run, rows, _device(inputs))


def dealt(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """The pieces that each of some ranks compiles: the largest first, each to who has least so far."""
    own: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        least = loads.index(min(loads))
        own[least].append(piece)
        loads[least] += sizes[piece]
    return own


def _device(inputs: Sequence[Any]) -> torch.device:
    """Of the first input that is a tensor."""
    return next((value.device for value in inputs if isinstance(value, torch.Tensor)), torch.device("cpu"))
