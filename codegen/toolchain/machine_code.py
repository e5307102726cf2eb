"""Reads compiled kernels back: registers and spills, the order of waits and products, loads before their wait."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sfcompile.codegen.toolchain.compiler import CompiledKernel
from sfcompile.errors import CodegenError


@dataclass(frozen=True)
class Resources:
    """What ptxas and the disassembler say of a cubin: per thread, but ``shared`` (bytes of a program)."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def resources(compiled: CompiledKernel) -> Resources:
    """Registers, stack, spills and shared memory.

    Raises:
        CodegenError: the tools that Triton brings are missing.
    """
    usage = _run(_tool("cuobjdump"), "--dump-resource-usage", compiled.cubin)
    counts = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage)}
    sass = disassembly(compiled)
    return Resources(
        counts.get("REG", 0),
        counts.get("STACK", 0),
        len(re.findall(r"\bSTL\b", sass)),
        len(re.findall(r"\bLDL\b", sass)),
        max(compiled.shared_bytes, counts.get("SHARED", 0)),
    )


def disassembly(compiled: CompiledKernel) -> str:
    """SASS of the kernel; calls of an unlinked one by name."""
    return _run(_tool("nvdisasm"), "-c", compiled.cubin)


_EVENTS = (
    ("wait", r"LDG\.E\.64\.STRONG\.SYS"),
    ("put", r"CALL\.\S+ \S*nvshmemx_putmem_signal_nbi_\w+"),
    ("release", r"ATOMG?\S*\.EXCH\S*\.STRONG\.SYS|\bREDG?\S*\.STRONG\.SYS"),
    ("copy", r"\bLDGSTS|\bUBLKCP|\bUTMALDG"),
    ("mma", r"\bHGMMA|\bHMMA|\bUTCHMMA|\bUTCQMMA|\bUTCMMA"),
)
"""Instructions of SASS that tell the order of communication and compute: name, pattern."""


def order(compiled: CompiledKernel) -> list[tuple[str, int]]:
    """Waits, puts, releases, asynchronous copies and matrix products as they stand in the code, runs counted.

    NVSHMEM's puts are calls in an unlinked kernel; linking dissolves them.
    """
    events: list[tuple[str, int]] = []
    for line in disassembly(compiled).splitlines():
        for name, pattern in _EVENTS:
            if re.search(pattern, line):
                if events and events[-1][0] == name:
                    events[-1] = (name, events[-1][1] + 1)
                else:
                    events.append((name, 1))
    return events


@dataclass(frozen=True)
class Loop:
    """The innermost loop of a kernel that multiplies and exponentiates: instructions of a warp in one step, a block of
    keys. Counts, not times.

    Attributes:
        instructions: issued in every step; ``seldom``: jumped over in most (a chunk's last block, its first).
        products, exponentials: of the tensor cores, of the special functions.
        barriers: CTA-wide or of some warps; ``fences``; ``polls`` of barriers in shared memory; ``copies`` begun.
        under: exponentials between a wgmma that is begun and the wait for it: softmax under a product in flight.
    """

    instructions: int
    seldom: int
    products: int
    exponentials: int
    barriers: int
    fences: int
    polls: int
    copies: int
    under: int


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?PT?\d*\s+)?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_PRODUCT = r"HGMMA|HMMA|UTC\w*MMA"


def inner_loop(compiled: CompiledKernel) -> Loop:
    """The loop over blocks of keys, read from SASS.

    Raises:
        CodegenError: there is none.
    """
    code, labels = _instructions(disassembly(compiled))
    loops = []
    for at, (name, rest) in enumerate(code):
        target = re.search(r"\.L_x_\d+", rest)
        if name == "BRA" and target and labels.get(target[0], at + 1) <= at:
            body = range(labels[target[0]], at + 1)
            kinds = {kind for i in body for kind in (_PRODUCT, "MUFU") if re.match(kind, code[i][0])}
            loops += [body] if len(kinds) == 2 else []
    if not loops:
        raise CodegenError(
            f"kernel {compiled.name} has no loop with products and exponentials",
            "its machine code is not what this reads",
            "report it with the version of Triton",
        )
    body = min(loops, key=len)
    rare = _seldom(code, labels, body)
    issued = [code[i] for i in body if i not in rare and code[i][0] != "NOP"]
    names = [name for name, _ in issued]

    def count(pattern: str) -> int:
        return sum(re.match(pattern, name) is not None for name in names)

    return Loop(
        len(issued), len(rare), count(_PRODUCT), count(r"MUFU\.EX2"), count(r"BAR\.|WARPSYNC"),
        count(r"FENCE|MEMBAR"), count("SYNCS.PHASECHK"), count("LDGSTS|UTMALDG|UBLKCP"), _under(issued),
    )  # fmt: skip


def _instructions(sass: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Name and operands of every instruction, and which one follows each label."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label, instruction = _LABEL.match(line.strip()), _INSTRUCTION.search(line)
        if label:
            labels[label[1]] = len(code)
        elif instruction:
            code.append((instruction[1], instruction[2]))
    return code, labels


def _seldom(code: list[tuple[str, str]], labels: dict[str, int], body: range) -> set[int]:
    """What branches of a loop jump over, where it neither multiplies nor exponentiates nor waits."""
    rare: set[int] = set()
    for i in body:
        target = re.search(r"\.L_x_\d+", code[i][1]) if code[i][0] == "BRA" else None
        over = range(i + 1, labels[target[0]]) if target and labels[target[0]] in body else range(0)
        if not any(re.match(f"{_PRODUCT}|MUFU|SYNCS", code[j][0]) for j in over):
            rare |= set(over)
    return rare


def _under(issued: list[tuple[str, str]]) -> int:
    """Exponentials that stand between a wgmma and the wait for all of them; a loop's begin follows its end."""
    begun, under = False, 0
    for name, rest in [*issued, *issued]:
        if name.startswith("HGMMA"):
            begun = True
        elif name == "WARPGROUP.DEPBAR.LE" and re.search(r", 0x0\b", rest):
            begun = False
        elif name == "MUFU.EX2":
            under += begun
    return under // 2


def hoisted_loads(compiled: CompiledKernel) -> list[str]:
    """Loads of keys or values that stand before their wait in Triton's GPU IR: there must be none.

    A chunk's loads follow its waits inside the loop over chunks; a load between that loop's head and the first wait
    would read what has not arrived. Tensor copies read by another proxy: between the last wait and a copy stands a
    proxy fence.
    """
    lines = compiled.ttgir.splitlines()
    waits = [i for i, line in enumerate(lines) if _is_poll(line)]
    loads = [i for i, line in enumerate(lines) if _is_tile_load(line)]
    inner = [i for i, line in enumerate(lines) if "scf.for" in line and any(i < at < _end(lines, i) for at in loads)]
    if not waits:
        return [f"no wait at all in kernel {compiled.name}"]
    early = []
    for head in inner:
        body = range(head, _end(lines, head))
        early += [lines[i].strip() for i in body if i in waits]
    for i in (i for i, line in enumerate(lines) if "async_tma_copy_global_to_local" in line):
        wait = max((at for at in waits if at < i), default=i)
        early += [] if any("fence.proxy.async.global" in line for line in lines[wait:i]) else [lines[i].strip()]
    first = min(waits)
    early += [lines[i].strip() for i in loads if i < first]
    return early


def _is_poll(line: str) -> bool:
    return "tt.atomic_rmw" in line and "add" in line and "acquire" in line and "sys" in line


def _is_tile_load(line: str) -> bool:
    loads = "ttg.async_copy_global_to_local" in line or "tt.load" in line
    return loads and re.search(r"tensor<\d+x\d+x", line) is not None


def _end(lines: list[str], head: int) -> int:
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
