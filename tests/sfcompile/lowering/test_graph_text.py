"""A rank's graph as plain values: what comes back computes the same, and what has no text is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import captured

from sfcompile.capture.graph_key import NoText
from sfcompile.lowering.graph_text import graph_from_plain, graph_to_plain
from sfcompile.torch_private import static_mode

X = torch.randn(3, 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clamp(min=-float("inf")) + torch.tensor([1.0, 2.0, 3.0, 4.0]),
        lambda x: torch.cat([part.flip(0) for part in x.split([1, 3], 1)], 1),
        lambda x: (x.to(torch.bfloat16).sum(-1, keepdim=True), x[:, 1:3] * 2.0),
        lambda x: torch.full((2, 3), 7, dtype=torch.int64, device=x.device) + x[0, :3],
        lambda x: torch.var_mean(x, 1, correction=0)[1],
        lambda x: x.new_zeros(0, 4),
    ],
)
def test_what_comes_back_computes_the_same(function: Callable[..., Any]) -> None:
    gm = captured(function, X).gm
    mode = static_mode()
    again = graph_from_plain(json.loads(json.dumps(graph_to_plain(gm))), mode)
    assert again.code == gm.code
    for got, want in zip(again(X), gm(X), strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride()
    for old, new in zip(gm.graph.nodes, again.graph.nodes, strict=True):
        if isinstance(old.meta.get("val"), torch.Tensor):
            assert old.meta["val"].storage_offset() == new.meta["val"].storage_offset()


def test_what_has_no_text() -> None:
    gm = captured(lambda x: x + 1, X).gm
    node = next(node for node in gm.graph.nodes if node.op == "call_function")
    op = node.target
    for target in (torch.add, torch.ops.streamfusion.opaque.default, torch.ops.streamfusion.put_fused.default):
        node.target = target
        with pytest.raises(NoText, match=r"add|opaque|put_fused"):
            graph_to_plain(gm)
    node.target = op
    value = node.meta["val"]
    node.meta["val"] = torch.conj(value.to(torch.complex64))
    with pytest.raises(NoText, match="not written down"):
        graph_to_plain(gm)
