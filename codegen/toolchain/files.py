"""Generated attention kernels as files: Triton source, and cubins where Triton is installed. For dumps and packages."""

from __future__ import annotations

import importlib.util

from sfcompile.codegen.kernels.attend import attend_source
from sfcompile.codegen.kernels.spec import spec_of
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.toolchain.compiler import ARCHITECTURES, compile_attend
from sfcompile.codegen.toolchain.nvshmem_bitcode import slim_library


def kernel_files(
    schedule: Schedule,
    machine_of: tuple[int, ...],
    mask: tuple[str, bool] = ("none", True),
    compile: bool = True,
) -> dict[str, bytes]:
    """The attention kernels of a site, one source (and one cubin) for each architecture, by file name.

    Args:
        machine_of: machine of each rank of the job.
        mask: kind of the site's mask (codegen/engines/launch.py mask_kind).
        compile: make cubins, if Triton is there.

    Raises:
        UnsupportedError: no kernel is generated for this dtype or head size.
        CodegenError: the compiler refuses a kernel.
    """
    if not isinstance(schedule, AttentionSchedule):
        return {}
    members = schedule.groups[0] if schedule.groups else tuple(range(schedule.mesh.num_ranks))
    homes = tuple(machine_of[rank] for rank in members)
    files: dict[str, bytes] = {}
    for arch in ARCHITECTURES:
        spec = spec_of(schedule, arch, homes, mask)
        stem = f"attend-{spec.key}-sm{arch}"
        files[f"{stem}.py"] = attend_source(spec).encode()
        if compile and importlib.util.find_spec("triton") is not None:
            library = None if spec.reach == "peer" else slim_library(arch)
            files[f"{stem}.cubin"] = compile_attend(spec, arch, library).cubin
    return files
