"""Ranks whose inputs differ, with options={"inputs": "rank0"}: every rank must get what rank 0 alone would."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sfcompile.backend import last_report, reports
from sfcompile.errors import UnsupportedError

HEADS, WIDTH = 4, 16


class Block(nn.Module):
    """Attention, and a reader for each of the odd inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.words = nn.Linear(WIDTH, 3 * WIDTH), nn.Embedding(8, WIDTH)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, ids: torch.Tensor, keep: torch.Tensor, turn: torch.Tensor,
        bias: torch.Tensor, none: torch.Tensor, cache: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        y = x + self.words(ids) + bias + none.sum() + t.to(torch.float32)
        y = torch.view_as_real(torch.view_as_complex(y.float().contiguous().unflatten(-1, (-1, 2))) * turn).flatten(-2)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(y).chunk(3, -1))
        cache.add_(y.mean())
        out = F.scaled_dot_product_attention(q, k, v, keep[:, None, None]).transpose(1, 2).flatten(2)
        return out + cache


def inputs_of(seed: int, tokens: int) -> list[torch.Tensor]:
    """Non-contiguous fp32, a 0-dim fp64, int64, bool, complex, expanded bf16, of no elements, and one to write to."""
    gen = torch.Generator().manual_seed(seed)
    keep = torch.rand(1, tokens, generator=gen) > 0.3
    keep[:, 0] = True
    return [
        torch.randn(1, WIDTH, tokens, generator=gen).transpose(1, 2),
        torch.rand((), generator=gen, dtype=torch.float64),
        torch.randint(0, 8, (1, 2 * tokens), generator=gen)[:, ::2],
        keep,
        torch.randn(tokens, WIDTH // 2, generator=gen, dtype=torch.complex64),
        torch.randn(1, 1, WIDTH, generator=gen).to(torch.bfloat16).expand(1, tokens, WIDTH),
        torch.zeros(0, 3),
        torch.randn(1, tokens, WIDTH, generator=gen),
    ]


def every_kind(rank: int, options: dict[str, Any], dynamic: bool) -> dict[str, Any]:
    """Several calls with inputs of each rank's own; the largest difference to rank 0's results, and the report."""
    model, eager = Block().eval(), Block().eval()
    run = torch.compile(model, backend="streamfusion", options={"inputs": "rank0", **options}, dynamic=dynamic)
    worst, untouched = 0.0, True
    with torch.no_grad():
        for call, tokens in enumerate((24, 24, 40, 24) if dynamic else (24, 24)):
            mine, theirs = inputs_of(100 * call + rank, tokens), inputs_of(100 * call, tokens)
            before = [value.clone() for value in mine]
            got, want = run(*mine), eager(*theirs)
            worst = max(worst, float((got - want).abs().max()), float((mine[-1] - theirs[-1]).abs().max()))
            untouched &= all(torch.equal(a, b) for a, b in zip(before[:-1], mine[:-1], strict=True))
    report = last_report()
    assert report is not None
    return {"worst": worst, "untouched": untouched, "report": str(report), "graphs": len(reports())}


def fails(rank: int, how: str, dynamic: bool) -> None:
    """Another shape or other weights than rank 0's, or ("values") other inputs and ranks that compare them."""
    model = Block().eval()
    options = {"timeout_s": 4.0 if how == "shapes" else 20.0, "inner": "eager", "placement": "shard"}
    if how != "values":
        options["inputs"] = "rank0"
    run = torch.compile(model, backend="streamfusion", options=options, dynamic=dynamic)
    with torch.no_grad():
        if how == "weights":
            model.qkv.weight += rank
        run(*inputs_of(rank, 24))
        run(*inputs_of(rank, 24 + 8 * rank))


class Named(torch.Tensor):
    """A class of its own, whose ops mean what they mean."""


class Seen(TorchDispatchMode):
    """Sees every op, and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def left_to_python(rank: int, how: str) -> list[Any]:
    """What comes of calls that Dynamo would run as Python, with inputs of each rank's own: errors, or how far off from
    rank 0's results."""
    model = nn.Sequential(Plain()).eval()
    run = torch.compile(model, backend="streamfusion", options={"inputs": "rank0", "inner": "eager"}, dynamic=False)
    seen: list[Any] = []
    with torch.no_grad(), ExitStack() as around:
        if how == "a mode":
            around.enter_context(Seen())
        if how == "many programs":
            around.enter_context(torch._dynamo.config.patch(recompile_limit=1))
            run(torch.ones(1, 8, WIDTH))
        for _ in range(2):
            mine, first = (torch.randn(1, 24, WIDTH, generator=torch.Generator().manual_seed(s)) for s in (rank, 0))
            value = mine.as_subclass(Named) if how == "a class" else mine
            try:
                seen.append(float((run(value) - model(first)).abs().max()))
            except UnsupportedError as error:
                seen.append(str(error))
    return seen


class Plain(nn.Module):
    """One attention; what splits its heads is a generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x
