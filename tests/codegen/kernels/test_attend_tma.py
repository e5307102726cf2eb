"""The kernel for Hopper as text and as machine code; the PTX machine runs it (tests/support/ptx/test_ranks.py)."""

from __future__ import annotations

import ast

import pytest
from hopper_text import called, check_code, functions, loops, needs_tensor_copies, size_of, spec_of_size

from sfcompile.codegen.kernels.attend import attend_source
from sfcompile.codegen.kernels.spec import attend_arguments
from sfcompile.codegen.toolchain.compiler import compile_attend


@pytest.mark.parametrize("head_dim", [64, 128])
def test_polls_and_tables_are_outside_of_the_loops_over_blocks(head_dim: int) -> None:
    by_name = functions(attend_source(spec_of_size(head_dim, group=4)))
    copying = min((loop for loop in loops(by_name["producer"]) if "tma.async_load" in called(loop)), key=size_of)
    assert "wait_word" not in called(copying) and "tl.load" not in called(copying)
    attending = min((loop for loop in loops(by_name["consumer"]) if "warpgroup_mma" in called(loop)), key=size_of)
    assert "wait_word" not in called(attending)
    reads = [node for node in ast.walk(attending) if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load"]
    assert len(reads) == 1 and "keys_ptr" in ast.unparse(reads[0])  # how many keys the next chunk has


def test_keys_are_polled_for_on_the_first_tile_of_a_unit_and_fenced_before_they_are_copied() -> None:
    producer = functions(attend_source(spec_of_size(64)))["producer"]
    (first,) = (node for node in ast.walk(producer) if isinstance(node, ast.If) and "start" in ast.unparse(node.test))
    assert ast.unparse(first.test) == "tile == start"
    assert called(first).count("wait_word") == called(producer).count("wait_word") == 2
    text = ast.unparse(producer)
    assert text.rindex("wait_word(") < text.index("fence_async(") < text.index("tma.async_load(")


def test_what_a_spec_does_not_need_is_not_in_the_text() -> None:
    lean = attend_source(spec_of_size(64, forwards=False, pushes=False, carry=False, tails="none"))
    full = attend_source(spec_of_size(64, lse=True))
    for name in ("kept(", "keep(", "hide_first(", "raise_signal(", "copy_chunk(", "last_of(", "lse_ptr"):
        assert name in full and name not in lean, name
    assert functions(full)["attend"].args.args[0].arg == attend_arguments(spec_of_size(64))[0]


@needs_tensor_copies
@pytest.mark.thorough
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("keys", [64, 128])
def test_machine_code(head_dim: int, keys: int) -> None:
    for changes in ({"lse": True, "group": 4}, {"carry": False, "tails": "none", "dtype": "fp16"}):
        check_code(compile_attend(spec_of_size(head_dim, block_n=keys, **changes), 90), keys)  # type: ignore[arg-type]
