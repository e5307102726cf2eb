"""All ranks of a schedule in one launch on one device: the same text, tables, puts and waits, without several GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sfcompile.codegen.kernel_attend import VIRTUAL_ROW, arguments, attend_source
from sfcompile.codegen.kernel_launch import AttendKernel, HeapView
from sfcompile.codegen.kernel_loader import load_source
from sfcompile.codegen.kernel_text import entry_name


class VirtualAttend:
    """The attend phase of every rank of a mesh as one kernel.

    The first programs of the grid are all ranks' copy programs, hop by hop, so nothing waits for a later program. It
    says nothing about links between devices: everything is one device's memory.

    Args:
        kernels: every rank's, by rank of the mesh. Their own programs and tables are used.
    """

    def __init__(self, kernels: Sequence[AttendKernel]) -> None:
        first = kernels[0]
        self.kernels = kernels
        self.spec = first.spec.with_(
            virtual=len(kernels),
            carry=any(kernel.spec.carry for kernel in kernels),
            copy_programs=max(len(kernel.tables.forwards) for kernel in kernels) or 1,
        )
        calls = first.calls if self.spec.reach != "peer" else None
        module = load_source(attend_source(self.spec), first.device.type == "cpu", calls)
        self._kernel = getattr(module, entry_name("attend", self.spec.reach))

    def run(self, outs: Sequence[torch.Tensor], heap: HeapView, mask: torch.Tensor | None = None) -> None:
        """Attend and push on every rank.

        Args:
            outs: every rank's output [B, H, Lq, E] of equal strides.
            heap: the same for all ranks.
        """
        first = self.kernels[0]
        rows = [self._row(kernel, out) for kernel, out in zip(self.kernels, outs, strict=True)]
        given = first.given(outs[0], heap, mask)
        given["virtual_ptr"] = torch.tensor(rows, dtype=torch.int64, device=outs[0].device)
        copiers = self.spec.copy_programs if self.spec.forwards else 0
        # All of them must be on the device together, as on real ranks.
        fitting = first.programs(first.given(outs[0], heap, mask))
        grid = len(self.kernels) * (max(fitting // len(self.kernels), 1) + copiers)
        self._kernel[(grid,)](*(given[name] for name in arguments(self.spec)), **first.options)

    def _row(self, kernel: AttendKernel, out: torch.Tensor) -> list[int]:
        numbers: dict[str, Any] = {**kernel.fixed, "out": out, **kernel.scalars}
        values = [numbers.get(name, 0) for name in VIRTUAL_ROW]
        return [value.data_ptr() if isinstance(value, torch.Tensor) else int(value) for value in values]
