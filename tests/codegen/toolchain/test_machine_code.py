"""What compiled kernels are read back for; test_compiler.py reads every kernel's registers, spills and loads."""

from __future__ import annotations

from sfcompile.codegen.kernels.spec import KernelSpec, tiles_for
from sfcompile.codegen.toolchain.compiler import CompiledKernel, compile_attend
from sfcompile.codegen.toolchain.machine_code import hoisted_loads, order


def spec_for(reach: str) -> KernelSpec:
    """Attention that passes chunks on and sends outputs home, on sm_90."""
    tiles = tiles_for(90, "bf16", 64, 64, hard=reach != "peer")
    return KernelSpec("bf16", 64, 64, 0.125, reach=reach, forwards=True, pushes=True, **tiles)


def test_order_of_waits_puts_and_matrix_products_is_the_schedules() -> None:
    """Without NVSHMEM's code its calls stay visible: wait for K and V, copy, multiply; then put the output."""
    kernel = compile_attend(spec_for("nvshmem"), 90)
    assert not kernel.linked
    names = [name for name, _ in order(kernel)]
    multiplied = names.index("mma")
    before, after = names[:multiplied], names[multiplied:]
    assert before[-1] == "copy" and "wait" in before and "put" not in before
    assert "copy" not in before[: before.index("wait")]
    assert "put" in after


def test_a_wait_inside_the_loop_over_blocks_is_found() -> None:
    """Mutant: the waits move into the loop that Triton pipelines, which then prefetches above them."""
    kernel = compile_attend(spec_for("peer"), 90)
    lines = kernel.ttgir.splitlines()
    poll = next(line for line in lines if "tt.atomic_rmw" in line and "acquire" in line)
    loop = max(i for i, line in enumerate(lines) if "scf.for" in line)
    hoisted = [*lines[: loop + 1], poll, *lines[loop + 1 :]]
    broken = CompiledKernel(**{**vars(kernel), "ttgir": "\n".join(hoisted)})
    assert hoisted_loads(broken) != []
    without = "\n".join(line for line in lines if not ("tt.atomic_rmw" in line and "acquire" in line))
    assert hoisted_loads(CompiledKernel(**{**vars(kernel), "ttgir": without})) == ["no wait at all in kernel attend"]
