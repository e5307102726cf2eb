"""Ops that compute inside a put: against eager, and those without a rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from row_forms import sent, traced
from torch.nn import functional as F

from sfcompile.codegen.rows.row_ops import compile_rows
from sfcompile.codegen.rows.rows import CannotFollowError

X = torch.rand(1, 2, 6, 24) + 0.5  # 24 of a block of 32 columns
OPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pointwise": lambda x: -(x + 1.5) * (x - 2) / x,
    "powers": lambda x: x.square() + x.pow(0.5) + x.pow(-0.5) + x.pow(-1) + x.rsqrt() + x.sqrt() + x.reciprocal(),
    "mean and sum": lambda x: x - x.mean(-1, keepdim=True) + x.sum(-1, keepdim=True),
    "rms norm": lambda x: F.rms_norm(x, (24,), eps=1e-6),
    "layer norm": lambda x: F.layer_norm(x, (24,)),
    "casts": lambda x: x.bfloat16().float(),
}


@pytest.mark.parametrize("name", OPS)
def test_rows_are_what_eager_computes(name: str) -> None:
    """fp32 throughout: sums of 24 numbers differ by their order alone."""
    gm, root = traced(OPS[name], (X,))
    rows, sources = compile_rows(root, frozenset(node for node in gm.graph.nodes if node.op == "call_function"))
    assert len(sources) == 1
    out, want = sent(rows, (X,)), OPS[name](X)
    assert torch.allclose(out, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda x: x.pow(3), "power 3"),
        (lambda x: x.double().mul(2).float(), "float64"),
        (lambda x: torch.nn.functional.layer_norm(x, (4, 16)), "several dims"),
        (lambda x: x.mean(2, keepdim=True) + x, "over dims"),
        (lambda x: x.add(x, alpha=2), "more arguments"),
    ],
)
def test_what_cannot_be_followed_is_named(fn: object, why: str) -> None:
    gm, root = traced(fn, (torch.randn(1, 2, 4, 16),))  # type: ignore[arg-type]
    with pytest.raises(CannotFollowError, match=why):
        compile_rows(root, frozenset(node for node in gm.graph.nodes if node.op == "call_function"))
