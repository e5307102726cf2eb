"""Vmapped functions and higher-order ops are captured as calls that run them as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import captured
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from sfcompile.capture.graph import capture
from sfcompile.passes.graph.cost import flops
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.topology import Topology


def blockwise(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Causal flex attention between two products; its mask is made in the graph, and asks for the head."""
    length = x.shape[1]
    mask = create_block_mask(lambda b, h, q, k: q >= k + 0 * h, None, None, length, length, device="cpu")
    q = (x @ w).unflatten(-1, (2, 16)).transpose(1, 2)
    return flex_attention(q, q, q, block_mask=mask).transpose(1, 2).flatten(2) @ w


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 256, 32, generator=generator), torch.randn(32, 32, generator=generator) / 6


def test_flex_attention_is_one_call_and_its_result_the_same() -> None:
    x, w = inputs()
    got = captured(blockwise, x, w)
    opaque = [node for node in got.gm.graph.nodes if "opaque" in str(node.target)]
    assert opaque and not any("flex" in str(node.target) for node in got.gm.graph.nodes)
    with torch.no_grad():
        (out,) = got.gm(x, w)
        q = (x @ w).unflatten(-1, (2, 16)).transpose(1, 2)
        want = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2) @ w
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_lists_that_only_gradients_read_are_not_made() -> None:
    """Lists of the blocks of queries that look at a block of keys: each would be one vmapped call more."""
    opaque = [n for n in captured(blockwise, *inputs()).gm.graph.nodes if "opaque" in str(n.target)]
    attention = opaque[-1]
    (tensors, _) = attention.args
    assert len(opaque) == 2, "the mask and the attention"
    assert [tuple(t.meta["val"].shape) for t in tensors][1:] == [(1, 1, 2), (1, 1, 2, 2)] * 2


def test_its_work_is_counted_and_reported_as_replicated() -> None:
    got = captured(blockwise, *inputs())
    views = [view for view in map(OpView.of, got.gm.graph.nodes) if view is not None and view.name == "opaque"]
    assert sum(flops(view) for view in views) == 2 * 2 * 256 * 256 * 32
    report = run_pipeline(State(got.gm, got.mode, Topology.grid(1, 2), 0, Asked(shard_everything=True))).report
    assert any(left.op.startswith("streamfusion.opaque") and left.flops for left in report.left_behind)
    assert report.rank_flops[0] > 2 * 2 * 256 * 256 * 32


def test_a_vmapped_function_keeps_its_sizes() -> None:
    def outer(x: torch.Tensor) -> torch.Tensor:
        table = torch.vmap(lambda i: torch.where(i > 2, i, 0))(torch.arange(x.shape[0]))
        return x * table[:, None]

    x = torch.randn(6, 3)
    got = captured(outer, x)
    assert torch.equal(got.gm(x)[0], outer(x))


def test_a_loop_whose_end_depends_on_data_is_not_captured() -> None:
    def step(x: torch.Tensor) -> Any:
        return torch.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 2), (torch.tensor(0), x))

    with pytest.raises(BackendCompilerFailed, match="UnsupportedError: .*while_loop gives is not known before it runs"):
        captured(step, torch.randn(2, 5))


class _Above(TorchDispatchMode):
    """As AOTAutograd's, which looks at the first call of what it has compiled."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_vmapped_function_runs_below_a_mode() -> None:
    """With Inductor inside, its first call was a RuntimeError: kernels were given vmap's own tensors."""

    def call(x: torch.Tensor) -> torch.Tensor:
        rows = torch.func.vmap(torch.func.vmap(lambda i, j: (i + j).remainder(3), (None, 0)), (0, None))
        return x + rows(torch.arange(4), torch.arange(5))

    x = torch.randn(4, 5)
    got = captured(call, x)
    with _Above():
        torch.testing.assert_close(got.gm(x)[0], call(x))


def _doubled(row: torch.Tensor) -> torch.Tensor:
    row.mul_(2)
    return row.sum()


def test_what_a_vmapped_function_writes_in_place_is_seen_behind_it() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        sums = torch.func.vmap(_doubled)(y)
        return y + sums[:, None]

    x = torch.randn(3, 4)
    got = captured(call, x)
    torch.testing.assert_close(got.gm(x)[0], call(x))

    def views(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        torch.func.vmap(lambda row, other: row.mul_(2) + other)(y, y.view(3, 4))
        return y

    with pytest.raises(BackendCompilerFailed, match="operands 0 and 1, views of one memory"):
        captured(views, x)


def test_what_a_kernel_of_tritons_writes_is_seen_behind_it() -> None:
    """As Dynamo writes it where there is a GPU. Such a call has no result, and was a ValueError."""
    triton = pytest.importorskip("triton")
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation

    def double(x: Any, y: Any) -> None:
        pass

    kernel = triton.JITFunction(double)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    memory = graph.call_function(torch.empty_like, (x,))
    places = {
        "kernel_idx": kernel_side_table.add_kernel(kernel),
        "constant_args_idx": kernel_side_table.add_constant_args({}),
    }
    given = {"grid": [(1, 1, 1)], "tma_descriptor_metadata": {}, "kwargs": {"x": x, "y": memory}}
    graph.call_function(triton_kernel_wrapper_mutation, (), {**places, **given})
    graph.output((graph.call_function(torch.sin, (memory,)),))
    got = capture(torch.fx.GraphModule(torch.nn.Module(), graph), [torch.randn(4)])
    (sine,) = (node for node in got.gm.graph.nodes if "sin" in str(node.target))
    read = sine.args[0]
    assert "copy" in str(read.target) and read.args[1].args[0].target is torch.ops.streamfusion.opaque.default
