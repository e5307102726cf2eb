"""A rank's generated attention kernel, ready to launch: its text, its tables on the device, its workspace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sfcompile.codegen.engines.target import INTERPRETED_PROGRAMS, KernelTarget
from sfcompile.codegen.kernels.attend import attend_source
from sfcompile.codegen.kernels.moves import MoveSpec, collect_source, move_arguments, put_source
from sfcompile.codegen.kernels.spec import KernelSpec, attend_arguments, schedule_reach, spec_of
from sfcompile.codegen.kernels.tables import KEY, QUERY, KernelTables, make_tables
from sfcompile.codegen.kernels.text import TAG_BITS
from sfcompile.codegen.rows.rows import FUSED_OPTIONS, RowProgram
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.toolchain.loader import resident_programs
from sfcompile.errors import RuntimeTimeoutError


@dataclass(frozen=True)
class HeapView:
    """The heaps of a mesh's ranks as the kernels of one of them see them, for one call of a site.

    Attributes:
        heaps: int64 [ranks of the mesh, 2]: address of each segment in this process (0: out of reach), and NVSHMEM's
            number of the rank.
        place: int64 [12], see PLACE in runtime/wires/symmetric_heap.py.
        receivers: int64, ranks of the job that must have given credit before a put.
    """

    heaps: torch.Tensor
    place: torch.Tensor
    receivers: torch.Tensor


def mask_kind(mask: torch.Tensor | None) -> tuple[str, bool]:
    """``(kind, is boolean)`` of a mask broadcastable to [B, H, Lq, Lk]."""
    if mask is None:
        return "none", True
    heads, rows = ((1, 1, *mask.shape)[-3], (1, 1, *mask.shape)[-2])
    return "full" if heads > 1 or rows > 1 else "key", mask.dtype == torch.bool


class AttendKernel:
    """One rank's side of an attention as kernels: its attend phase is one, each of its puts and its collect another.

    Args:
        rank: of the mesh.
        machine_of: machine of each rank of the mesh; None: all on one.
        mask: kind and whether it is boolean (:func:`mask_kind`).
        merge: see make_tables.
        changes: entries of the spec, set by hand.
    """

    def __init__(
        self,
        schedule: AttentionSchedule,
        rank: int,
        target: KernelTarget,
        machine_of: tuple[int, ...] | None = None,
        mask: tuple[str, bool] = ("none", True),
        merge: bool = True,
        **changes: Any,
    ) -> None:
        self.schedule, self.rank, self.site, self.target = schedule, rank, schedule.site, target
        alone = machine_of is None or len(set(machine_of)) == 1  # what gpu-check times
        measured = target.measured_tile(schedule, mask) if alone else {}
        spec = spec_of(schedule, target.architecture, machine_of, mask, **{**measured, **changes})
        self.tables: KernelTables = make_tables(schedule, rank, spec.block_m, machine_of, merge, span_keys=spec.block_n)
        self.spec: KernelSpec = spec.with_(carry=self.tables.carry)
        if spec.fetch == "tma":  # by rows of the bank
            places = self.tables.keys[:, [KEY.index("k_at"), KEY.index("v_at")]]
            assert (places % (spec.head_dim * spec.element_bytes) == 0).all(), "a chunk begins within a row"
        self.reach = schedule_reach(schedule, machine_of)  # of puts and collects; the attention's may be less
        self.source = attend_source(self.spec)
        self.kernel = target.load(self.source, "attend", self.spec.reach)
        self._puts: dict[str, Any] = {  # by tensor, or by key of a row program and how rows travel
            name: target.load(put_source(self._move_spec(width, name)), "put", self.reach)
            for name, width in (("q", self.site.head_dim), ("k", self.site.head_dim), ("v", self.site.v_head_dim))
        }
        home = collect_source(self._move_spec(self.site.v_head_dim, "o"))
        self._collect = target.load(home, "collect", self.reach)
        self._programs = target.programs or (INTERPRETED_PROGRAMS if target.interpreted else 0)
        self.fixed = self._tensors()

    def _move_spec(self, width: int, tensor: str) -> MoveSpec:
        written = self.site.written(tensor)
        return MoveSpec(self.spec.dtype, width, self.reach, written=written)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Tables and workspace on the device."""
        tables, device = self.tables, self.target.device
        state = tables.tiles * self.spec.block_m * self.spec.state_words if tables.carry else 0
        arrays = {
            name: getattr(tables, name)
            for name in ("units", "queries", "keys", "forwards", "q_positions", "k_positions", "spans", "collects")
        }
        arrays |= {f"put_{name}": table for name, table in tables.puts.items()}
        return {
            **{name: torch.from_numpy(array).to(device) for name, array in arrays.items()},
            "state": torch.empty(state, dtype=torch.float32, device=device),
            "slots": arrived_slots(self.schedule, self.rank, device),
            "counters": torch.zeros(max(len(self.schedule.slots), 1), dtype=torch.int32, device=device),
        }

    @property
    def scalars(self) -> dict[str, int]:
        """Integer arguments that stay the same."""
        heads, kv_heads = self.schedule.heads(self.rank), self.schedule.kv_heads(self.rank)
        queries = self.tables.queries
        own = queries[queries[:, QUERY.index("dst")] < 0]
        return {
            "num_units": len(self.tables.units),
            "num_forwards": len(self.tables.forwards),
            "batch": self.site.batch,
            "heads": heads[1] - heads[0],
            "first_head": heads[0],
            "kv_heads": kv_heads[1] - kv_heads[0],
            "first_kv": kv_heads[0],
            "own_rows": int(own[:, QUERY.index("rows")].sum()),
        }

    def programs(self, values: Sequence[Any]) -> int:
        """Attending programs of a launch with some arguments: as many as are on the device together, less copiers."""
        if self._programs == 0:
            fitting = resident_programs(self.kernel, values, self.options, self.target.device)
            self._programs = fitting - self.copiers
        return self._programs

    @property
    def copiers(self) -> int:
        """Programs that pass chunks on, or put outputs."""
        return self.spec.aside

    @property
    def options(self) -> dict[str, Any]:
        """Triton's options of the launch; none in the interpreter."""
        # Copy programs and attention must be on the device together: one waits for peers that wait for the other.
        return self.target.options(
            self.spec.reach, num_warps=self.spec.warps, num_stages=self.spec.stages, launch_cooperative_grid=True
        )

    def put(self, tensor: str, x: torch.Tensor, heap: HeapView) -> None:
        """Send what others need of "q", "k" or "v" [B, H, L, W], and keep what this rank needs.

        Heads of ``x`` are all heads, rows the rank's own. Waits for credits of ``heap.receivers`` first.
        """
        x = x if x.stride(-1) == 1 else x.contiguous()
        values = self._common(heap) | self._puts_of(tensor) | _strided("x", x)
        names = move_arguments("put")
        self.target.move(self._puts[tensor], [values[name] for name in names], self.reach)

    def put_fused(self, tensor: str, rows: RowProgram, sources: Sequence[torch.Tensor], heap: HeapView) -> None:
        """:meth:`put` of what a row program makes of its sources; the kernel is made at the first call."""
        spec = self._move_spec(rows.width, tensor)
        kept = f"{rows.key} {spec.written}"
        if kept not in self._puts:
            self._puts[kept] = self.target.load(put_source(spec, rows), "put", self.reach)
        values = self._common(heap) | self._puts_of(tensor) | rows.bind(sources)
        names = move_arguments("put", rows)
        self.target.move(self._puts[kept], [values[name] for name in names], self.reach, **FUSED_OPTIONS)

    def collect(self, out: torch.Tensor, heap: HeapView) -> None:
        """Wait for the outputs that come home and copy them into ``out`` [B, H, Lq, E]."""
        counts = {"num_collects": len(self.tables.collects), "num_slots": len(self.fixed["slots"])}
        values = self._common(heap) | _strided("out", out) | counts
        names = move_arguments("collect")
        self.target.move(self._collect, [values[name] for name in names], self.reach)

    def _puts_of(self, tensor: str) -> dict[str, Any]:
        return {"puts_ptr": self.fixed[f"put_{tensor}"], "num_puts": len(self.tables.puts[tensor])}

    def _common(self, heap: HeapView) -> dict[str, Any]:
        """Arguments that several kernels take."""
        return {
            **{f"{name}_ptr": tensor for name, tensor in self.fixed.items()},
            "heaps_ptr": heap.heaps,
            "place_ptr": heap.place,
            "receivers_ptr": heap.receivers,
            "num_receivers": len(heap.receivers),
            "rank": self.rank,
            "batch": self.site.batch,
        }

    def run(
        self,
        out: torch.Tensor,
        heap: HeapView,
        mask: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Attend and push; own queries' outputs for this rank's heads go to ``out`` [B, H, Lq, E].

        Args:
            mask: as given to the site, broadcastable to [B, H, Lq, Lk].
            lse: fp32 [B, heads of this rank, Lq], natural log-sum-exp of the own queries (spec.lse).
        """
        values = self.values(out, heap, mask, lse)
        grid = (self.programs(values) + self.copiers,)
        self.target.with_scratch(lambda: self.kernel[grid](*values, **self.options))

    def values(
        self, out: torch.Tensor, heap: HeapView, mask: torch.Tensor | None, lse: torch.Tensor | None = None
    ) -> list[Any]:
        """What the attention kernel is given, in order; see :meth:`run`."""
        named = self.named_values(out, heap, mask, lse)
        return [named[name] for name in attend_arguments(self.spec)]

    def named_values(
        self, out: torch.Tensor, heap: HeapView, mask: torch.Tensor | None, lse: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """The same by name, and some more."""
        return self._common(heap) | self.scalars | _strided("out", out) | {"lse_ptr": lse} | mask_arguments(mask)


def arrived_slots(schedule: Schedule, rank: int, device: torch.device) -> torch.Tensor:
    """Slots of a rank of the mesh that something comes to, int64: chunks without elements are not sent by kernels."""
    arrivals = schedule.program(rank).arrivals
    slots = [arrival.slot for arrival in arrivals if math.prod(schedule.shape(rank, arrival))]
    return torch.tensor(slots, dtype=torch.int64, device=device)


def gave_up(schedule: Schedule, rank: int, slot: int, wanted: int, seen: int, limit_s: float) -> RuntimeTimeoutError:
    """The error for a wait that gave up.

    Args:
        rank: of the mesh.
        slot: of a chunk, whose signal holds the epoch and, below it, the call's tag; below 0 a credit, of rank
            -1 - slot of the job.
        wanted, seen: the word that was waited for, and what was there.
        limit_s: how long it was waited for.
    """
    why = f"a kernel of {schedule.site.name} waited {limit_s:g} s, or was told to stop"
    if slot < 0:
        return RuntimeTimeoutError(
            f"rank {-1 - slot} has not read epoch {wanted}: {why}",
            "the receiver is late or dead",
            "look at the receiver's log; raise options={'timeout_s': ...} if it is only slow",
            rank=rank, peer=-1 - slot, epoch=wanted, seen_epoch=seen,
        )  # fmt: skip
    arrival = next(entry for entry in schedule.program(rank).arrivals if entry.slot == slot)
    return RuntimeTimeoutError(
        f"{arrival} did not come: {why}",
        "the sender is late, dead, or never sends it",
        "look at the sender's log; raise options={'timeout_s': ...} if it is only slow",
        rank=rank, peer=arrival.src, slot=slot, epoch=wanted >> TAG_BITS, seen_epoch=seen >> TAG_BITS,
    )  # fmt: skip


def mask_arguments(mask: torch.Tensor | None) -> dict[str, Any]:
    """A mask as a pointer and strides over [B, H, Lq, Lk]; 0 where it is broadcast."""
    if mask is None:
        return {}
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    values = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return {"mask_ptr": values} | dict(zip(("mask_sb", "mask_sh", "mask_sr", "mask_sc"), strides, strict=True))


def _strided(name: str, x: torch.Tensor) -> dict[str, Any]:
    """A tensor [B, H, L, W] as a pointer and the strides of its first three dims."""
    strides = zip((f"{name}_sb", f"{name}_sh", f"{name}_sr"), x.stride()[:3], strict=True)
    return {f"{name}_ptr": x, **dict(strides)}
