from __future__ import annotations

import torch
from helpers import captured

from sfcompile.passes.graph.op_view import OpView, is_getitem, shape_of


def views(fn: object, *args: torch.Tensor) -> dict[str, OpView]:
    found = (OpView.of(node) for node in captured(fn, *args).gm.graph.nodes)  # type: ignore[arg-type]
    return {op.name: op for op in found if op is not None}


def test_arguments_by_name_with_defaults_and_operands_in_order() -> None:
    op = views(lambda x, y: torch.cat([x, y, x], dim=-1), torch.zeros(2, 3), torch.zeros(2, 4))["cat"]
    assert [operand.shape for operand in op.operands] == [(2, 3), (2, 4), (2, 3)]
    assert op.dim("dim", 2) == 1 and op.out_shapes == [(2, 10)]
    nodes = [operand.node for operand in op.operands]
    assert op.rebuild(nodes)[0][0] == nodes
    attention = views(lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x), torch.zeros(1, 2, 3, 4))
    assert attention["scaled_dot_product_attention"].args["is_causal"] is False
    assert attention["scaled_dot_product_attention"].namespace == "aten"


def test_outputs_of_a_tuple_are_its_getitems() -> None:
    op = views(lambda x: x.split(2, dim=1)[1] + 1, torch.zeros(2, 5))["split"]
    assert [output is not None for output in op.outputs] == [False, True, False]
    assert op.outputs[1] is not None and is_getitem(op.outputs[1]) and shape_of(op.outputs[1]) == (2, 2)


def test_reduced_dims_are_wrapped() -> None:
    op = views(lambda x: x.sum(dim=(-1, 0)), torch.zeros(2, 3, 4))["sum"]
    assert op.dims("dim", 3) == (0, 2)
    assert views(lambda x: x.sum(), torch.zeros(2, 3))["sum"].dims("dim", 2) == (0, 1)
