"""The text of row programs: arguments, wide loads, one name per value; what ends a program that gets too long."""

from __future__ import annotations

import pytest
import torch
from row_forms import forms, traced

from sfcompile.codegen.rows import rows as kernel_rows
from sfcompile.codegen.rows.indices import Atom, Index
from sfcompile.codegen.rows.row_ops import compile_rows
from sfcompile.codegen.rows.rows import CannotFollowError, Condition, RowProgram


def made(name: str, dtype: torch.dtype = torch.bfloat16) -> RowProgram:
    gm, root = traced(*forms(dtype, 64)[name])
    return compile_rows(root, frozenset(node for node in gm.graph.nodes if node.op == "call_function"))[0]


def test_arguments_are_pointers_and_strides() -> None:
    program = made("pairs")
    assert program.arguments == ("s0_ptr", "s0_0_sr", "s0_1_sr", "s1_ptr", "s1_0_sr", "s2_ptr", "s2_0_sr")
    assert program.kinds == ("bf16", "fp32", "fp32") and program.width == 64
    x = torch.zeros(2, 5, 128, dtype=torch.bfloat16)
    tables = torch.zeros(5, 64), torch.zeros(64, 5).t()
    bound = program.bind((x, *tables))
    assert (bound["s0_0_sr"], bound["s0_1_sr"], bound["s1_0_sr"]) == (640, 128, 64)
    assert bound["s0_ptr"] is x and bound["s2_ptr"].is_contiguous() and bound["s2_0_sr"] == 64


def test_pairs_of_columns_come_from_one_load() -> None:
    lines = made("pairs").lines
    assert len([line for line in lines if "tl.load(s0_ptr" in line]) == 1
    assert len([line for line in lines if "tl.split" in line]) == 1 and len([x for x in lines if "tl.join" in x]) == 1
    assert len(lines) == len({line.split(" = ", 1)[1] for line in lines})  # nothing is computed twice
    assert any("w_half" in line for line in made("half tables").head)


def test_keys_tell_programs_apart() -> None:
    assert made("pairs").key == made("pairs").key
    assert len({made(name).key for name in ("pairs", "halves", "joint")} | {made("pairs", torch.float32).key}) == 4


def test_long_programs_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_rows, "MAX_LINES", 20)
    assert made("norm without weight")
    with pytest.raises(CannotFollowError, match="too long"):
        made("joint")
    monkeypatch.setattr(kernel_rows, "MAX_LINES", 160)
    monkeypatch.setattr(kernel_rows, "MAX_SOURCES", 2)
    with pytest.raises(CannotFollowError, match="too many sources"):
        made("joint")


def test_conditions_that_are_always_one_thing() -> None:
    w = Index.of(Atom("w", 8, 16))
    assert Condition.of(w, 8, True).known is True and Condition.of(w, 0, False).known is True
    assert Condition.of(w, 9, False).known is False and Condition.of(w, 4, True).known is None
    assert Condition.of(w // 4, 1, True) == Condition(w, 4, True)
