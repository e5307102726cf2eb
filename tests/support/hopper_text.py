"""Text and machine code of the kernel for Hopper, taken apart for tests."""

from __future__ import annotations

import ast
import re

import pytest

from sfcompile.codegen.kernels.attend_tma import CONSUMERS, REGISTERS
from sfcompile.codegen.kernels.spec import KernelSpec, has_tensor_copies, tma_tiles
from sfcompile.codegen.toolchain.compiler import CompiledKernel
from sfcompile.codegen.toolchain.machine_code import disassembly, inner_loop, resources

needs_tensor_copies = pytest.mark.skipif(
    not has_tensor_copies(), reason="this Triton cannot compile tensor copies: ranks get the kernel without them"
)
"""For what is compiled; which kernel an older Triton gets is in test_spec.py."""


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


def size_of(loop: ast.While) -> int:
    return len(ast.unparse(loop))


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
