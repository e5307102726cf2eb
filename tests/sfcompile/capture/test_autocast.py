"""Autocast inside and around a model: the captured graph computes what eager does, to the bit, with autocast off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import run_sharded
from torch import nn
from torch.nn import functional as F

from sfcompile.capture.graph import Captured, capture
from sfcompile.torch_private import autocast_off, autocast_state, enter_autocast, exit_autocast

LOW = torch.bfloat16


class Blocks(nn.Module):
    """Two attention blocks; ``around`` is what its forward runs under, ``inside`` the second block."""

    def __init__(self, region: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.region = region

    def block(self, i: int, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv[i](self.norm(x)).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.region == "island":
            with torch.autocast("cpu", LOW):
                y = self.block(0, x)
            return self.block(1, y.float())
        if self.region == "off inside":
            with torch.autocast("cpu", LOW):
                y = self.block(0, x)
                with torch.autocast("cpu", enabled=False):
                    z = self.block(1, y.float())
                return torch.cat([self.block(1, z), z], -1) @ torch.ones(32, 16)
        with torch.autocast("cpu", LOW):
            return self.block(1, self.block(0, x)).mean(1).float().softmax(-1)


def captured(fn: Callable[..., Any], *args: torch.Tensor) -> Captured:
    graphs: list[Captured] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(capture(gm, inputs))

        def run(*full: Any) -> Any:
            with autocast_off():
                return graphs[-1].gm(*(full[i] for i in graphs[-1].tensor_inputs))

        return run

    torch._dynamo.reset()
    want = fn(*args)
    got = torch.compile(fn, backend=backend, fullgraph=True)(*args)
    assert got.dtype == want.dtype and torch.equal(got, want)
    return graphs[0]


REGIONS = ("island", "off inside", "whole")


@pytest.mark.parametrize("region", REGIONS)
@torch.no_grad()
def test_regions_inside_a_model_become_casts(region: str) -> None:
    graph = captured(Blocks(region), torch.randn(2, 12, 16)).gm.graph
    assert not [node for node in graph.nodes if node.target in (enter_autocast, exit_autocast)]
    casts = [node for node in graph.nodes if node.target is torch.ops.aten._to_copy.default]
    assert len(casts) == len({(node.args[0], node.kwargs["dtype"]) for node in casts}), "a value is cast twice"


@torch.no_grad()
def test_a_region_around_the_compiled_model() -> None:
    model = Blocks("island")
    with torch.autocast("cpu", LOW):
        captured(lambda x: model.block(1, x) * x.softmax(-1), torch.randn(2, 12, 16))
        assert autocast_state()["cpu"] == (True, LOW)


@torch.no_grad()
def test_a_failing_capture_leaves_autocast_as_it_was() -> None:
    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        add = next(node for node in gm.graph.nodes if node.target is torch.add)
        add.target = lambda *values: (_ for _ in ()).throw(ValueError("broken"))
        capture(gm, inputs)
        return gm.forward

    def model(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", LOW):
            return torch.add(x @ x, x)

    torch._dynamo.reset()
    with pytest.raises(Exception, match="broken"):
        torch.compile(model, backend=backend)(torch.ones(4, 4))
    assert autocast_state()["cpu"][0] is False


@pytest.mark.parametrize("region", REGIONS)
@torch.no_grad()
def test_ranks_get_what_one_process_gets(region: str) -> None:
    """The passes see casts as pointwise ops: attention is sharded inside regions too."""
    model = Blocks(region)
    (report,) = run_sharded(model, [torch.randn(2, 12, 16)], ranks=2)
    assert report.sharded_sites >= 2 and not report.left_behind
