"""Where a rank's kernels run, and how they are loaded and launched there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfcompile.codegen.kernels.text import entry_name
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.toolchain.device_state import require_device_state
from sfcompile.codegen.toolchain.gpu_results import result_of
from sfcompile.codegen.toolchain.loader import link_options, load_source
from sfcompile.codegen.toolchain.nvshmem_bitcode import slim_library
from sfcompile.options import AS_IT_IS

MOVE_PROGRAMS = 32
"""Programs of a kernel that only moves: few, for it runs beside the products that make the next tensor."""
INTERPRETED_PROGRAMS = 2
"""Programs of any kernel in Triton's interpreter, which runs one after the other."""


@dataclass(frozen=True)
class KernelTarget:
    """A GPU, or Triton's interpreter.

    Attributes:
        device: "cpu" is the interpreter.
        library: NVSHMEM's device code (codegen/toolchain/nvshmem_bitcode.py), for ranks on several machines.
        calls: stand-ins for NVSHMEM in the interpreter.
        programs: programs of a launch that attend; 0: as many as are on the GPU together.
    """

    device: torch.device
    library: Path | None = None
    calls: Mapping[str, Callable[..., object]] | None = None
    programs: int = 0

    @staticmethod
    def of(device: torch.device, machine_of: Sequence[int]) -> KernelTarget:
        """A GPU, with NVSHMEM's device code if ranks are on several machines.

        Raises:
            CodegenError: NVSHMEM's device library is needed and missing.
        """
        target = KernelTarget(device)
        several = len(set(machine_of)) > 1
        return KernelTarget(device, slim_library(target.architecture)) if several else target

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in the interpreter."""
        return self.device.type == "cpu"

    @property
    def architecture(self) -> int:
        """80, 90, 100, ... of a GPU; 0 for the interpreter."""
        if self.device.type != "cuda":
            return 0
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    def measured_tile(self, schedule: AttentionSchedule, mask: tuple[str, bool]) -> Mapping[str, Any]:
        """Entries of KernelSpec that gpu-check found fastest on this GPU, for attentions like those that it ran; {}: no
        such."""
        site = schedule.site
        plain = mask[0] == "none" and not site.causal and site.heads == site.kv_heads and site.wire == AS_IT_IS
        plain &= site.dtype in (torch.bfloat16, torch.float16) and site.head_dim == site.v_head_dim
        if self.device.type != "cuda" or not plain:
            return {}
        result = result_of(torch.cuda.get_device_name(self.device))
        tile = {} if result is None else result.tiles.get(site.head_dim, {})
        return {} if tile.get("fetch") == "tma" else tile  # that is taken anyway, where chunks are long enough

    def load(self, source: str, name: str, reach: str) -> Any:
        """The kernel ``name`` of a generated source."""
        calls = None if reach == "peer" else self.calls
        return getattr(load_source(source, self.interpreted, calls), entry_name(name, reach))

    def options(self, reach: str, **more: Any) -> dict[str, Any]:
        """Triton's options of a launch; none in the interpreter."""
        if self.interpreted:
            return {}
        if reach != "peer":
            require_device_state()
        return more | link_options(self.library, reach)

    def with_scratch(self, launch: Callable[[], object]) -> None:
        """Make a launch whose kernel may need memory of its own (descriptors of tensor copies): Triton gets it from
        torch's allocator, in the order of the stream. What the caller has told Triton stays as it was."""

        def inside() -> None:
            if not self.interpreted:
                import triton

                triton.set_allocator(
                    lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=self.device)
                )
            launch()

        copy_context().run(inside)

    def move(self, kernel: Any, values: Sequence[Any], reach: str, **more: Any) -> None:
        """Launch a kernel that only moves."""
        programs = INTERPRETED_PROGRAMS if self.interpreted else MOVE_PROGRAMS
        kernel[(programs,)](*values, **self.options(reach, **more))
