"""``options={"boundaries": "shards"}`` on one rank: ``run(rank, CASE)``."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import close, compiled, rank, tokens
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sfcompile.backend import reports
from sfcompile.errors import RankMismatchError
from sfcompile.passes.report.report import GraphReport


def run(rank: int, case: str) -> None:
    """One case on one rank."""
    torch._dynamo.reset()
    with torch.no_grad():
        globals()[f"case_{case}"]()


class Broken(nn.Module):
    """A block whose attention stands in another graph than its q, k and v, with Python between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def between(self, x: torch.Tensor, *values: torch.Tensor) -> None:
        """What Python does with them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sin(x)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        torch._dynamo.graph_break()
        torch._dynamo.disable(self.between)(x, q, k, v)
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (q, k, v))
        return x + self.out(sdpa(q, k, v).transpose(1, 2).flatten(2))


def both(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> list[GraphReport]:
    """Two calls against one process; the reports of its graphs."""
    want, before = [model(*inputs), model(*(x * 0.5 for x in inputs))], len(reports())
    call = compiled(model, **({"placement": "shard", "boundaries": "shards"} | options))
    for _ in range(2):
        close(call(*inputs), want[0])
        close(call(*(x * 0.5 for x in inputs)), want[1])
    return reports()[before:]


def case_split() -> None:
    """q, k and v meet in one attention site, and nothing but the model's output is gathered."""
    plans = both(Broken(), tokens())
    assert [len(plan.gathered) for plan in plans] == [0, 1], [str(plan) for plan in plans]
    assert sum(plan.sharded_sites for plan in plans) == 1
    assert plans[1].boundary == "4 inputs in shards; 0 outputs in shards", plans[1].boundary


def case_read() -> None:
    """Python reads one value, writes to another, to a view of a third: readers see what one process sees."""

    class Reads(Broken):
        def between(self, x: torch.Tensor, *values: torch.Tensor) -> None:
            q, k, v = values
            assert float(q.abs().max()) > 0.1
            x.mul_(0.5 + float(q.numpy()[0, 0, 0]))
            k[:, :5].zero_()
            v.add_(1.0)

    both(Reads(), tokens(), verify=1)


def case_another_write() -> None:
    """Ranks that write other things to a value between the graphs are told, in shards as whole; not those that trust
    each other. The next call is exact again."""

    class Writes(Broken):
        more = 1.0

        def between(self, x: torch.Tensor, *values: torch.Tensor) -> None:
            x.add_(1.0 + self.more * rank())

    for options in ({}, {"boundaries": "whole"}, {"inputs": "trusted"}):
        torch._dynamo.reset()
        model = Writes()
        call = compiled(model, **({"placement": "shard", "boundaries": "shards"} | options))
        try:
            call(tokens())
            assert "inputs" in options, "ranks that wrote other values were not told"
        except RankMismatchError:
            assert "inputs" not in options
            model.more = 0.0
            close(call(tokens()), model(tokens()))


def case_one_memory() -> None:
    """Python writes to a value, and its views, which are results of the same graph, see it: whole and in shards."""

    class Views(Broken):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.out(torch.sin(x))
            part, turned, same = h[:, 3:20], h.transpose(1, 2), h.detach()
            torch._dynamo.disable(h.mul_)(2.0)
            torch._dynamo.graph_break()
            turned.add_(1.0)
            torch._dynamo.graph_break()
            return super().forward(h) + part.sum() + turned.transpose(1, 2) * same

    class Windows(Broken):
        """Parts that overlap, of a value that is no result itself, and a part that is repeated."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.out(torch.sin(x))
            early, late, many = h[:, :40], h[:, 20:], h[:1, :1].expand(2, 10, 32)
            torch._dynamo.graph_break()
            torch._dynamo.disable(early.mul_)(2.0)
            return super().forward(torch.cat([early, late], 1)) + many.sum()

    for how in ("whole", "shards"):
        both(Views(), tokens(), boundaries=how)
        both(Windows(), tokens(), boundaries=how)


def case_uneven() -> None:
    """Two streams whose lengths do not divide, joined behind a break; what is cut in two segments crosses another."""

    class Joint(Broken):
        def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            x, text = self.out(self.norm(x)), self.out(self.norm(text))
            torch._dynamo.graph_break()
            x = torch.cat([text, x], 1)
            q, k, v = self.qkv(x).chunk(3, -1)
            torch._dynamo.graph_break()
            q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (q, k, v))
            return self.out(x + sdpa(q, k, v).transpose(1, 2).flatten(2))

    plans = both(
        Joint(),
        torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(0)),
        tokens()[:, :7].contiguous(),
        verify=2,
    )
    assert [len(plan.gathered) for plan in plans] == [0, 0, 1], [str(plan) for plan in plans]
    crossing = [plan.boundary for plan in plans]
    assert crossing == [
        "0 inputs in shards; 2 outputs in shards",
        "2 inputs in shards; 4 outputs in shards",
        "4 inputs in shards; 0 outputs in shards",
    ], crossing


def case_returned() -> None:
    """What crossed a break and is returned behind it is whole, in whatever it is returned, and kept is what it was."""

    class Returns(Broken):
        kept: torch.Tensor

        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            h = self.out(torch.sin(x))
            torch._dynamo.graph_break()
            self.kept = h
            y = super().forward(h)
            torch._dynamo.graph_break()
            return {"y": y, "all": [h, (h, 3)]}

    for model, options in ((Returns(), {"boundaries": "shards"}), (Returns(), {"boundaries": "whole"})):
        torch._dynamo.reset()
        call, want = compiled(model, placement="shard", **options), model(tokens())
        for _ in range(2):
            got = call(tokens())
            assert [type(x) for x in (got["y"], got["all"][0], got["all"][1][0])] == [torch.Tensor] * 3
            close(got["y"], want["y"])
            close(got["all"][0], want["all"][0])
            close(model.kept, want["all"][0])
            assert got["all"][1][1] == 3


def case_written_through_a_view() -> None:
    """A graph writes to a part of a value that it reads in shards: it sees what it wrote, or is refused; never else."""

    class Parts(Broken):
        def forward(self, x: torch.Tensor, part: Any = None) -> torch.Tensor:  # type: ignore[override]
            h = self.out(torch.sin(x))
            row = torch._dynamo.disable(lambda t: t.detach() if part is None else t[0])(h)
            row.mul_(2.0)
            return self.out(h) + row.sum()

    for part in (None, 0):
        torch._dynamo.reset()
        model, call = Parts(), compiled(Parts(), placement="shard", boundaries="shards")
        for _ in range(2):
            close(call(tokens(), part), model(tokens(), part))
