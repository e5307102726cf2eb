"""The generated kernel as the executor's engine: on CPU ranks, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sfcompile.codegen.kernels.spec import tiles_for
from sfcompile.codegen.kernels.tables import make_tables
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.errors import CodegenError, StreamFusionError
from sfcompile.runtime.program.instructions import Forward, Push
from sfcompile.runtime.rank.engine import KernelAccess


class InterpreterEngine:
    """One rank's attend phase of a schedule, in the interpreter over shared memory.

    Kernels are generated at the first call, for the kind of mask that comes.

    Args:
        rank: of the schedule.

    Raises:
        CodegenError: Triton is not installed.
    """

    def __init__(self, schedule: AttentionSchedule, rank: int) -> None:
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise CodegenError(
                "attention='triton' needs Triton, which is not installed",
                "CPU builds of torch do not bring it",
                "pip install 'triton>=3.6', or use attention='aten'",
                rank=rank,
            ) from error
        self._schedule, self._rank = schedule, rank
        tables = make_tables(schedule, rank, tiles_for(0, "fp32", 64, 64)["block_m"])
        self._tables = tables
        self._kernels: dict[tuple[str, bool], Any] = {}
        steps = schedule.program(rank).phases["attend"]
        self._sends = [(step.dst, step.to_slot) for step in steps if isinstance(step, Forward)]
        self._sends += [(step.q.src, step.slot) for step in steps if isinstance(step, Push)]

    @property
    def bank_bytes(self) -> int:
        """Bytes that the attention needs of a bank: its slots, then this rank's own q, k and v."""
        return self._tables.bank_bytes

    @property
    def own_at(self) -> Mapping[str, int]:
        """Where own q, k and v lie."""
        return self._tables.own_at

    @property
    def sends(self) -> Sequence[tuple[int, int]]:
        """Chunks that the kernel sends."""
        return self._sends

    def run(self, out: torch.Tensor, access: KernelAccess, epoch: int, mask: torch.Tensor | None) -> None:
        """Attend and push; see :class:`Engine`."""
        from triton.runtime.errors import InterpreterError

        from sfcompile.codegen.engines.launch import AttendKernel, HeapView, mask_kind
        from sfcompile.codegen.engines.target import KernelTarget
        from sfcompile.codegen.toolchain.interpreter import interpreting

        kind = mask_kind(mask)
        if kind not in self._kernels:
            target = KernelTarget(torch.device("cpu"), programs=1)
            self._kernels[kind] = AttendKernel(self._schedule, self._rank, target, mask=kind)
        heap = HeapView(access.heaps, access.place(epoch), torch.zeros(0, dtype=torch.int64))
        try:
            with interpreting(access.watch()):
                self._kernels[kind].run(out, heap, mask=mask)
        except InterpreterError as error:
            cause = error.__cause__
            while cause is not None and not isinstance(cause, StreamFusionError):
                cause = cause.__cause__
            if cause is not None:
                raise cause from None
            raise
