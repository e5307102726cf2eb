"""What compiled kernels are read back for; test_compiler.py reads every kernel's registers, spills and loads."""

from __future__ import annotations

import re

import pytest
from hopper_text import needs_tensor_copies

from sfcompile.codegen.engines.choice import reorders_waits
from sfcompile.codegen.kernels.spec import KernelSpec, tiles_for, tma_tiles
from sfcompile.codegen.toolchain import machine_code
from sfcompile.codegen.toolchain.compiler import CompiledKernel, compile_attend
from sfcompile.codegen.toolchain.machine_code import hoisted_loads, inner_loop, order
from sfcompile.errors import CodegenError


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
    assert before[-1] == "copy" and before[0] == "wait"
    if not reorders_waits(90):
        assert "put" not in before
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


@needs_tensor_copies
def test_a_tensor_copy_without_a_proxy_fence_after_its_waits_is_found() -> None:
    spec = KernelSpec("fp16", 64, 64, 0.125, pushes=True, **tma_tiles(64, 64))
    kernel = compile_attend(spec, 90)
    assert hoisted_loads(kernel) == []
    without = CompiledKernel(**{**vars(kernel), "ttgir": re.sub(r"fence\.proxy\.async\.global;", "", kernel.ttgir)})
    assert len(hoisted_loads(without)) == 2 and "async_tma_copy" in hoisted_loads(without)[0]


SASS = """
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/              @!P0 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   MUFU.EX2 R3, R4 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR12].tnspB, R88, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
        /*0080*/                   FSEL R5, R5, -INF , P2 ;
        /*0090*/                   FSEL R6, R6, -INF , P2 ;
.L_x_2:
        /*00a0*/                   NOP ;
        /*00b0*/                   MUFU.EX2 R3, R4 ;
        /*00c0*/                   BAR.SYNC.DEFER_BLOCKING 0x0, 0x80 ;
        /*00d0*/               @P0 BRA `(.L_x_1) ;
        /*00e0*/                   EXIT ;
"""


def test_the_loop_over_blocks_is_counted_from_its_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is jumped over is seldom; of two exponentials one stands under a product that has not been waited for."""
    kernel = CompiledKernel(None, 90, "", "", b"", 0, False)  # type: ignore[arg-type]
    monkeypatch.setattr(machine_code, "disassembly", lambda compiled: SASS)
    loop = inner_loop(kernel)
    assert (loop.instructions, loop.seldom, loop.products, loop.exponentials, loop.under) == (10, 2, 2, 2, 1)
    assert (loop.barriers, loop.fences, loop.polls, loop.copies) == (1, 0, 1, 0)
    monkeypatch.setattr(machine_code, "disassembly", lambda compiled: SASS.replace("MUFU.EX2", "FADD"))
    monkeypatch.setattr(CompiledKernel, "name", "attend")
    with pytest.raises(CodegenError, match="no loop with products and exponentials"):
        inner_loop(kernel)
