"""What runs the graph of one rank: Inductor, or eager where it is asked for or no compiler is installed."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sfcompile.capture.graph import compile_with_inductor
from sfcompile.lowering.blocks import Blocks, Turns, blocks_of, in_a_row, stretches_of, why_distinct
from sfcompile.options import Options
from sfcompile.torch_private import FakeTensorMode, forward_of, inductor_mode_options

log = logging.getLogger("sfcompile")

MOST_STRETCHES = 4
"""A graph without repeated blocks is cut into no more: each costs a call of its own at every step."""


def run_inner(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    mode: FakeTensorMode | None,
    asked: Options,
    tell: Callable[[str], None] = lambda _: None,
    stretches: int = 1,
    turns: Turns = in_a_row,
) -> Callable[..., Any]:
    """What runs a graph: Inductor, or eager where asked for or no compiler is installed.

    Args:
        inputs: fake tensors of ``mode``; with ``mode`` None, those of a graph of Dynamo's, which is compiled whole.
        tell: is told of the pieces that a graph is cut into, in words, or why no repeated block is compiled once.
        stretches: into so many a graph without repeated blocks is cut, for as many ranks that share its compile.
        turns: in which order its pieces are compiled.
    """
    if runs_eagerly(inputs, asked):
        return forward_of(gm)
    config: dict[str, Any] = {}
    if asked.mode and asked.mode != "default":
        config.update(inductor_mode_options(asked.mode))
    blocks = _blocks(gm, config, asked, stretches) if mode is not None else None
    if mode is None or blocks is None:
        if mode is not None and asked.compile_blocks != "off" and (why := why_distinct(gm)):
            tell(f"compiled in one piece: {why}")
        (run,) = [compile_with_inductor(gm, inputs, mode, config) for _ in turns([len(gm.graph.nodes)])]
        return run
    why = "" if blocks.repeats else why_distinct(gm)
    tell(f"{blocks}{why and ': '}{why}")
    return blocks.compiled(mode, lambda region, values: compile_with_inductor(region, values, mode, config), turns)


def _blocks(gm: fx.GraphModule, config: dict[str, Any], asked: Options, stretches: int) -> Blocks | None:
    """The graph's repeated blocks, or else stretches, if it is to be cut: a CUDA graph is recorded of a whole call."""
    if asked.compile_blocks == "off" or config.get("triton.cudagraphs"):
        return None
    return blocks_of(gm) or stretches_of(gm, min(stretches, MOST_STRETCHES))


def runs_eagerly(inputs: Sequence[Any], asked: Options) -> bool:
    """Whether a graph runs call by call: asked for, or, with a line in the log, as no compiler is installed."""
    if asked.inner == "auto" and not _has_compiler(inputs):
        log.warning("no C++ compiler found: the local graph runs eagerly; install g++ or set inner='eager'")
        return True
    return asked.inner == "eager"


def _has_compiler(inputs: Sequence[Any]) -> bool:
    if any(isinstance(x, torch.Tensor) and x.device.type == "cuda" for x in inputs):
        return True
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))
