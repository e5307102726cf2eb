"""The kernel for Hopper as text and as machine code; the PTX machine runs it (tests/support/ptx/test_ranks.py)."""

from __future__ import annotations

import ast
import re

import pytest

from sfcompile.codegen.kernels.attend import attend_source
from sfcompile.codegen.kernels.attend_tma import CONSUMERS, REGISTERS
from sfcompile.codegen.kernels.spec import KernelSpec, attend_arguments, tma_tiles
from sfcompile.codegen.toolchain.compiler import CompiledKernel, compile_attend
from sfcompile.codegen.toolchain.machine_code import disassembly, inner_loop, resources


def spec_of_size(head_dim: int, **changes: object) -> KernelSpec:
    tiles = tma_tiles(head_dim, 128)
    spec = KernelSpec("bf16", head_dim, head_dim, head_dim**-0.5, forwards=True, pushes=True, **tiles)
    return spec.with_(**changes)


def functions(source: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}


def loops(function: ast.FunctionDef) -> list[ast.While]:
    return [node for node in ast.walk(function) if isinstance(node, ast.While)]


def called(node: ast.AST) -> list[str]:
    """Names of all calls inside, as they are written."""
    return [ast.unparse(entry.func) for entry in ast.walk(node) if isinstance(entry, ast.Call)]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_polls_and_tables_are_outside_of_the_loops_over_blocks(head_dim: int) -> None:
    by_name = functions(attend_source(spec_of_size(head_dim, group=4)))
    copying = min((loop for loop in loops(by_name["producer"]) if "tma.async_load" in called(loop)), key=_size)
    assert "wait_word" not in called(copying) and "tl.load" not in called(copying)
    attending = min((loop for loop in loops(by_name["consumer"]) if "warpgroup_mma" in called(loop)), key=_size)
    assert "wait_word" not in called(attending)
    reads = [node for node in ast.walk(attending) if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load"]
    assert len(reads) == 1 and "keys_ptr" in ast.unparse(reads[0])  # how many keys the next chunk has


def _size(loop: ast.While) -> int:
    return len(ast.unparse(loop))


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


def check_code(kernel: CompiledKernel, keys: int) -> None:
    """No spills; one block's product in flight under the softmax of another; a warp that copies."""
    used, loop = resources(kernel), inner_loop(kernel)
    assert (used.spill_stores, used.spill_loads, used.stack) == (0, 0, 0)
    assert used.shared <= 227 * 1024 and used.registers * 32 * 4 * (CONSUMERS + 1) <= 65536
    # Old sums are multiplied once a block, whatever its size.
    assert loop.instructions * 64 / keys <= (260 if keys == 128 else 330)
    assert loop.under == loop.exponentials == 2 * keys // 4 + 2  # of 16 rows, and of the factors of old sums
    assert (loop.barriers, loop.fences, loop.copies) == (2, 0, 0)  # of a warpgroup; the copies are another warp's
    assert (
        kernel.ptx.count("cp.async.bulk.tensor.2d") >= 2
        and f"setmaxnreg.dec.sync.aligned.u32 \t{REGISTERS[1]}" in kernel.ptx
    )
    assert not re.search(r"ld\.global(\.\w+)*\.b16\b", kernel.ptx)
    assert kernel.ptx.count("fence.proxy.async.global;") == 1
    code = disassembly(kernel)
    polled = [at.start() for at in re.finditer(r"LDG\.E\.64\.STRONG\.SYS", code)]
    copied = code.index("UTMALDG")  # the producer's code stands after the consumers'
    assert "FENCE.VIEW.ASYNC.G" in code[max(at for at in polled if at < copied) : copied]


@pytest.mark.thorough
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("keys", [64, 128])
def test_machine_code(head_dim: int, keys: int) -> None:
    for changes in ({"lse": True, "group": 4}, {"carry": False, "tails": "none", "dtype": "fp16"}):
        check_code(compile_attend(spec_of_size(head_dim, block_n=keys, **changes), 90), keys)  # type: ignore[arg-type]
