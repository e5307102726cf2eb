"""An attention of one rank by itself, to be timed: as its generated kernel, and as the library's calls.

Both are what a rank runs, of the real schedule with its real tables. Nobody sends anything: every signal is there from
the start, chunks hold random numbers, and what the rank sends goes to memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sfcompile.codegen.engines.launch import AttendKernel, HeapView
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.kernels.spec import spec_of
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.errors import RuntimeTimeoutError
from sfcompile.runtime.program.instructions import Arrival
from sfcompile.runtime.program.intervals import count
from sfcompile.runtime.rank.executor import SiteRun
from sfcompile.runtime.rank.site_call import SiteCall
from sfcompile.runtime.wires.symmetric_heap import STATUS, HeapSize, Watched, view_at
from sfcompile.runtime.wires.transport import Source, word_of

Step = Callable[[], object]
"""What is timed, or what is done before it, on the current stream."""
LIMIT_S = 5.0
"""Of a wait, none of which should be."""
_EPOCH = 1


def fused(
    schedule: AttentionSchedule,
    rank: int,
    target: KernelTarget,
    mask: tuple[str, bool],
    machine_of: Sequence[int] = (),
) -> tuple[Step, Step, Step]:
    """The generated kernel of a rank's attend phase: what comes before it, itself, and a look whether it was right.

    Args:
        rank: of the mesh.
        mask: kind of mask (launch.py's mask_kind).
        machine_of: machine of each rank of the mesh in the job; (): all on one.

    Raises:
        RuntimeTimeoutError: by the look: it waited in vain for what was there.
    """
    as_in_job = tile_in_job(schedule, target, mask, machine_of)
    kernel, device = AttendKernel(schedule, rank, target, None, mask, **as_in_job), target.device
    size = HeapSize(max(len(schedule.slots), 1), kernel.tables.bank_bytes, schedule.mesh.num_ranks)
    memory = _random_bank(size, schedule.site.dtype, device)
    for slot in range(len(schedule.slots)):
        view_at(memory, size.signal_at(_EPOCH, slot), (1,), torch.int64).fill_(word_of(_EPOCH, 0))
    status = torch.zeros(len(STATUS) + 1, dtype=torch.int64, device=device)  # and a word that nobody sets: no abort
    watched = Watched(status.data_ptr(), status.data_ptr() + 8 * len(STATUS), round(LIMIT_S * 1e9))
    place = torch.tensor(size.place(_EPOCH, word_of(_EPOCH, 0), watched), dtype=torch.int64, device=device)
    row = (memory.data_ptr(), 0, memory.data_ptr())
    table = torch.tensor([row] * schedule.mesh.num_ranks, dtype=torch.int64, device=device)
    view = HeapView(table, place, torch.zeros(0, dtype=torch.int64, device=device))
    out = torch.zeros(_output_shape(schedule, rank), dtype=schedule.site.dtype, device=device)
    masks = _mask(schedule, rank, mask, device)
    local = _local(schedule, rank, device)

    def put() -> None:
        for name, tensor in local.items():
            kernel.put(name, tensor, view)

    def look() -> None:
        known = dict(zip(STATUS, status.tolist(), strict=False))
        if known["gave_up"]:
            raise RuntimeTimeoutError(
                f"the kernel of {schedule.site.name} waited in vain in a trial, for slot {known['slot']}",
                "every signal was there",
                "report this; options={'attention': 'aten'} goes round it",
                rank=rank,
            )

    def run() -> None:
        assert memory.data_ptr() == row[0], "the table's addresses do not keep it: this closure does"
        kernel.run(out, view, mask=masks)

    return put, run, look


def tile_in_job(
    schedule: AttentionSchedule, target: KernelTarget, mask: tuple[str, bool], machine_of: Sequence[int]
) -> dict[str, Any]:
    """Tile, warps, and the way of fetching of the kernel that ranks on several machines run: it also sends between
    them, which leaves it fewer registers. {}: it is the one that a rank alone runs."""
    if len(set(machine_of)) < 2:
        return {}
    spec = spec_of(schedule, target.architecture, tuple(machine_of), mask)
    return {name: getattr(spec, name) for name in ("block_m", "block_n", "warps", "stages", "tails", "fetch")}


def library(
    schedule: AttentionSchedule, rank: int, device: torch.device, mask: tuple[str, bool]
) -> tuple[Step, Step, Step]:
    """The same by the executor's calls of the library (runtime/rank/executor.py); see :func:`fused`."""
    size = HeapSize(max(len(schedule.slots), 1), schedule.heap_bytes)
    heap, wires = _Bank(_random_bank(size, schedule.site.dtype, device), size), _NoWires()
    masks = _mask(schedule, rank, mask, device)
    local = _local(schedule, rank, device)
    job_rank = schedule.groups[0][rank] if schedule.groups else rank
    runs: list[SiteRun] = []

    def put() -> None:
        runs.append(SiteRun(SiteCall(job_rank, 0, 0, schedule, _EPOCH), heap, wires))
        for name, tensor in local.items():
            runs[-1].put(f"put_{name}", tensor)

    return put, lambda: runs.pop().attend(masks), lambda: None


class _Bank:
    """This rank's own heap; see OwnHeap."""

    def __init__(self, memory: torch.Tensor, size: HeapSize) -> None:
        self._memory, self._size = memory, size

    def chunk(self, bank: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A view of a bank."""
        return view_at(self._memory, self._size.bank_at(bank) + offset, shape, dtype)


class _NoWires:
    """A transport to nobody; see Transport in runtime/wires/transport.py."""

    def open(self, epoch: int, arrivals: Sequence[tuple[Arrival, torch.Tensor]], tag: int = 0) -> None:
        """All has arrived."""

    def put(
        self, dst: int, slot: int, offset: int, chunk: torch.Tensor, epoch: int, source: Source = Source.REUSED
    ) -> None:
        """Packed, as for the way."""
        chunk.clone(memory_format=torch.contiguous_format)

    def wait(self, src: int, slot: int, epoch: int) -> None:
        """It is there."""

    def finish(self, epoch: int) -> None:
        """Nobody asks."""

    def notice(self) -> str | None:
        """Nobody fails."""
        return None

    def abort(self, text: str) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """Nothing is held."""


def _random_bank(size: HeapSize, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A segment whose banks hold random numbers: zeros cost a GPU less power, and so less time."""
    memory = torch.zeros(size.segment_bytes, dtype=torch.uint8, device=device)
    banks = memory[size.banks_at :]
    if banks.numel() >= dtype.itemsize:
        banks[: banks.numel() // dtype.itemsize * dtype.itemsize].view(dtype).normal_(generator=_generator(device))
    return memory


def _generator(device: torch.device) -> torch.Generator:
    """One of its own: what the user's program draws stays what it was."""
    return torch.Generator(device).manual_seed(0)


def _local(schedule: AttentionSchedule, rank: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A rank's own q, k and v."""
    site, tensors = schedule.site, {}
    for name in ("q", "k", "v"):
        rows = count(site.q_positions[rank] if name == "q" else site.kv_positions[rank])
        shape = (site.batch, site.heads if name == "q" else site.kv_heads, rows, schedule.width(name))
        tensors[name] = torch.randn(shape, generator=_generator(device), device=device).to(site.dtype)
    return tensors


def _output_shape(schedule: AttentionSchedule, rank: int) -> tuple[int, ...]:
    site = schedule.site
    return site.batch, site.heads, count(site.q_positions[rank]), site.v_head_dim


def _mask(schedule: AttentionSchedule, rank: int, mask: tuple[str, bool], device: torch.device) -> torch.Tensor | None:
    """One that lets everybody attend to everything."""
    kind, is_bool = mask
    if kind == "none":
        return None
    site = schedule.site
    queries = sum(count(positions) for positions in site.q_positions) if kind == "full" else 1
    shape = (1, 1, queries, sum(count(positions) for positions in site.kv_positions))
    return (
        torch.ones(shape, dtype=torch.bool, device=device)
        if is_bool
        else torch.zeros(shape, device=device).to(site.dtype)
    )
