"""``options={"verify": N}`` on one rank: ``run(rank, CASE)``."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import Plain, compiled, rank, ranks, tokens
from torch import nn

import sfcompile
from sfcompile.backend import last_report, reports
from sfcompile.errors import NumericsError


def run(rank: int, case: str) -> None:
    """One case on one rank."""
    torch._dynamo.reset()
    with torch.no_grad():
        globals()[f"case_{case}"]()


class Noisy(Plain):
    """Draws, writes to a buffer, takes a number, in an autocast region, and breaks once."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, 1, 32))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = super().forward(x + 0.1 * torch.randn_like(x) + self.seen).float() * scale
        self.seen.copy_(y.mean((0, 1), keepdim=True))
        torch._dynamo.graph_break()
        return y + super().forward(y)


def case_right() -> None:
    """Nothing is said but how close it was; the numbers are those of a run without; only first calls are looked at."""
    outs = []
    for verify in (0, 2):
        torch._dynamo.reset()
        torch.manual_seed(4)
        model, before = Noisy(), len(reports())
        call = compiled(model, placement="shard", verify=verify)
        outs.append([call(tokens(), scale) for scale in (1.0, 0.5, 0.25)] + [model.seen.clone()])
        for plan in reports()[before:]:
            assert ("compared with one process" in str(plan)) == (verify > 0), str(plan)
            assert not verify or plan.verified.startswith(("1 call", "2 calls")), plan.verified
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*outs, strict=True))


def case_shares() -> None:
    """Weights in shares on two machines, and rank 0's inputs."""
    options: dict[str, Any] = {"weights": "sharded", "placement": "shard", "verify": 1}
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(32, 600), nn.Linear(600, 32), Plain())
    call = compiled(sfcompile.shard_weights(wide, options={"weights": "sharded"}), **options)
    call(tokens())
    plan = last_report()
    assert plan is not None and plan.verified, str(plan)
    torch._dynamo.reset()
    call = compiled(Plain(), placement="shard", verify=1, inputs="rank0")
    call(tokens() + rank())
    plan = last_report()
    assert plan is not None and plan.verified, str(plan)


def case_wrong() -> None:
    """A rule that is wrong: an op that mixes tokens is said to take each alone. Every rank gets the error."""

    @torch.library.custom_op("sf_verify::mixes", mutates_args=())
    def mixes(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(1, keepdim=True)

    @mixes.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    sfcompile.extend.register_row_wise("sf_verify::mixes")

    class Wrong(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.ops.sf_verify.mixes(super().forward(x)))

    x = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(ranks()))
    call = compiled(Wrong(), placement="shard", verify=1)
    try:
        call(x)
    except NumericsError as error:
        assert "output 0 of rank" in str(error) and "differs from one process by" in str(error)
        return
    raise AssertionError("it was not noticed")
