"""Views inside a put: the kernel reads, bit by bit, what eager's views see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from row_forms import sent, traced

from sfcompile.codegen.rows.row_ops import compile_rows
from sfcompile.codegen.rows.rows import CannotFollowError

Function = Callable[[torch.Tensor], torch.Tensor]
X = torch.randn(1, 2, 6, 16)
VIEWS: dict[str, Function] = {
    "reshape and back": lambda x: x.flatten(1, 2).unflatten(1, (2, 6)),
    "permute": lambda x: x.permute(0, 2, 1, 3).transpose(1, 2),
    "slice": lambda x: x[:, :, 1:5],
    "select": lambda x: x[:, 1].unsqueeze(1),
    "split": lambda x: x.split([2, 4], 2)[1],
    "unbind": lambda x: x.unbind(1)[1].unsqueeze(1),
    "chunk": lambda x: x.chunk(3, 2)[2],
    "expand": lambda x: x[:, :1].expand(1, 4, 6, 16),
    "repeat": lambda x: x.repeat_interleave(2, 1),
    "cat of tokens": lambda x: torch.cat([x[:, :, 4:], x[:, :, :4]], 2),
    "cat of columns": lambda x: torch.cat([x[..., 3:], x[..., :3]], -1),
    "stack of columns": lambda x: torch.stack([x[..., 1::2], x[..., 0::2]], -1).flatten(3),
    "written tokens": lambda x: torch.slice_scatter(x, x[:, :, :2], 2, 3, 5),
}


def program(function: Function) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel sends, and what eager computes."""
    gm, root = traced(lambda x: function(x) * 1.0, (X,))
    rows, _ = compile_rows(root, frozenset(node for node in gm.graph.nodes if node.op == "call_function"))
    return sent(rows, (X,)), function(X)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_another_place_in_its_source(name: str) -> None:
    out, want = program(VIEWS[name])
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: torch.slice_scatter(x, x[:, :, ::3], 2, 0, 6, 3), "every other column"),
        (lambda x: x.repeat_interleave(2).view(1, 2, 12, 16), "flattened"),
    ],
)
def test_views_without_a_rule_are_named(function: Function, why: str) -> None:
    with pytest.raises(CannotFollowError, match=why):
        program(function)
