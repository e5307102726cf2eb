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
from sfcompile.lowering.blocks import Blocks, Turns, blocks_of, in_a_row, why_distinct
from sfcompile.options import Options
from sfcompile.torch_private import FakeTensorMode, inductor_mode_options

log = logging.getLogger("sfcompile")


def run_inner(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    mode: FakeTensorMode | None,
    asked: Options,
    tell: Callable[[str], None] = lambda _: None,
    turns: Turns = in_a_row,
) -> Callable[..., Any]:
    """What runs a graph: Inductor, or eager where asked for or no compiler is installed.

    Args:
        inputs: fake tensors of ``mode``; with ``mode`` None, those of a graph of Dynamo's, which is compiled whole.
        tell: is told of repeated blocks that are compiled once, in words, or why none are.
        turns: in which order its pieces are compiled.
    """
    if runs_eagerly(inputs, asked):
        return gm.forward
    config: dict[str, Any] = {}
    if asked.mode and asked.mode != "default":
        config.update(inductor_mode_options(asked.mode))
    blocks = _blocks(gm, config, asked) if mode is not None else None
    if mode is None or blocks is None:
        if mode is not None and asked.compile_blocks != "off" and (why := why_distinct(gm)):
            tell(why)
        (run,) = [compile_with_inductor(gm, inputs, mode, config) for _ in turns([len(gm.graph.nodes)])]
        return run
    tell(str(blocks))
    return blocks.compiled(mode, lambda region, values: compile_with_inductor(region, values, mode, config), turns)


def _blocks(gm: fx.GraphModule, config: dict[str, Any], asked: Options) -> Blocks | None:
    """The graph's repeated blocks, if they are to be compiled once: a CUDA graph is recorded of a whole call."""
    recorded = bool(config.get("triton.cudagraphs"))
    return None if asked.compile_blocks == "off" or recorded else blocks_of(gm)


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
