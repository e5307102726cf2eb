"""What puts read lives until their joins: in the graph, and in what Inductor makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_text import parse
from helpers import captured
from inductor_memory import disturbed_reads, wrapper_of
from structures import STRUCTURES
from torch import fx, nn
from torch.nn import functional as F

from sfcompile.errors import InternalError
from sfcompile.passes.graph.lifetimes import check_lifetimes, hold_sources
from sfcompile.passes.graph.local_graph import COMMUNICATION
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.topology import Topology

GRAPH = """
    x: f32[1,2,8,4] = input
    t: i64[1] = aten.zeros([1], dtype=torch.int64)
    y: f32[1,2,8,4] = aten.view(x, [1, 2, 8, 4])
    q: f32[1,2,8,4] = aten.sin(x)
    tq: i64[1] = streamfusion.put_q(q, t, 'p', 0)
    tk: i64[1] = streamfusion.put_k(y, tq, 'p', 0)
    tv: i64[1] = streamfusion.put_v(y, tk, 'p', 0)
    {}
    ta: i64[1] = streamfusion.attend(tv, None, 'p', 0)
    c: (f32[1,2,8,4], i64[1]) = streamfusion.collect(ta, 'p', 0, [1, 2, 8, 4], torch.float32)
    {}
    o: f32[1,2,8,4] = c[0]
    return o
"""


class Separate(nn.Module):
    """Two blocks that project q, k and v by themselves, with norms: the next product wants the last one's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(8))
        self.norms = nn.ParameterList(torch.ones(32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(2):
            q, k, v = (self.layers[4 * i + j](x).unflatten(-1, (4, 32)).transpose(1, 2) for j in range(3))
            q, k = (F.rms_norm(y, (32,), self.norms[2 * i + j], 1e-6) for j, y in enumerate((q, k)))
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.layers[4 * i + 3](out)
        return x


def separate() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return Separate().eval(), [torch.randn(1, 256, 128)]


CASES: dict[str, Callable[[], tuple[nn.Module, list[torch.Tensor]]]] = {"separate": separate} | {
    name: STRUCTURES[name]
    for name in (
        "three_streams", "mask_from_lengths", "rotations", "grouped_heads", "modules_of_torch", "depthwise_in_the_mlp",
        "space_and_time", "registers_and_skips",
    )
}  # fmt: skip


def compiled_for(name: str, fuse: bool, late_reads: bool) -> tuple[fx.GraphModule, Any]:
    """Rank 0's graph of two, as GPU ranks get it, and the mode of its fake values."""
    model, inputs = CASES[name]()
    got = captured(model, *inputs)
    asked = Asked(
        shard_everything=True, split_batch=False, parts=(), kernels=True, fuse_puts=fuse, late_reads=late_reads
    )
    with torch.no_grad():
        return run_pipeline(State(got.gm, got.mode, Topology.grid(1, 2), 0, asked)).gm, got.mode


def audited(name: str, fuse: bool, late_reads: bool) -> tuple[int, list[str]]:
    gm, mode = compiled_for(name, fuse, late_reads)
    inputs = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    return disturbed_reads(wrapper_of(gm, inputs, mode))


QUICK = ("depthwise_in_the_mlp",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.thorough) for name in CASES]
)
def test_inductor_leaves_what_puts_read_alone(name: str) -> None:
    """Its wrapper gives no source of a put to another value, frees or writes none, before the put's join."""
    reads, faults = audited(name, True, True)
    assert reads > 0 and faults == []


def test_what_is_not_held_is_reused() -> None:
    """The fault that this is about: puts fused or not, the next product gets what a put still reads."""
    for fuse in (True, False):
        reads, faults = audited("separate", fuse, False)
        assert reads > 0 and any("# reuse" in fault for fault in faults)
    assert audited("separate", False, True)[1] == []


def test_joins_hold_what_puts_read() -> None:
    graph = parse(GRAPH.format("", "")).gm.graph
    hold_sources(graph)
    check_lifetimes(graph)
    (attend,) = (node for node in graph.nodes if "attend" in str(node.target))
    assert [node.name for node in attend.kwargs["held"]] == ["q", "y"]
    gm, _ = compiled_for("separate", True, True)
    for node in gm.graph.nodes:
        if node.target in COMMUNICATION:
            assert ("held" in node.kwargs) == any(kind in node.name for kind in ("attend", "exchange_finish"))


@pytest.mark.parametrize(
    ("between", "after", "message"),
    [
        ("m: f32[1,2,8,4] = aten.mul_.Tensor(q, 2.0)", "", "tq may still read q when m writes"),
        ("m: f32[1,2,8,4] = aten.mul_.Tensor(x, 2.0)", "", "may still read y when m writes"),
        ("", "m: f32[1,2,8,4] = aten.mul_.Tensor(q, 2.0)", ""),
    ],
)
def test_writes_before_the_join_are_found(between: str, after: str, message: str) -> None:
    graph = parse(GRAPH.format(between, after)).gm.graph
    hold_sources(graph)
    if not message:
        check_lifetimes(graph)
        return
    with pytest.raises(InternalError, match=message):
        check_lifetimes(graph)


def test_a_join_that_holds_too_little_and_a_put_without_one_are_found() -> None:
    graph = parse(GRAPH.format("", "")).gm.graph
    with pytest.raises(InternalError, match="tq reads q, and ta, which waits for it, does not"):
        check_lifetimes(graph)
    (start,) = (node for node in graph.nodes if "attend" in str(node.target))
    start.replace_all_uses_with(start.args[0])
    graph.erase_node(start)
    with pytest.raises(InternalError, match="nothing waits for it"):
        check_lifetimes(graph)
