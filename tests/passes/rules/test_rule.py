from __future__ import annotations

import pytest
import torch
from helpers import captured, check_sharded

from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.rules import rule as op_rules
from sfcompile.passes.rules.rule import find_rule, register_rule


def only_op(fn: object, *args: torch.Tensor) -> OpView:
    nodes = (OpView.of(node) for node in captured(fn, *args).gm.graph.nodes)  # type: ignore[arg-type]
    return [op for op in nodes if op is not None][-1]


def test_an_unknown_op_is_never_guessed() -> None:
    assert find_rule(only_op(lambda x: torch.linalg.inv(x), torch.eye(3))) is None


def test_any_pointwise_op_has_a_rule_by_its_tag() -> None:
    assert "erfc" not in op_rules.RULES
    assert find_rule(only_op(lambda x: torch.erfc(x), torch.zeros(3))) is not None


def test_what_draws_random_numbers_for_each_element_has_none() -> None:
    assert torch.Tag.pointwise in torch.ops.aten.rrelu.default.tags
    op = only_op(lambda x: torch.nn.functional.rrelu(x, training=True), torch.zeros(3))
    assert op.name == "rrelu" and find_rule(op) is None


@pytest.mark.parametrize("name", ["squeeze", "transpose", "flip", "softmax"])
def test_numbers_have_dims_to_name_and_none_that_holds_tokens(name: str) -> None:
    """As torch takes them: ``t.squeeze(-1)`` of a timestep that is a number already."""
    calls = {"squeeze": (-1,), "transpose": (0, -1), "flip": (0,), "softmax": (0,)}

    def fn(t: torch.Tensor) -> torch.Tensor:
        return getattr(t, name)(*calls[name])

    assert find_rule(only_op(fn, torch.tensor(1.5))) is None
    check_sharded(lambda x, t: x * 2 * fn(t), [torch.randn(2, 5), torch.tensor(1.5)], (0, 1), ranks=2)


def test_registering_again_replaces_a_rule(monkeypatch: object) -> None:
    op = only_op(lambda x: x.permute(1, 0), torch.zeros(2, 3))
    before = op_rules.RULES["permute"]
    try:
        register_rule("permute")(lambda op: None)
        assert find_rule(op) is None
    finally:
        op_rules.RULES["permute"] = before
    assert find_rule(op) is not None
