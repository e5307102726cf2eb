"""The table of ops, and what rules read of a node."""

from __future__ import annotations

import operator

import pytest
import torch
from row_forms import traced
from torch import fx

from sfcompile.codegen.rows import row_ops
from sfcompile.codegen.rows.indices import Atom, Index
from sfcompile.codegen.rows.op_table import OPS, POINTWISE, VIEWS, argument, broadcast, dim_of, first_of, shape_of
from sfcompile.codegen.rows.rows import CannotFollowError, name_of


def test_tables_of_ops() -> None:
    assert row_ops.FREE < VIEWS < set(OPS) and not VIEWS & POINTWISE and POINTWISE < set(OPS)
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert name_of(x) == "" and name_of(graph.call_function(operator.getitem, (x, 0))) == "getitem"
    assert name_of(graph.call_function(torch.ops.aten.add.Tensor, (x, x))) == "add.Tensor"


def test_what_rules_read_of_a_node() -> None:
    _, root = traced(lambda x: x[:, :, 1:3] * 2.0, (torch.randn(1, 2, 4, 16),))
    (cut,) = [node for node in root.graph.nodes if name_of(node) == "slice.Tensor" and argument(node, "dim") == 2]
    assert (argument(cut, "start"), argument(cut, "end"), argument(cut, "step")) == (1, 3, 1)
    assert first_of(root) is cut and shape_of(root) == (1, 2, 2, 16)
    with pytest.raises(CannotFollowError, match="no argument nonsense"):
        argument(cut, "nonsense")
    assert [dim_of(dim, 4) for dim in (-1, 0, 3)] == [3, 0, 3]


def test_a_broadcast_place_is_0_where_the_source_has_one() -> None:
    _, root = traced(lambda x: x * 1.0, (torch.randn(2, 1, 16),))
    place = tuple(Index.of(Atom(name, size)) for name, size in (("b", 3), ("h", 2), ("row", 5), ("w", 16)))
    assert broadcast(place, root) == (place[1], Index(), place[3])
