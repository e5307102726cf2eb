"""Kernels compiled for GPUs that are not here: what the machine code must look like."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest
import torch
from row_forms import forms, traced

from sfcompile.codegen.kernels.chunks import ChunkSpec
from sfcompile.codegen.kernels.moves import MoveSpec
from sfcompile.codegen.kernels.spec import KernelSpec, tiles_for
from sfcompile.codegen.rows.row_ops import compile_rows
from sfcompile.codegen.toolchain.compiler import (
    ARCHITECTURES,
    CompiledKernel,
    compile_attend,
    compile_chunks,
    compile_move,
)
from sfcompile.codegen.toolchain.machine_code import disassembly, hoisted_loads, resources
from sfcompile.codegen.toolchain.nvshmem_bitcode import slim_library, wheel
from sfcompile.options import Wire

FP8 = Wire(*["fp8"] * 4)
MATRIX = {80: r"\bHMMA", 90: r"\bHGMMA", 100: r"\bUTC\w*MMA"}


# sm_90 has most of its own: its tensor cores read shared memory and are waited for by hand (wgmma), and leave few
# registers. What fits and keeps its order there is seldom lost on the other two, which `make test-all` compiles.
EVERY_ARCH = [arch if arch == 90 else pytest.param(arch, marks=pytest.mark.thorough) for arch in ARCHITECTURES]


# Tiles were chosen with Triton 3.9. Older ones spill 3 to 5 words of the mask's kernel, which costs time only.
FEW = 0 if tuple(int(number) for number in version("triton").split(".")[:2]) >= (3, 9) else 8


def spec_for(arch: int, head_dim: int, reach: str, dtype: str = "bf16", **changes: object) -> KernelSpec:
    hard = reach != "peer" or bool(changes)
    tiles = tiles_for(arch, dtype, head_dim, head_dim, hard=hard, coded="wire" in changes)
    return KernelSpec(
        dtype, head_dim, head_dim, head_dim**-0.5, reach=reach, forwards=True, pushes=True, **tiles
    ).with_(**changes)


def compiled(arch: int, head_dim: int, reach: str, **changes: object) -> CompiledKernel:
    library = None if reach == "peer" else slim_library(arch)
    return compile_attend(spec_for(arch, head_dim, reach, **changes), arch, library)  # type: ignore[arg-type]


def spills(kernel: CompiledKernel) -> int:
    """How many stores and loads the registers' lack costs.

    What is linked with NVSHMEM is held to none with the release that tiles were chosen with. Newer ones, which torch's
    CUDA builds need from 2.15 on, have longer device code: 3.7.2's takes 98 to 164 stores. That costs time only;
    whether such kernels or the library's compute an attention is timed when a graph is compiled.
    """
    used, installed = resources(kernel), wheel()
    if kernel.linked and installed is not None and installed[1] != "3.4.5":
        return 0
    return used.spill_stores + used.spill_loads


def own_text(kernel: CompiledKernel) -> str:
    """PTX without NVSHMEM's device code, which may load as it likes: 3.7.2 reads the masks of IBGDA's queues, of two
    bytes each."""
    return kernel.unlinked().ptx


# `make test` compiles every reach and every head size once.
CELLS = [
    pytest.param(
        reach, head_dim, arch,
        marks=[] if arch == 90 and (head_dim == 64) == (reach == "nvshmem") else pytest.mark.thorough,
    )
    for reach in ("peer", "nvshmem", "mixed") for head_dim in (64, 128) for arch in ARCHITECTURES
]  # fmt: skip


@pytest.mark.parametrize(("reach", "head_dim", "arch"), CELLS)
def test_tensor_cores_asynchronous_copies_no_spills_no_load_before_its_wait(
    arch: int, head_dim: int, reach: str
) -> None:
    kernel = compiled(arch, head_dim, reach)
    used = resources(kernel)
    assert spills(kernel) == 0
    assert used.stack == 0 or reach != "peer"
    assert used.shared <= {80: 163, 90: 227, 100: 227}[arch] * 1024
    assert hoisted_loads(kernel) == []
    code = disassembly(kernel)
    assert re.search(MATRIX[arch], code)
    assert len(re.findall(r"\bLDGSTS\S*128", code)) >= 4  # tiles arrive asynchronously, 16 bytes a thread
    assert not re.search(r"ld\.global(\.\w+)*\.b16\b", own_text(kernel))  # and never element by element
    assert "cp.async" in own_text(kernel)
    assert "CCTL.IVALL" in code  # acquire at system scope, whatever the reach; NVSHMEM's own wait has none
    assert reach == "nvshmem" or re.search(r"EXCH\S*\.STRONG\.SYS", code)


@pytest.mark.parametrize("arch", EVERY_ARCH)
def test_masks_and_grouped_heads_fit_too(arch: int) -> None:
    for changes in ({"causal": True, "group": 4}, {"mask": "key"}):
        assert resources(compiled(arch, 128, "peer", **changes)).spill_stores <= FEW, changes


@pytest.mark.thorough  # tests/codegen/kernels/test_codecs.py has the arithmetic, the masks above the registers
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_wires_fit_every_architecture(arch: int) -> None:
    """fp8 without a GPU's own conversions: sm_80 has none. No load of a chunk, or of its factors, before its wait."""
    for size, changes in ((64, {"wire": FP8}), (128, {"wire": FP8._replace(o="same"), "dtype": "fp16"})):
        kernel = compiled(arch, size, "peer", **changes)
        assert resources(kernel).spill_stores == 0 and hoisted_loads(kernel) == []
        assert not re.search(r"ld\.global(\.\w+)*\.b8\b", kernel.ptx), changes
    for spec in (MoveSpec("bf16", 128, written="fp8"), MoveSpec("fp32", 64, written="bf16")):
        for name in ("put", "collect"):
            small = compile_move(name, spec, arch)
            assert resources(small).spill_stores == 0
            assert not re.search(r"ld\.global(\.\w+)*\.b(8|16)\b", small.ptx)
            assert not re.search(r"st\.global(\.\w+)*\.b(8|16)\b", small.ptx)


@pytest.mark.parametrize("reach", ["peer", pytest.param("mixed", marks=pytest.mark.thorough)])
def test_small_kernels(reach: str) -> None:
    library = None if reach == "peer" else slim_library(90)
    kernels = [compile_move(name, MoveSpec("bf16", 128, reach), 90, library) for name in ("put", "collect")]
    kernels += [compile_chunks(name, ChunkSpec(reach), 90, library) for name in ("send", "receive", "release")]
    for kernel in kernels:
        assert spills(kernel) == 0 and kernel.linked == (reach != "peer")
    assert kernels[0].unlinked().linked is False and (reach == "mixed" or kernels[0].unlinked() is kernels[0])
    put = own_text(kernels[0])
    assert re.search(r"st\.global(\.\w+)*\.v4\.b32", put) and not re.search(r"ld\.global(\.\w+)*\.b16\b", put)


@pytest.mark.parametrize("arch", EVERY_ARCH)
@pytest.mark.parametrize("width", [pytest.param(64, marks=pytest.mark.thorough), 128])
def test_puts_that_compute_load_wide_and_do_not_spill(arch: int, width: int) -> None:
    """Norm and RoPE of a joint attention, over halves, and written into columns: 16 bytes a thread, no spills."""
    for name in ("joint", "halves", "written", "layer norm, some tokens"):
        gm, root = traced(*forms(torch.bfloat16, width)[name])
        rows, _ = compile_rows(root, frozenset(node for node in gm.graph.nodes if node.op == "call_function"))
        kernel = compile_move("put", MoveSpec("bf16", width), arch, rows=rows)
        used = resources(kernel)
        assert (used.spill_stores, used.spill_loads, used.stack) == (0, 0, 0), (name, used)
        assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", kernel.ptx)
        assert re.search(r"st\.global(\.\w+)*\.v4\.b32", kernel.ptx)
        assert not re.search(r"ld\.global(\.\w+)*\.b16\b", kernel.ptx), name  # nothing element by element


def test_puts_that_compute_link_nvshmem() -> None:
    gm, root = traced(*forms(torch.bfloat16, 128)["joint"])
    rows, _ = compile_rows(root, frozenset(node for node in gm.graph.nodes if node.op == "call_function"))
    kernel = compile_move("put", MoveSpec("bf16", 128, "mixed"), 90, slim_library(90), rows)
    assert kernel.linked and spills(kernel) == 0
