"""Masks of the kernel for Hopper as text and as machine code; the PTX machine runs them (tests/support/ptx)."""

from __future__ import annotations

import ast

import pytest
from hopper_text import called, check_code, functions, loops, needs_tensor_copies, spec_of_size

from sfcompile.codegen.kernels.attend import attend_source
from sfcompile.codegen.kernels.attend_tma_masks import MASK_RING, masker_arguments
from sfcompile.codegen.kernels.spec import attend_arguments
from sfcompile.codegen.toolchain.compiler import compile_attend


def test_all_who_use_the_ring_take_the_blocks_of_a_tile_from_the_same_table() -> None:
    by_name = functions(attend_source(spec_of_size(64, causal=True, mask="key")))
    for name in ("producer", "masker", "consumer"):
        reads = [ast.unparse(node) for node in ast.walk(by_name[name]) if "spans_ptr + " in ast.unparse(node)]
        assert reads, name
    for name in ("producer", "masker"):
        (blocks,) = (loop for loop in loops(by_name[name]) if ast.unparse(loop.test) == "at < seen")
        assert "mbarrier.wait" in called(blocks)
    assert "spans_ptr" in attend_arguments(spec_of_size(64, causal=True))
    assert "spans_ptr" not in attend_arguments(spec_of_size(64))


def test_positions_and_masks_are_read_only_where_something_is_hidden() -> None:
    consumer = functions(attend_source(spec_of_size(64, causal=True, mask="key")))["consumer"]
    tests = {
        ast.unparse(node.test): node.body
        for node in ast.walk(consumer)
        if isinstance(node, ast.If) and ("partial" in ast.unparse(node.test) or "masked" in ast.unparse(node.test))
    }
    assert len(tests) == 2
    inside = "\n".join(ast.unparse(line) for body in tests.values() for line in body)
    for name in ("q_positions_ptr +", "k_positions_ptr +", "biases.index"):
        assert ast.unparse(consumer).count(name) == 2 * inside.count(name) == 2, name  # the first block, and the others


def test_a_mask_is_there_with_the_keys_and_free_with_them() -> None:
    source = attend_source(spec_of_size(64, mask="key"))
    assert "mbarrier.init(k_full.index(i), count=2)" in source and "mbarrier.init(v_full.index(i), count=1)" in source
    by_name = functions(source)
    masker, consumer = ast.unparse(by_name["masker"]), ast.unparse(by_name["consumer"])
    order = ["wait(k_empty", "biases.index(stage).store", "masked.index(stage).store", "arrive(k_full"]
    assert sorted(order, key=masker.index) == order
    assert consumer.index("biases.index(stage).load") < consumer.index("arrive(k_empty")
    assert [argument.arg for argument in by_name["masker"].args.args] == masker_arguments(spec_of_size(64, mask="key"))


@pytest.mark.parametrize("changes", [{}, {"causal": True}])
def test_what_a_spec_does_not_need_is_not_in_the_text(changes: dict[str, bool]) -> None:
    source = attend_source(spec_of_size(64, **changes))
    for name in (*MASK_RING, "masker", "MASK_SCALE", *([] if changes else ["spans_ptr", "partial", "m_safe"])):
        assert name not in source, name


@needs_tensor_copies
@pytest.mark.thorough
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("changes", [{"causal": True}, {"mask": "key"}, {"mask": "key", "mask_is_bool": False}])
def test_machine_code(head_dim: int, changes: dict[str, object]) -> None:
    """As without masks: at most 260 instructions a warp for 64 keys, no spills, all of a softmax under a product."""
    check_code(compile_attend(spec_of_size(head_dim, lse=True, group=4, **changes), 90), 128)
