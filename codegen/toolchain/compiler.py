"""Compiles generated kernels for a GPU that need not be there: TTGIR, PTX and cubin (machine_code.py reads them)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfcompile.codegen.kernels.attend import attend_source
from sfcompile.codegen.kernels.chunks import ChunkSpec, chunk_arguments, receive_source, release_source, send_source
from sfcompile.codegen.kernels.moves import MoveSpec, collect_source, move_arguments, put_source
from sfcompile.codegen.kernels.spec import KernelSpec, attend_arguments
from sfcompile.codegen.kernels.text import entry_name
from sfcompile.codegen.rows.rows import FUSED_OPTIONS, RowProgram
from sfcompile.codegen.toolchain.loader import link_options, load_source
from sfcompile.errors import CodegenError

ARCHITECTURES = (80, 90, 100)
_TYPES = {
    "mask_ptr": "*u8", "q_positions_ptr": "*i32", "k_positions_ptr": "*i32", "spans_ptr": "*i32", "lse_ptr": "*fp32",
    "state_ptr": "*fp32", "counters_ptr": "*i32", "x_ptr": "*u8",
}  # fmt: skip
MOVE_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1}
"""Triton's options of the kernels that move."""


@dataclass(frozen=True)
class KernelSource:
    """A kernel's text, and what a compiler must know beside it.

    Attributes:
        name: "attend", "put", "collect", "send", "receive" or "release".
        arguments: the kernel's, in order; ``types``: Triton's types of those whose name does not say it.
        reach: "peer" calls nothing of NVSHMEM's.
        options: Triton's.
    """

    name: str
    text: str
    arguments: tuple[str, ...]
    reach: str
    types: Mapping[str, str]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one architecture.

    Attributes:
        arch: 80, 90, 100.
        ttgir, ptx: text of the stages. ``cubin``: what a GPU loads; relocatable if ``linked`` is False.
        shared_bytes: shared memory of a program.
        linked: whether NVSHMEM's device code is in it.
    """

    source: KernelSource
    arch: int
    ttgir: str
    ptx: str
    cubin: bytes
    shared_bytes: int
    linked: bool

    @property
    def name(self) -> str:
        """The function's name in source and PTX, which a launch looks up."""
        return self.source.name

    def unlinked(self) -> CompiledKernel:
        """The same with NVSHMEM's calls left open."""
        return compile_source(self.source, self.arch) if self.linked else self


def compile_attend(spec: KernelSpec, arch: int, library: Path | None = None) -> CompiledKernel:
    """The attention kernel of a spec; see :func:`compile_source`."""
    types = {"out_ptr": f"*{spec.dtype}"} | ({"mask_ptr": "*fp32"} if not spec.mask_is_bool else {})
    options = {"num_warps": spec.warps, "num_stages": spec.stages, "launch_cooperative_grid": True}
    text, names = attend_source(spec), attend_arguments(spec)
    return compile_source(KernelSource("attend", text, names, spec.reach, types, options), arch, library)


def compile_move(
    name: str, spec: MoveSpec, arch: int, library: Path | None = None, rows: RowProgram | None = None
) -> CompiledKernel:
    """The kernel "put" (that computes ``rows``) or "collect" of a spec; see :func:`compile_source`."""
    text = put_source(spec, rows) if name == "put" else collect_source(spec)
    types = {"x_ptr": f"*{spec.dtype}", "out_ptr": f"*{spec.dtype}"}
    types |= {f"s{i}_ptr": f"*{kind}" for i, kind in enumerate(rows.kinds if rows is not None else ())}
    options = MOVE_OPTIONS if rows is None else MOVE_OPTIONS | FUSED_OPTIONS
    names = move_arguments(name, rows)
    return compile_source(KernelSource(name, text, names, spec.reach, types, options), arch, library)


def compile_chunks(name: str, spec: ChunkSpec, arch: int, library: Path | None = None) -> CompiledKernel:
    """The kernel "send", "receive" or "release"; see :func:`compile_source`."""
    text = {"send": send_source, "receive": receive_source, "release": release_source}[name](spec)
    source = KernelSource(name, text, chunk_arguments(name), spec.reach, {}, MOVE_OPTIONS)
    return compile_source(source, arch, library)


def compile_source(source: KernelSource, arch: int, library: Path | None = None) -> CompiledKernel:
    """A kernel compiled for an architecture.

    Args:
        library: NVSHMEM's device bitcode (nvshmem_bitcode.py). Without it NVSHMEM's functions stay calls in a
            relocatable cubin: nothing to run, but all there is to inspect.

    Raises:
        CodegenError: the compiler refuses.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # What Triton calls the default today, said aloud: 3.9 warns if it is not.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    module = load_source(source.text)
    signature = {name: _type_of(name, source.types) for name in source.arguments}
    aligned = ("_ptr", "_sb", "_sh", "_sr")
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(source.arguments) if name.endswith(aligned)}
    options = dict(source.options) | link_options(library, source.reach)
    if source.reach != "peer" and library is None:
        options["ptx_options"] = "-c"
    kernel = getattr(module, entry_name(source.name, source.reach))
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource  # noqa: F811
    try:
        stages = triton.compile(
            ASTSource(kernel, signature=signature, constexprs={}, attrs=attrs),
            target=GPUTarget("cuda", arch, 32),
            options=options,
        )
    except Exception as error:
        last_line = [repr(error), *str(error).split("\n")][-1].strip()
        raise CodegenError(
            f"kernel {source.name} does not compile for sm_{arch}: {last_line}",
            f"Triton {triton.__version__} or its ptxas refused it",
            f"report it with the source in {module.__file__}",
        ) from error
    asm, shared = stages.asm, stages.metadata.shared
    linked = source.reach != "peer" and library is not None
    return CompiledKernel(source, arch, asm["ttgir"], asm["ptx"], asm["cubin"], shared, linked)


def _type_of(name: str, types: Mapping[str, str]) -> str:
    """Triton's type of an argument: tables are int64, strides too, other scalars int32."""
    stride = name.endswith(("_sb", "_sh", "_sr", "_sc"))
    plain = "*i64" if name.endswith("_ptr") else "i64" if stride else "i32"
    return types.get(name) or _TYPES.get(name) or plain
