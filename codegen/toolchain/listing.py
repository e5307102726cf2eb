"""Every kernel of a schedule, compiled for GPUs that need not be there, as files and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sfcompile.codegen.kernels.chunks import ChunkSpec
from sfcompile.codegen.kernels.moves import MoveSpec
from sfcompile.codegen.kernels.reach import reach_of
from sfcompile.codegen.kernels.spec import KernelSpec, schedule_reach, spec_of
from sfcompile.codegen.kernels.tables import make_tables
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.toolchain.compiler import CompiledKernel, compile_attend, compile_chunks, compile_move
from sfcompile.codegen.toolchain.machine_code import Resources, hoisted_loads, order, resources
from sfcompile.codegen.toolchain.nvshmem_bitcode import slim_library
from sfcompile.errors import CodegenError

_LOOKED_AT = 8
"""Ranks whose tables are looked at for differences in the text: whether softmax state is carried."""


@dataclass(frozen=True)
class KernelRow:
    """One kernel for one architecture: what the table says of it.

    Attributes:
        order: waits, puts, releases, copies and matrix products in the order of the machine code, runs counted.
        linked: NVSHMEM's device code is in the cubin; False: its calls are open (nothing to load, all there is to see).
    """

    kernel: str
    arch: int
    resources: Resources
    order: tuple[tuple[str, int], ...]
    linked: bool
    cubin_bytes: int
    files: tuple[str, ...]


HEAD = f"{'kernel':<22}{'arch':<8}{'regs':>5}{'stack':>6}{'spills':>7}{'shared':>8}{'cubin':>9}  order in the code"


def line(row: KernelRow) -> str:
    """A row of the table."""
    shown = " ".join(name if count == 1 else f"{name}x{count}" for name, count in row.order)
    used = row.resources
    return (
        f"{row.kernel:<22}sm_{row.arch:<5}{used.registers:>5}{used.stack:>6}{used.spill_stores:>7}{used.shared:>8}"
        f"{row.cubin_bytes:>9}  {shown or '-'}{'' if row.linked else '  (NVSHMEM not linked)'}"
    )


def compiled_kernels(
    schedule: Schedule, arch: int, machine_of: Sequence[int], link: bool = True
) -> Iterator[tuple[str, CompiledKernel]]:
    """``(name, kernel)`` of everything that a schedule's ranks launch on an architecture.

    Args:
        machine_of: machine of each rank of the mesh; NVSHMEM is used between machines.
        link: put NVSHMEM's device code into the cubins that call it.

    Raises:
        CodegenError: the compiler refuses, or NVSHMEM's device library is needed and missing.
        UnsupportedError: no kernel is generated for such a site.
    """
    machines = tuple(machine_of)
    reach = reach_of(machines)
    library = slim_library(arch) if link and reach != "peer" else None
    if isinstance(schedule, AttentionSchedule):
        site = schedule.site
        spec = spec_of(schedule, arch, machines, ("full" if site.mask else "none", True))
        ranks = range(min(schedule.mesh.num_ranks, _LOOKED_AT))
        for carry in sorted({make_tables(schedule, rank, spec.block_m, machines).carry for rank in ranks}):
            name = "attend" if carry else "attend-in-one"
            yield name, compile_attend(spec.with_(carry=carry), arch, library)
        alike = site.written("q") == site.written("k")
        for name in ("qk", "v") if alike else ("q", "k", "v"):
            yield f"put-{name}", compile_move("put", _move_spec(spec, schedule, machines, name[0]), arch, library)
        yield "collect", compile_move("collect", _move_spec(spec, schedule, machines, "o"), arch, library)
    else:
        for name in ("send", "receive"):
            yield name, compile_chunks(name, ChunkSpec(reach), arch, library)
    yield "release", compile_chunks("release", ChunkSpec(reach), arch, library)


def _move_spec(spec: KernelSpec, schedule: AttentionSchedule, machines: tuple[int, ...], tensor: str) -> MoveSpec:
    reach = schedule_reach(schedule, machines)
    return MoveSpec(spec.dtype, schedule.width(tensor), reach, written=schedule.site.written(tensor))


def write_kernels(
    schedule: Schedule, machine_of: Sequence[int], archs: Sequence[int], folder: Path, link: bool = True
) -> list[KernelRow]:
    """Write source, PTX, TTGIR and cubin of every kernel, the schedule as text and ``table.txt``/``table.json``.

    Raises:
        CodegenError: see :func:`compiled_kernels`; a file cannot be written; a load of arriving data stands before
            its wait.
        UnsupportedError: no kernel is generated for such a site.
    """
    rows = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "schedule.txt").write_text(f"{schedule}\n", encoding="utf-8")
        for arch in archs:
            for name, kernel in compiled_kernels(schedule, arch, machine_of, link=link):
                early = hoisted_loads(kernel) if kernel.name == "attend" else []
                if early and reach_waits(schedule):
                    raise CodegenError(
                        f"kernel {name} for sm_{arch} loads arriving data before it waits for it: {early[0]}",
                        "it would read what has not arrived",
                        "report it with the Triton version",
                    )
                # Linking dissolves NVSHMEM's calls into the code around them: look at them before.
                rows.append(_write(folder, name, kernel, order(kernel.unlinked())))
        (folder / "table.txt").write_text("\n".join([HEAD, *map(line, rows)]) + "\n", encoding="utf-8")
        (folder / "table.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CodegenError(
            f"kernels cannot be written to {folder}: {error}", "", "name a folder with room that can be written"
        ) from error
    return rows


def reach_waits(schedule: Schedule) -> bool:
    """Whether anything arrives while a rank attends."""
    return any(arrival.tensor in ("q", "k", "v") for arrival in schedule.origin.arrivals)


def _write(folder: Path, name: str, kernel: CompiledKernel, in_order: list[tuple[str, int]]) -> KernelRow:
    files = {
        f"{name}.py": kernel.source.text.encode(),
        f"{name}.sm_{kernel.arch}.ttgir": kernel.ttgir.encode(),
        f"{name}.sm_{kernel.arch}.ptx": kernel.ptx.encode(),
        f"{name}.sm_{kernel.arch}.cubin": kernel.cubin,
    }
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return KernelRow(
        name,
        kernel.arch,
        resources(kernel),
        tuple(in_order),
        kernel.linked or kernel.source.reach == "peer",
        len(kernel.cubin),
        tuple(files),
    )
