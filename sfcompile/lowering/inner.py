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
from sfcompile.options import Options
from sfcompile.torch_private import FakeTensorMode, inductor_mode_options

log = logging.getLogger("sfcompile")


def run_inner(
    gm: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode | None, asked: Options
) -> Callable[..., Any]:
    """What runs a graph: Inductor, or eager where asked for or no compiler is installed."""
    if runs_eagerly(inputs, asked):
        return gm.forward
    config: dict[str, Any] = {}
    if asked.mode and asked.mode != "default":
        config.update(inductor_mode_options(asked.mode))
    return compile_with_inductor(gm, inputs, mode, config)


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
