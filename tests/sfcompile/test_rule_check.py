"""The checker of op rules passes right rules and finds wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sfcompile import extend
from sfcompile.capture.attention_calls import AttentionCall
from sfcompile.errors import NotShardedError, OptionError, RuleError
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules.linked import Linked
from sfcompile.passes.rules.rule import RULES
from sfcompile.rule_check import check_op_rule

aten = torch.ops.aten


def rows(count: int) -> list[torch.Tensor]:
    return [torch.randn(2, count, 6, generator=torch.Generator().manual_seed(count))]


@pytest.fixture(scope="module")
def library() -> Iterator[torch.library.Library]:
    """Ops that no rule knows: a norm of each row, one of each column, and a sum over rows."""
    library = torch.library.Library("test_rule_check", "DEF")
    for name, dim in (("by_row", -1), ("by_column", 1)):
        library.define(f"{name}(Tensor x, Tensor scale) -> Tensor")
        library.impl(name, lambda x, scale, dim=dim: x.softmax(dim) * scale, "CompositeExplicitAutograd")
        torch.library.register_fake(f"test_rule_check::{name}", lambda x, scale: torch.empty_like(x), lib=library)
    yield library


def scaled(count: int) -> list[torch.Tensor]:
    return [*rows(count), torch.linspace(1.0, 2.0, 6)]


def test_built_in_rules_hold() -> None:
    assert check_op_rule(lambda x: aten.gelu(x), rows, {0: 1}) == 12
    check_op_rule(lambda x: x.transpose(1, 2) + 1, rows, {0: 1}, tolerance=0.0)
    check_op_rule(lambda x: x.unflatten(-1, (2, 3)).unbind(-1)[1], rows, {0: 1})
    check_op_rule(lambda x: x.sum(1), rows, {0: 1})  # every rank's part, summed over ranks
    check_op_rule(lambda x: x > 0, rows, {0: 1})

    def grid(count: int) -> list[torch.Tensor]:
        return [torch.randn(1, 3, count, 4), torch.randn(5, 3, 3, 3)]

    check_op_rule(lambda x, w: torch.nn.functional.conv2d(x, w, padding=1), grid, {0: 2})  # neighbours' rows


def test_a_row_wise_op_in_one_line(library: torch.library.Library) -> None:
    op = torch.ops.test_rule_check.by_row
    with pytest.raises(NotShardedError, match="2 tokens on 2 ranks: .*by_row"):
        check_op_rule(lambda x, s: op(x, s), scaled, {0: 1})
    with extend.scope():
        extend.register_row_wise("test_rule_check::by_row")
        extend.check_op_rule(lambda x, s: op(x, s), scaled, {0: 1})
        extend.check_op_rule(lambda x, s: op(x, s), scaled, {0: 1}, counts=[1, 5], ranks=[4])
        with pytest.raises(NotShardedError):  # the last dim is the one that it mixes
            check_op_rule(lambda x, s: op(x, s), lambda n: [torch.randn(2, 3, n), torch.ones(n)], {0: 2})
    assert "test_rule_check::by_row" not in RULES


def test_a_row_wise_rule_of_an_op_that_mixes_rows_is_found_out(library: torch.library.Library) -> None:
    op = torch.ops.test_rule_check.by_column
    with extend.scope():
        extend.register_row_wise("test_rule_check::by_column")
        with pytest.raises(
            RuleError, match=r"output 0 of rank \d, \d tokens on \d ranks differs by .* at \["
        ) as caught:
            check_op_rule(lambda x, s: op(x, s), scaled, {0: 1})
    assert "would get a wrong picture" in str(caught.value)


def test_a_rule_that_writes_another_shape_is_found_out() -> None:
    """It takes what it mixes for tokens of the output."""

    def crossed(op: OpView) -> Linked:
        return Linked([["a", "b", "c"]], [["a", "b", None]])

    with extend.scope():
        extend.register_op_rule("cumsum")(crossed)
        check_op_rule(lambda x: x.cumsum(-1), rows, {0: 1})
        with pytest.raises(RuleError):
            check_op_rule(lambda x: x.cumsum(1), rows, {0: 1})


def test_what_cannot_be_checked_is_refused() -> None:
    for tokens in ({0: 2}, {1: 0}, {0: 7}):
        with pytest.raises(OptionError, match="for 2 tokens is"):
            check_op_rule(lambda x: x + 1, rows, tokens)
    with pytest.raises(OptionError, match="nothing is checked"):
        check_op_rule(lambda x: x + 1, rows, {})
    with pytest.raises(OptionError, match="register_row_wise"):
        extend.register_row_wise()


READERS: dict[str, Any] = {
    "another mask": lambda q, k, v, causal: AttentionCall(q, k, v),
    "another scale": lambda q, k, v, causal: AttentionCall(q, k, v, scale=0.5, causal=causal),
    "keys for values": lambda q, k, v, causal: AttentionCall(q, v, k, causal=causal),
    "other dims": lambda q, k, v, causal: AttentionCall(q, k, v, causal=causal, heads_last=True),
    "no heads": lambda q, k, v, causal: AttentionCall(q[:, 0], k[:, 0], v[:, 0], causal=causal),
    "no attention": lambda q, k, v, causal: (q, k, v),
    "an argument too many": lambda q, k, v: AttentionCall(q, k, v),
}


def test_a_reader_that_says_of_an_attention_what_it_is_not_is_found_out(library: torch.library.Library) -> None:
    """By its values; what cannot be so by its shape is refused when it is compiled, too."""
    library.define("attend(Tensor q, Tensor k, Tensor v, bool causal) -> Tensor")
    attend = torch.nn.functional.scaled_dot_product_attention
    library.impl("attend", lambda q, k, v, causal: attend(q, k, v, is_causal=causal).contiguous(), "CPU")
    torch.library.register_fake("test_rule_check::attend", lambda q, *rest: torch.empty_like(q), lib=library)

    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.test_rule_check.attend(x, x * 0.5, x + 1, True)

    def heads(count: int) -> list[torch.Tensor]:
        return [torch.randn(2, 4, count, 8, generator=torch.Generator().manual_seed(count))]

    with extend.scope():
        name = "test_rule_check::attend"
        extend.register_attention(name, lambda args: AttentionCall(**args))
        assert check_op_rule(step, heads, {0: 2}) == 12
        for what, reader in READERS.items():
            extend.register_attention(name, lambda args, reader=reader: reader(**args))
            with pytest.raises(RuleError, match="differs by|its reader says|gives"):
                check_op_rule(step, heads, {0: 2})
                raise AssertionError(what)
