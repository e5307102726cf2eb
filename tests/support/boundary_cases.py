"""``options={"boundaries": "shards"}`` on one rank: ``run(rank, CASE)``."""

from __future__ import annotations

import copy
import dataclasses
import os
from types import SimpleNamespace
from typing import Any

import torch
from model_cases import close, compiled, rank, tokens
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import sfcompile
from sfcompile.backend import reports
from sfcompile.errors import RankMismatchError
from sfcompile.lowering import kept_plans
from sfcompile.passes.report.report import GraphReport


def run(rank: int, case: str, *arguments: str) -> None:
    """One case on one rank."""
    torch._dynamo.reset()
    with torch.no_grad():
        globals()[f"case_{case}"](*arguments)


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


class Block(nn.Module):
    """One of several that are alike, as a model's loop calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        return x + scale * self.out(sdpa(q, k, v).transpose(1, 2).flatten(2)), scale * 0.5


@dataclasses.dataclass
class Result:
    """What torch does not know to hold tensors."""

    x: torch.Tensor
    several: tuple[torch.Tensor, ...]


class Deep(nn.Module):
    """A model of five blocks, which hands out what each of them returned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.last = nn.ModuleList([Block() for _ in range(5)]), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> Result:
        scale, several = x.mean((1, 2), keepdim=True) + 1.0, []
        for block in self.blocks:
            x, scale = block(x, scale)
            several.append(x)
        return Result(self.last(x), tuple(several))


def case_regions() -> None:
    """Each kind of block is one program, two where the first one's tokens come whole; nothing is gathered between."""
    model, before = Deep(), len(reports())
    eager = copy.deepcopy(model)
    options = {"placement": "shard", "inner": "eager", "timeout_s": 30.0}
    assert sfcompile.compile_repeated_blocks(model, options=options) is model
    for factor in (1.0, 0.5):
        x = tokens() * factor
        got, want = model(x), eager(x)
        assert {type(value) for value in (got.x, *got.several)} == {torch.Tensor}
        for mine, whole in zip((got.x, *got.several), (want.x, *want.several), strict=True):
            close(mine, whole)
    plans = reports()[before:]
    assert [plan.boundary for plan in plans] == [
        "0 inputs in shards; 1 output in shards", "1 input in shards; 1 output in shards",
    ], [plan.boundary for plan in plans]  # fmt: skip
    assert not any(plan.gathered for plan in plans) and all(plan.sharded_sites == 1 for plan in plans)
    # What a hook reads is whole, and a block that is changed on all ranks is what it is now.
    seen: list[float] = []
    handle = model.blocks[2].register_forward_hook(lambda block, args, result: seen.append(float(result[0].sum())))
    for blocks in (model.blocks, eager.blocks):
        blocks[3].out.weight.mul_(2.0)
    got, want = model(tokens()), eager(tokens())
    handle.remove()
    close(got.x, want.x)
    assert abs(seen[0] - float(want.several[2].sum())) < 1e-3
    # A block whose weights differ on one rank is an error, whichever it is.
    model.blocks[4].qkv.weight.mul_(1.0 + rank())
    try:
        model(tokens())
        raise AssertionError("other weights on one rank were not told")
    except RankMismatchError:
        pass


class Numbered(Block):
    """A block that computes with a number of its own."""

    number = 0

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, scale = super().forward(x, scale)
        return y * (1.0 + 0.01 * self.number), scale


def case_regions_of_many_kinds() -> None:
    """More kinds than Dynamo's limit of programs: each is sharded; past the limit blocks ran whole on every rank."""
    model, before = Deep(), len(reports())
    model.blocks = nn.ModuleList([Numbered() for _ in range(10)])
    for place, block in enumerate(model.blocks):
        block.number = place  # type: ignore[assignment]
    eager = copy.deepcopy(model)
    sfcompile.compile_repeated_blocks(model, options={"placement": "shard", "inner": "eager", "timeout_s": 30.0})
    for mine, whole in zip(model(tokens()).several, eager(tokens()).several, strict=True):
        close(mine, whole)
    assert len(reports()) - before == 10 and all(plan.sharded_sites == 1 for plan in reports()[before:])


def case_regions_in_a_pipeline() -> None:
    """A network whose blocks are compiled, in a pipeline that is compiled too, returns what is whole, by any method
    that pipelines call."""

    class Breaks(Deep):
        def encode(self, x: torch.Tensor) -> Any:
            return [self.blocks[0](x, x[:1, :1, :1])[0]]

        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            scale, several = x[:1, :1, :1], []
            for block in self.blocks:
                x, scale = block(x, scale)
                torch._dynamo.graph_break()
                several.append(x)
            return {"several": several}

    options = {"placement": "shard", "inner": "eager", "timeout_s": 30.0}
    for again in (False, True):
        torch._dynamo.reset()
        model, eager = Breaks(), Breaks()
        sfcompile.compile_repeated_blocks(model, options=options)
        if again:
            sfcompile.compile_pipeline(SimpleNamespace(components={"transformer": model}), options=options)
        results = [*model(tokens())["several"], *model.encode(tokens())]
        for mine, whole in zip(results, [*eager(tokens())["several"], *eager.encode(tokens())], strict=True):
            assert type(mine) is torch.Tensor
            close(mine, whole)


def case_regions_started_again(cache: str) -> None:
    """A second start finds the plans of regions on disk: those that take shards, and those that give them."""
    os.environ["SFCOMPILE_CACHE"], os.environ[kept_plans.VARIABLE], counts = cache, "on", []
    options = {"placement": "shard", "inner": "eager", "timeout_s": 30.0, "topology": "auto:assumed"}
    for _ in range(2):
        torch._dynamo.reset()
        model = Deep()
        want = copy.deepcopy(model)(tokens())
        before = len(reports())
        sfcompile.compile_repeated_blocks(model, options=options)
        close(model(tokens()).x, want.x)
        counts.append([sorted(plan.pass_seconds) for plan in reports()[before:]])
    assert all("read from disk" in seconds for seconds in counts[1]), counts
    assert not any("read from disk" in seconds for seconds in counts[0]), counts
