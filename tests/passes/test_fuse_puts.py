"""Which stretches of a rank's graph move into its puts, which do not, and that the graph computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_text import parse, same
from helpers import captured, placeholder_values, run_compiled
from row_forms import halves, normed, pairs
from torch import fx
from torch.nn import functional as F

from sfcompile.passes.fuse_puts import fuse_puts
from sfcompile.passes.runner import Compiled, run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.ops import PUT_FUSED, ROW_PROGRAMS

WIDTH = 16
X, WEIGHT, TABLE = torch.randn(1, 12, 2 * WIDTH), torch.randn(2 * WIDTH, 2 * WIDTH), torch.randn(12, WIDTH)
NORM = torch.randn(WIDTH)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, WIDTH)).transpose(1, 2)


def plain(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Q normed and turned, K turned, V a projection: two puts to fuse."""
    y = F.linear(x, weight)
    q, k = halves(normed(heads(y), norm), table, table), pairs(heads(F.linear(y, weight)), table, table)
    return F.scaled_dot_product_attention(q, k, heads(F.linear(x.sin(), weight)))


def shared(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """The norm's result is read elsewhere too: it is a source, what follows it is fused."""
    kept = normed(heads(F.linear(x, weight)), norm)
    return F.scaled_dot_product_attention(halves(kept, table, table), heads(x), kept) + kept


def unknown(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """No text for the last op before each put."""
    q = heads(F.linear(x, weight)).tanh()
    k = torch.view_as_complex(heads(F.linear(x.sin(), weight)).unflatten(-1, (-1, 2)))
    k = torch.view_as_real(k * k).flatten(3)
    return F.scaled_dot_product_attention(q, k, heads(x) * norm)


def ranks_of(fn: Callable[..., Any], fuse: bool = True) -> tuple[list[Compiled], Any]:
    got = captured(fn, X, WEIGHT, TABLE, NORM)
    compiled = []
    for rank in range(2):
        asked = Asked(shard_everything=True, parts=(), kernels=True, fuse_puts=fuse)
        compiled.append(run_pipeline(State(got.gm, got.mode, Topology.grid(1, 2), rank, asked)))
    return compiled, got


def fused_of(compiled: Compiled) -> dict[str, fx.Node]:
    return {str(node.args[4]): node for node in compiled.gm.graph.nodes if node.target is PUT_FUSED}


@pytest.mark.parametrize(("fn", "phases"), [(plain, {"put_q", "put_k"}), (shared, {"put_q"}), (unknown, {"put_v"})])
def test_what_is_fused_and_that_nothing_changes(fn: Callable[..., Any], phases: set[str]) -> None:
    compiled, got = ranks_of(fn)
    untouched, _ = ranks_of(fn, fuse=False)
    for mine, before in zip(compiled, untouched, strict=True):
        assert set(fused_of(mine)) == phases and mine.report.fused_puts == (len(phases), 3)
        assert mine.order == before.order and before.report.fused_puts is None
        assert not fused_of(before) and len(mine.gm.graph.nodes) < len(before.gm.graph.nodes)
        mine.gm.graph.lint()
    assert f"{len(phases)} of 3 compute what they send" in str(compiled[0].report)
    assert "compute what they send" not in str(untouched[0].report)
    values = placeholder_values(got)
    with torch.no_grad():
        want = got.gm(*values)
    for out in run_compiled(compiled, Topology.grid(1, 2), values):  # CPU ranks compute the same before they put
        torch.testing.assert_close(out[0], want[0], rtol=1e-5, atol=1e-5)


def test_sources_are_what_lies_in_memory_anyway() -> None:
    q = fused_of(ranks_of(plain)[0][0])["put_q"]
    names = [str(node.target) for node in q.args[0]]  # type: ignore[union-attr]
    assert "aten.linear.default" in names and not any("norm" in name or "mul" in name for name in names)
    assert q.args[5] in ROW_PROGRAMS
    kept = fused_of(ranks_of(shared)[0][0])["put_q"]
    source = next(node for node in kept.args[0] if len(node.users) > 1 and node.op == "call_function")  # type: ignore[union-attr]
    assert "mul" in str(source.target)


def test_equal_layers_share_their_programs() -> None:
    def twice(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = plain(x, weight, table, norm).transpose(1, 2).flatten(2)
        return x

    keys = [node.args[5] for node in ranks_of(twice)[0][0].gm.graph.nodes if node.target is PUT_FUSED]
    assert len(keys) == 4 and len(set(keys)) == 2


def test_the_stretch_that_a_put_can_compute_moves_into_it() -> None:
    """The product is computed by others; what follows it is fused; a put of an input stays as it is."""
    graph = parse(
        """
        x: f32[1,2,6,16] = input
        n: f32[16] = input
        t: i64[1] = aten.zeros([1], dtype=torch.int64)
        a: f32[1,2,6,16] = aten.tanh(x)
        b: f32[1,2,6,16] = aten.mul.Tensor(a, n)
        c: f32[1,2,6,16] = aten.add.Tensor(b, x)
        tq: i64[1] = streamfusion.put_q(c, t, 'p', 0)
        tk: i64[1] = streamfusion.put_k(x, tq, 'p', 0)
        return tk, a
        """
    ).gm.graph
    assert fuse_puts(graph) == (1, 2)
    (key,) = (node.args[5] for node in graph.nodes if node.target is PUT_FUSED)
    same(
        graph,
        f"""
        x: f32[1,2,6,16] = input
        n: f32[16] = input
        t: i64[1] = aten.zeros([1], dtype=torch.int64)
        a: f32[1,2,6,16] = aten.tanh(x)
        put_fused_default: i64[1] = streamfusion.put_fused([a, n, x], t, 'p', 0, 'put_q', '{key}')
        tk: i64[1] = streamfusion.put_k(x, put_fused_default, 'p', 0)
        return tk, a
        """,
    )


def test_nothing_to_fuse() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    assert fuse_puts(graph) == (0, 0)
