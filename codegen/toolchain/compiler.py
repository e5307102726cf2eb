"""Compiles generated kernels for a GPU that need not be there: PTX, cubin, and what they say about the kernel."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfcompile.codegen.kernels.attend import arguments, attend_source
from sfcompile.codegen.kernels.chunks import ChunkSpec, chunk_arguments, receive_source, release_source, send_source
from sfcompile.codegen.kernels.moves import MoveSpec, collect_source, move_arguments, put_source
from sfcompile.codegen.kernels.spec import KernelSpec
from sfcompile.codegen.kernels.text import entry_name
from sfcompile.codegen.rows.rows import FUSED_OPTIONS, RowProgram
from sfcompile.codegen.toolchain.loader import load_source
from sfcompile.errors import CodegenError

ARCHITECTURES = (80, 90, 100)
_KINDS = {
    "mask_ptr": "*u8", "q_positions_ptr": "*i32", "k_positions_ptr": "*i32", "lse_ptr": "*fp32", "state_ptr": "*fp32",
    "counters_ptr": "*i32", "x_ptr": "*u8",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture.

    Attributes:
        name: "attend", "put", "collect", "send", "receive" or "release".
        arch: 80, 90, 100.
        source, ttgir, ptx: text of the stages. ``cubin``: what a GPU loads; relocatable if ``linked`` is False.
        shared_bytes: shared memory of a program.
        linked: whether NVSHMEM's device code is in it.
        again: compiles it anew with NVSHMEM's calls left open.
    """

    name: str
    arch: int
    source: str
    ttgir: str
    ptx: str
    cubin: bytes
    shared_bytes: int
    linked: bool
    again: Callable[[], Compiled]


@dataclass(frozen=True)
class Resources:
    """What ptxas and the disassembler say of a cubin: per thread, but ``shared`` (bytes of a program)."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def compile_attend(spec: KernelSpec, arch: int, library: Path | None = None) -> Compiled:
    """The attention kernel of a spec.

    Args:
        library: NVSHMEM's device bitcode (nvshmem_bitcode.py). Without it NVSHMEM's functions stay calls in a
            relocatable cubin: nothing to run, but all there is to inspect.

    Raises:
        CodegenError: the compiler refuses.
    """
    kinds = {"out_ptr": f"*{spec.dtype}"} | ({"mask_ptr": "*fp32"} if not spec.mask_is_bool else {})
    return _compile(
        "attend", attend_source(spec), arguments(spec), kinds, arch, spec.warps, spec.stages,
        library, spec.reach != "peer",
    )  # fmt: skip


def compile_move(
    name: str, spec: MoveSpec, arch: int, library: Path | None = None, rows: RowProgram | None = None
) -> Compiled:
    """The kernel "put" (that computes ``rows``) or "collect" of a spec; see :func:`compile_attend`."""
    source = put_source(spec, rows) if name == "put" else collect_source(spec)
    element = {"x_ptr": f"*{spec.dtype}", "out_ptr": f"*{spec.dtype}"}
    element |= {f"s{i}_ptr": f"*{kind}" for i, kind in enumerate(rows.kinds if rows is not None else ())}
    given = move_arguments(name, spec, rows)
    more = None if rows is None else FUSED_OPTIONS
    return _compile(name, source, given, element, arch, 4, 1, library, spec.reach != "peer", more)


def compile_chunks(name: str, spec: ChunkSpec, arch: int, library: Path | None = None) -> Compiled:
    """The kernel "send", "receive" or "release"; see :func:`compile_attend`."""
    source = {"send": send_source, "receive": receive_source, "release": release_source}[name](spec)
    return _compile(name, source, chunk_arguments(name, spec), {}, arch, 4, 1, library, spec.reach != "peer")


def _compile(
    name: str, source: str, given: Sequence[str], kinds: Mapping[str, str], arch: int, warps: int, stages: int,
    library: Path | None, calls: bool, more: Mapping[str, Any] | None = None,
) -> Compiled:  # fmt: skip
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # What Triton calls the default today, said aloud: 3.9 warns if it is not.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    module = load_source(source)
    signature = {entry: _kind(entry, kinds) for entry in given}
    aligned = ("_ptr", "_sb", "_sh", "_sr")
    attrs = {(i,): [["tt.divisibility", 16]] for i, entry in enumerate(given) if entry.endswith(aligned)}
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, **(more or {})}
    if name == "attend":
        options["launch_cooperative_grid"] = True
    if calls and library is not None:
        options["extern_libs"] = {"libnvshmem_device": str(library)}
    elif calls:
        options["ptx_options"] = "-c"
    kernel = getattr(module, entry_name(name, "nvshmem" if calls else "peer"))
    try:
        made = triton.compile(
            ASTSource(kernel, signature=signature, constexprs={}, attrs=attrs),
            target=GPUTarget("cuda", arch, 32),
            options=options,
        )
    except Exception as error:
        raise CodegenError(
            f"kernel {name} does not compile for sm_{arch}: {([repr(error), *str(error).split(chr(10))])[-1].strip()}",
            f"Triton {triton.__version__} or its ptxas refused it",
            f"report it with the source in {module.__file__}",
        ) from error
    asm = made.asm

    def again() -> Compiled:
        return _compile(name, source, given, kinds, arch, warps, stages, None, calls, more)

    return Compiled(
        name, arch, source, asm["ttgir"], asm["ptx"], asm["cubin"], made.metadata.shared, calls and library is not None,
        again,
    )  # fmt: skip


def _kind(entry: str, kinds: Mapping[str, str]) -> str:
    found = kinds.get(entry) or _KINDS.get(entry)
    stride = entry[-3:] in ("_sb", "_sh", "_sr", "_sc")
    return found or ("*i64" if entry.endswith("_ptr") else "i64" if stride else "i32")


# ---------------------------------------------------------------------- inspection


def resources(compiled: Compiled) -> Resources:
    """Registers, stack, spills and shared memory.

    Raises:
        CodegenError: the tools that Triton brings are missing.
    """
    usage = _run(_tool("cuobjdump"), "--dump-resource-usage", compiled.cubin)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage)}
    sass = disassembly(compiled)
    return Resources(
        found.get("REG", 0),
        found.get("STACK", 0),
        len(re.findall(r"\bSTL\b", sass)),
        len(re.findall(r"\bLDL\b", sass)),
        max(compiled.shared_bytes, found.get("SHARED", 0)),
    )


def disassembly(compiled: Compiled) -> str:
    """SASS of the kernel; calls of an unlinked one by name."""
    return _run(_tool("nvdisasm"), "-c", compiled.cubin)


_EVENTS = (
    ("wait", r"CALL\.\S+ \S*nvshmem_signal_wait_until|LDG\.E\.64\.STRONG\.SYS"),
    ("put", r"CALL\.\S+ \S*nvshmemx_putmem_signal_nbi_block"),
    ("release", r"ATOMG?\S*\.EXCH\S*\.STRONG\.SYS|\bREDG?\S*\.STRONG\.SYS"),
    ("copy", r"\bLDGSTS|\bUBLKCP|\bUTMALDG"),
    ("mma", r"\bHGMMA|\bHMMA|\bUTCHMMA|\bUTCQMMA|\bUTCMMA"),
)
"""Instructions of SASS that tell the order of communication and compute: name, pattern."""


def order(compiled: Compiled) -> list[tuple[str, int]]:
    """Waits, puts, releases, asynchronous copies and matrix products as they stand in the code, runs counted.

    NVSHMEM's waits and puts are calls in an unlinked kernel; linking dissolves them.
    """
    found: list[tuple[str, int]] = []
    for line in disassembly(compiled).splitlines():
        for name, pattern in _EVENTS:
            if re.search(pattern, line):
                if found and found[-1][0] == name:
                    found[-1] = (name, found[-1][1] + 1)
                else:
                    found.append((name, 1))
    return found


def hoisted_loads(compiled: Compiled) -> list[str]:
    """Loads of keys or values that stand before their wait in Triton's GPU IR: there must be none.

    A chunk's loads follow its waits inside the loop over chunks; a load between that loop's head and the first wait
    would read what has not arrived.
    """
    lines = compiled.ttgir.splitlines()
    waits = [i for i, line in enumerate(lines) if "nvshmem_signal_wait_until" in line or _is_poll(line)]
    loads = [i for i, line in enumerate(lines) if _is_tile_load(line)]
    inner = [i for i, line in enumerate(lines) if "scf.for" in line and any(i < at < _end(lines, i) for at in loads)]
    if not waits:
        return [f"no wait at all in kernel {compiled.name}"]
    found = []
    for head in inner:
        body = range(head, _end(lines, head))
        found += [lines[i].strip() for i in body if i in waits]
    first = min(waits)
    found += [lines[i].strip() for i in loads if i < first]
    return found


def _is_poll(line: str) -> bool:
    return "tt.atomic_rmw" in line and "add" in line and "acquire" in line and "sys" in line


def _is_tile_load(line: str) -> bool:
    loads = "ttg.async_copy_global_to_local" in line or "tt.load" in line
    return loads and re.search(r"tensor<\d+x\d+x", line) is not None


def _end(lines: Sequence[str], head: int) -> int:
    """The line that closes a region which a line opens."""
    indent = len(lines[head]) - len(lines[head].lstrip())
    for i in range(head + 1, len(lines)):
        if lines[i].strip().startswith("}") and len(lines[i]) - len(lines[i].lstrip()) == indent:
            return i
    return len(lines)


def _tool(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise CodegenError(
            f"{name} is missing from Triton's folder {path.parent}",
            "cubins are inspected with the tools in Triton's wheel",
            "reinstall triton: pip install --force-reinstall triton",
        )
    return str(path)


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, option, str(path)], check=True, capture_output=True, text=True).stdout
