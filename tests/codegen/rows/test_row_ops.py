"""Row programs against eager: norms, RoPE in every spelling, casts, tables; in the put kernel, in the interpreter."""

from __future__ import annotations

import operator

import pytest
import torch
from row_forms import forms, sent, traced
from torch import fx

from sfcompile.codegen.rows.row_ops import FREE, OPS, POINTWISE, VIEWS, compile_rows
from sfcompile.codegen.rows.rows import CannotFollowError, RowProgram, name_of


def program_of(name: str, dtype: torch.dtype, width: int) -> tuple[RowProgram, tuple[torch.Tensor, ...], torch.Tensor]:
    fn, arguments = forms(dtype, width)[name]
    gm, root = traced(fn, arguments)
    program, sources = compile_rows(root, frozenset(node for node in gm.graph.nodes if node.op == "call_function"))
    values: dict[fx.Node, torch.Tensor] = dict(
        zip((node for node in gm.graph.nodes if node.op == "placeholder"), arguments, strict=True)
    )
    with torch.no_grad():
        return program, tuple(values[source] for source in sources), gm(*arguments)[0]


@pytest.mark.parametrize("name", forms())
def test_a_kernel_computes_what_eager_does(name: str) -> None:
    """Loads are of the graph's inputs alone: everything between is in the kernel."""
    for dtype, width in ((torch.float32, 16), (torch.float32, 24), (torch.bfloat16, 16)):
        program, sources, want = program_of(name, dtype, width)
        out = sent(program, sources)
        assert (out.dtype, out.shape) == (want.dtype, want.shape)
        difference = (out.float() - want.float()).abs().max() / want.float().abs().max()
        # bf16: a norm's weight may be multiplied before or after the rounding.
        assert difference < (1e-6 if dtype == torch.float32 else 2**-7), (name, dtype, width)
        with torch.no_grad():
            assert torch.equal(program.compute(*sources), want)


def test_casts_round_where_eager_rounds() -> None:
    """bf16 -> fp32 -> bf16 in the middle, and bf16 products: bit by bit."""
    for name in ("pairs", "halves", "written", "norm by hand"):
        program, sources, want = program_of(name, torch.bfloat16, 32)
        assert torch.equal(sent(program, sources), want), name


def test_sources_are_read_through_their_strides() -> None:
    program, sources, want = program_of("pairs", torch.float32, 16)
    wide = torch.zeros(*sources[0].shape[:2], 100)
    wide[..., 7 : 7 + sources[0].shape[-1]] = sources[0]
    apart = sources[0].transpose(1, 2).contiguous().transpose(1, 2)
    for other in (wide[..., 7 : 7 + sources[0].shape[-1]], apart):
        assert torch.equal(sent(program, (other, *sources[1:])), want)


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


def test_tables_of_ops() -> None:
    assert FREE < VIEWS < set(OPS) and not VIEWS & POINTWISE and POINTWISE < set(OPS)
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert name_of(x) == "" and name_of(graph.call_function(operator.getitem, (x, 0))) == "getitem"
    assert name_of(graph.call_function(torch.ops.aten.add.Tensor, (x, x))) == "add.Tensor"
