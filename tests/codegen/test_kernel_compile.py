"""Kernels compiled for GPUs that are not here: what the machine code must look like."""

from __future__ import annotations

import re

import pytest

from sfcompile.codegen.kernel_chunks import ChunkSpec
from sfcompile.codegen.kernel_compile import (
    ARCHITECTURES,
    Compiled,
    compile_attend,
    compile_chunks,
    compile_move,
    disassembly,
    hoisted_loads,
    order,
    resources,
)
from sfcompile.codegen.kernel_moves import MoveSpec
from sfcompile.codegen.kernel_spec import KernelSpec, tiles_for
from sfcompile.codegen.nvshmem_bitcode import slim_library

MATRIX = {80: r"\bHMMA", 90: r"\bHGMMA", 100: r"\bUTC\w*MMA"}


def spec_for(arch: int, head_dim: int, reach: str, dtype: str = "bf16", **changes: object) -> KernelSpec:
    tiles = tiles_for(arch, dtype, head_dim, head_dim, hard=reach != "peer" or bool(changes))
    return KernelSpec(
        dtype, head_dim, head_dim, head_dim**-0.5, reach=reach, forwards=True, pushes=True, **tiles
    ).with_(**changes)


def made(arch: int, head_dim: int, reach: str, **changes: object) -> Compiled:
    library = None if reach == "peer" else slim_library(arch)
    return compile_attend(spec_for(arch, head_dim, reach, **changes), arch, library)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("reach", ["peer", "nvshmem", "mixed"])
def test_tensor_cores_asynchronous_copies_no_spills_no_load_before_its_wait(
    arch: int, head_dim: int, reach: str
) -> None:
    kernel = made(arch, head_dim, reach)
    found = resources(kernel)
    assert found.spill_stores == 0 and found.spill_loads == 0
    assert found.stack == 0 or reach != "peer"
    assert found.shared <= {80: 163, 90: 227, 100: 227}[arch] * 1024
    assert hoisted_loads(kernel) == []
    code = disassembly(kernel)
    assert re.search(MATRIX[arch], code)
    assert len(re.findall(r"\bLDGSTS\S*128", code)) >= 4  # tiles arrive asynchronously, 16 bytes a thread
    assert not re.search(r"ld\.global(\.\w+)*\.b16\b", kernel.ptx)  # and never element by element
    assert "cp.async" in kernel.ptx
    assert "CCTL.IVALL" in code and re.search(r"EXCH\S*\.STRONG\.SYS", code)  # acquire and release, system scope


def test_debug_builds_masks_and_grouped_heads_fit_too() -> None:
    for arch in ARCHITECTURES:
        for changes in ({"bounded": True}, {"causal": True, "group": 4}, {"mask": "key"}):
            assert resources(made(arch, 128, "peer", **changes)).spill_stores == 0, (arch, changes)


def test_order_of_waits_puts_and_matrix_products_is_the_schedules() -> None:
    """Without NVSHMEM's code its calls stay visible: wait for K and V, copy, multiply; then put the output."""
    kernel = compile_attend(spec_for(90, 64, "nvshmem"), 90)
    assert not kernel.linked
    names = [name for name, _ in order(kernel)]
    multiplied = names.index("mma")
    assert "wait" in names[:multiplied]
    waits = [i for i, name in enumerate(names[:multiplied]) if name == "wait"]
    assert names[waits[-1] :].index("copy") < names[waits[-1] :].index("mma")
    assert "put" in names[multiplied:]
    # The copy programs come first: they pass on what arrived.
    assert names.index("put") < multiplied and names[0] == "wait"


def test_a_wait_inside_the_loop_over_blocks_is_found() -> None:
    """Mutant: the waits move into the loop that Triton pipelines, which then prefetches above them."""
    kernel = made(90, 64, "peer")
    lines = kernel.ttgir.splitlines()
    poll = next(line for line in lines if "tt.atomic_rmw" in line and "acquire" in line)
    loop = max(i for i, line in enumerate(lines) if "scf.for" in line)
    hoisted = [*lines[: loop + 1], poll, *lines[loop + 1 :]]
    broken = Compiled(**{**vars(kernel), "ttgir": "\n".join(hoisted)})
    assert hoisted_loads(broken) != []
    without = "\n".join(line for line in lines if not ("tt.atomic_rmw" in line and "acquire" in line))
    assert hoisted_loads(Compiled(**{**vars(kernel), "ttgir": without})) == ["no wait at all in kernel attend"]


@pytest.mark.parametrize("reach", ["peer", "mixed"])
def test_small_kernels(reach: str) -> None:
    library = None if reach == "peer" else slim_library(90)
    kernels = [compile_move(name, MoveSpec("bf16", 128, reach), 90, library) for name in ("put", "collect")]
    kernels += [compile_chunks(name, ChunkSpec(reach), 90, library) for name in ("send", "receive", "release")]
    for kernel in kernels:
        assert resources(kernel).spill_stores == 0 and kernel.linked == (reach != "peer")
    put = kernels[0].ptx
    assert re.search(r"st\.global(\.\w+)*\.v4\.b32", put) and not re.search(r"ld\.global(\.\w+)*\.b16\b", put)
