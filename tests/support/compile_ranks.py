"""Ranks of which the one that compiles for all fails, or dies, while the others wait for it."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from model_cases import Plain, tokens

from sfcompile.lowering import compile_once


def first_is_lost(rank: int, how: str) -> None:
    """Two ranks with equal graphs: rank 0 compiles, and in the middle of it raises or is killed."""

    def run_inner(*_: Any) -> Any:
        assert rank == 0, "rank 1 was to wait for what rank 0 makes"
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the compiler's own mistake")

    compile_once.run_inner = run_inner
    options = {"placement": "shard", "timeout_s": 30.0, "inner": "inductor", "topology": "auto:assumed"}
    with torch.no_grad():
        torch.compile(Plain(), backend="streamfusion", options=options)(tokens())
