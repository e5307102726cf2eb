"""Attention that a library offers as a function: calls are one op, by heads on ranks, with the library's numbers."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import run_compiled
from torch.nn import functional as F

from sfcompile import extend
from sfcompile.capture.fewer_breaks import fewer_breaks
from sfcompile.capture.graph import capture
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.topology import Topology


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To int8 steps, a factor for each four tokens: what a block is depends on all tokens being there."""
    blocks = F.pad(x, [0, 0, 0, -x.shape[-2] % 4]).unflatten(-2, (-1, 4))
    step = blocks.abs().amax((-1, -2), keepdim=True).clamp(min=1e-6) / 127
    return ((blocks / step).round() * step).flatten(-3, -2)[..., : x.shape[-2], :]


def sageattn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Named and called as SageAttention's, which rounds queries and keys by blocks of tokens; not to be traced."""
    torch._dynamo.graph_break()
    q, k, v = (x.transpose(1, 2) if tensor_layout == "NHD" else x for x in (q, k, v))
    k = k - k.mean(2, keepdim=True)
    grouped = q.shape[1] != k.shape[1]
    q, k = rounded(q), rounded(k)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=sm_scale, enable_gqa=grouped)
    return out.transpose(1, 2) if tensor_layout == "NHD" else out


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    module = types.ModuleType("sageattention")
    monkeypatch.setattr(sageattn, "__module__", "sageattention.core")
    module.sageattn = sageattn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sageattention", module)
    torch._dynamo.reset()
    with extend.scope():
        yield module


def net(x: torch.Tensor, w: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    """Two attentions with products around them."""
    for causal in (False, True):
        q = (x @ w).unflatten(-1, (4, -1))
        k, v = q[:, :, :heads].sin(), q[:, :, :heads] * 0.5
        q, k, v = (t if layout == "NHD" else t.transpose(1, 2) for t in (q, k, v))
        out = sys.modules["sageattention"].sageattn(q, k, v, tensor_layout=layout, is_causal=causal, sm_scale=0.3)
        x = x + (out if layout == "NHD" else out.transpose(1, 2)).flatten(2)
    return x @ w


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("layout", "heads"), [("NHD", 4), ("HND", 2)])
def test_a_quantised_attention_runs_by_heads_as_on_one_device(
    library: types.ModuleType, layout: str, heads: int, ranks: int
) -> None:
    x, w = torch.randn(2, 22, 16), torch.randn(16, 16) / 4
    reports = []

    @fewer_breaks
    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        got, topology = capture(gm, inputs), Topology.grid(1, ranks)
        asked = Asked(shard_everything=True, split_batch=False)
        compiled = [run_pipeline(State(got.gm, got.mode, topology, rank, asked)) for rank in range(ranks)]
        reports.append(compiled[0].report)

        def call(*full: Any) -> Any:
            given = [full[i] for i in got.tensor_inputs]
            outputs = run_compiled(compiled, topology, given)
            assert all(torch.equal(out[0], outputs[0][0]) for out in outputs)
            return outputs[0]

        return call

    with torch.no_grad():
        want = net(x, w, layout, heads)
        got = torch.compile(net, backend=backend, fullgraph=True)(x, w, layout, heads)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert reports[0].by_heads == 2 and len(reports[0].gathered) == 1
    assert reports[0].share <= (1.01 if heads % ranks == 0 else 1.4)


def test_calls_that_are_something_else_are_traced(library: types.ModuleType) -> None:
    x = torch.randn(1, 4, 6, 8)

    @fewer_breaks
    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        assert not any("library_call" in str(node.target) for node in gm.graph.nodes)
        return gm.forward

    def with_sums(x: torch.Tensor) -> torch.Tensor:
        return library.sageattn(x, x, x, return_lse=True) + 1

    def other(x: torch.Tensor) -> torch.Tensor:
        return library.sageattn(x, x, x, tensor_layout="LBHD") + 1

    for function in (with_sums, other):
        torch.testing.assert_close(torch.compile(function, backend=backend)(x), function(x))
    extend.register_attention_function("sageattention.sageattn", lambda args: None)
    torch.testing.assert_close(
        torch.compile(lambda x: library.sageattn(x, x, x), backend=backend)(x), sageattn(x, x, x)
    )
