"""Row programs against eager: norms, RoPE in every spelling, casts, tables; in the put kernel, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from row_forms import forms, sent, traced
from torch import fx

from sfcompile.codegen.rows.op_table import VIEWS
from sfcompile.codegen.rows.row_ops import FREE, compile_rows
from sfcompile.codegen.rows.rows import CannotFollowError, RowProgram


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


def test_what_a_kernel_cannot_hold_is_refused() -> None:
    gm, root = traced(lambda x: x.mul(2), (torch.randn(2, 4, 16),))
    with pytest.raises(CannotFollowError, match="rows of"):
        compile_rows(root, frozenset([root]))
    assert root in gm.graph.nodes


def test_views_that_a_plain_put_reads_through_are_free() -> None:
    assert FREE < VIEWS and "clone.default" not in FREE and "transpose.int" in FREE
