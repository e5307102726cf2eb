"""Ranks that compile: the first of them fails, or dies, while the others wait for it; blocks that repeat, or do not."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import Any

import torch
from model_cases import Plain, close, tokens
from torch import nn

from sfcompile.backend import last_report
from sfcompile.lowering import compile_once, inner
from sfcompile.runtime.rank.session import current_session


def first_is_lost(rank: int, how: str) -> None:
    """Two ranks with equal graphs: rank 0 compiles, and in the middle of it raises or is killed; or rank 1 does, its
    own piece of two, while rank 0 waits, or before rank 0 has begun its second piece."""

    def run_inner(*args: Any) -> Any:
        pieces = {"the second raises": [5, 3], "the second raises early": [5, 5, 1, 1]}.get(how, [1])
        turns = iter(args[-1](pieces))
        next(turns)  # of one piece: rank 1 waits here
        if rank == 0 and how == "the second raises early":
            end = time.monotonic() + 60.0
            while current_session().trouble() is None and time.monotonic() < end:
                time.sleep(0.01)
        if how.startswith("the second raises"):
            assert rank == 1 or next(turns) and False, "rank 0 was to hear of rank 1's failure"
        assert rank == 0 or how.startswith("the second raises"), "rank 1 was to wait for what rank 0 makes"
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the compiler's own mistake")

    compile_once.run_inner = run_inner
    options = {"placement": "shard", "timeout_s": 30.0, "inner": "inductor", "topology": "auto:assumed"}
    with torch.no_grad():
        torch.compile(Plain(), backend="streamfusion", options=options)(tokens())


class Deep(nn.Module):
    """Pre-norm blocks of self-attention and an MLP over [B, S, 32] tokens; with a ``step`` no two of them are alike."""

    def __init__(self, depth: int, step: float = 0.0) -> None:
        super().__init__()
        self.step = step
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(32, 96), "out": nn.Linear(32, 32), "up": nn.Linear(32, 64),
                    "down": nn.Linear(64, 32), "norm": nn.LayerNorm(32),
                }
            )
            for _ in range(depth)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in layer["qkv"](layer["norm"](x)).chunk(3, dim=-1))
            q, k = (nn.functional.normalize(t, dim=-1) for t in (q, k))
            v = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + layer["out"](v.transpose(1, 2).flatten(2))
            x = x + layer["down"](nn.functional.gelu(layer["up"](x))) * (1.0 + i * self.step)
        return x


def _counting(compiler: str) -> list[int]:
    """Inductor, or eager in its place; the list gets the number of nodes of each graph that is compiled from now on."""
    compiled: list[int] = []
    compile = inner.compile_with_inductor

    def counted(gm: Any, *args: Any) -> Any:
        compiled.append(len(gm.graph.nodes))
        return compile(gm, *args) if compiler == "inductor" else gm

    inner.compile_with_inductor = counted
    return compiled


def stretches(rank: int, compiler: str) -> None:
    """Two ranks, eight blocks of which no two are alike: each compiles a stretch of them for both."""
    os.cpu_count = lambda: 2  # as on two cores
    compiled = _counting(compiler)
    options = {"placement": "shard", "timeout_s": 120.0, "inner": "inductor", "topology": "auto:assumed"}
    options["mesh"] = {"ulysses": 2}
    model, x = Deep(8, step=0.1).eval(), tokens()
    with torch.no_grad():
        run = torch.compile(model, backend="streamfusion", options=options)
        first = run(x)
        close(first, model(x))
        assert torch.equal(run(x), first), "the same bits at every call"
        report = last_report()
        assert len(compiled) == 2 and max(compiled) <= 1.5 * min(compiled), compiled
        assert report.sharded_sites == 8 and len(report.gathered) == 1
        assert report.blocks.startswith("2 stretches, which ranks compile side by side: "), report.blocks
        whole = torch.compile(model, backend="streamfusion", options=options | {"compile_blocks": "off"})
        if compiler == "eager":
            assert torch.equal(whole(x), first), "the same calls"
            assert len(compiled) == 3 and last_report().blocks == ""


def repeated_blocks(rank: int, compiler: str) -> None:
    """Two ranks, six equal blocks: one is compiled, beside what is around them; or, where that is asked for, all."""
    said: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sfcompile").addHandler(handler)
    logging.getLogger("sfcompile").setLevel(logging.INFO)
    compiled = _counting(compiler)
    asked = {"placement": "shard", "timeout_s": 60.0, "inner": "inductor", "topology": "auto:assumed"}
    options = asked | {"mesh": {"ulysses": 2}}
    model, x = Deep(6).eval(), tokens()
    with torch.no_grad():
        want = model(x)
        run = torch.compile(model, backend="streamfusion", options=options)
        first = run(x)
        close(first, want)
        assert torch.equal(run(x), first), "the same bits at every call"
        report = last_report()
        assert report.sharded_sites == 6 and len(report.gathered) == 1
        assert 2 <= len(compiled) <= 3, compiled
        lines = [line for line in said if line.startswith("graph 1 ")]
        assert "planned for 2 ranks in" in lines[0] and "is ready after" in lines[-1], lines
        assert "planned in" in lines[-1] and "compiled in" in lines[-1] and report.blocks in lines[-1], lines
        assert len(lines) > 2 and "compiling: 1 of " in lines[1] and "other ranks compile" in lines[1], lines
        assert "1 distinct, compiled once each" in report.blocks and report.blocks in str(report), report.blocks
        whole = torch.compile(model, backend="streamfusion", options=options | {"compile_blocks": "off"})
        if compiler == "eager":
            close(whole(x), want)
            assert compiled[-1] > sum(compiled[:-1]) and last_report().blocks == ""
