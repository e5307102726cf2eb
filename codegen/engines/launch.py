"""A rank's generated attention kernel, ready to launch: its text, its tables on the device, its workspace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfcompile.codegen.kernels.attend import attend_arguments, attend_source
from sfcompile.codegen.kernels.moves import MoveSpec, collect_source, move_arguments, put_source
from sfcompile.codegen.kernels.spec import KernelSpec, spec_of
from sfcompile.codegen.kernels.tables import KernelTables, make_tables
from sfcompile.codegen.kernels.text import entry_name
from sfcompile.codegen.rows.elements import block_of
from sfcompile.codegen.rows.rows import FUSED_OPTIONS, RowProgram
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.toolchain.loader import link_options, load_source, resident_programs
from sfcompile.errors import RuntimeTimeoutError

MASK_KINDS = {False: "key", True: "full"}
MOVE_PROGRAMS = 32
"""Most programs of a put or collect kernel."""


@dataclass(frozen=True)
class HeapView:
    """The heaps of a mesh's ranks as the kernels of one of them see them, for one call of a site.

    Attributes:
        heaps: int64 [ranks of the mesh, 2]: address of each segment in this process (0: out of reach), and NVSHMEM's
            number of the rank.
        place: int64 [7], see PLACE in codegen/kernels/text.py.
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
    return MASK_KINDS[heads > 1 or rows > 1], mask.dtype == torch.bool


class AttendKernel:
    """One rank's attend phase as one kernel.

    Args:
        rank: of the mesh.
        device: "cpu" runs in Triton's interpreter.
        programs: size of the grid for the attention itself; None: what fits on the device at a time.
        calls: stand-ins for NVSHMEM in the interpreter.
        library: NVSHMEM's device code (codegen/toolchain/nvshmem_bitcode.py), for ``machine_of`` with several machines
        on a GPU.
    """

    def __init__(
        self,
        schedule: AttentionSchedule,
        rank: int,
        device: torch.device,
        machine_of: tuple[int, ...] | None = None,
        mask: tuple[str, bool] = ("none", True),
        programs: int | None = None,
        calls: Mapping[str, Callable[..., object]] | None = None,
        merge: bool = True,
        library: Path | None = None,
        **changes: Any,
    ) -> None:
        self.schedule, self.rank, self.site = schedule, rank, schedule.site
        arch = architecture(device)
        spec = spec_of(schedule, arch, machine_of, mask, **changes)
        self.tables: KernelTables = make_tables(schedule, rank, spec.block_m, machine_of, merge)
        self.spec: KernelSpec = spec.with_(carry=self.tables.carry)
        self.source = attend_source(self.spec)
        name = entry_name("attend", self.spec.reach)
        self.kernel = getattr(load_source(self.source, arch == 0, calls), name)
        self._moves: dict[str, Any] = {}
        for name, width in (("q", self.site.head_dim), ("k", self.site.head_dim), ("v", self.site.v_head_dim)):
            move = MoveSpec(self.spec.dtype, width, self.spec.reach, self.spec.bounded)
            self._moves[name] = getattr(load_source(put_source(move), arch == 0, calls), entry_name("put", move.reach))
        home = MoveSpec(self.spec.dtype, self.site.v_head_dim, self.spec.reach, self.spec.bounded)
        brings = load_source(collect_source(home), arch == 0, calls)
        self._moves["o"] = getattr(brings, entry_name("collect", home.reach))
        self.device, self.calls = device, calls
        self._library = library
        self._programs = programs or (0 if arch else 2)
        self.fixed = self._tensors()

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Tables and workspace on the device."""
        tables, device = self.tables, self.device
        found = {
            name: torch.from_numpy(getattr(tables, name)).to(device)
            for name in ("units", "queries", "keys", "forwards", "q_positions", "k_positions")
        }
        state = tables.tiles * self.spec.block_m * (block_of(self.site.v_head_dim) + 2) if tables.carry else 0
        found["state"] = torch.empty(state, dtype=torch.float32, device=device)
        found["counters"] = torch.zeros(max(len(self.schedule.slots), 1), dtype=torch.int32, device=device)
        found |= {f"put_{name}": torch.from_numpy(table).to(device) for name, table in tables.puts.items()}
        found["collects"] = torch.from_numpy(tables.collects).to(device)
        found["report"] = torch.zeros(4, dtype=torch.int64, device=device)
        return found

    @property
    def scalars(self) -> dict[str, int]:
        """Integer arguments that stay the same."""
        heads, kv_heads = self.schedule.heads(self.rank), self.schedule.kv_heads(self.rank)
        own = self.tables.queries[self.tables.queries[:, 6] < 0]
        return {
            "num_units": len(self.tables.units),
            "num_forwards": len(self.tables.forwards),
            "batch": self.site.batch,
            "heads": heads[1] - heads[0],
            "first_head": heads[0],
            "kv_heads": kv_heads[1] - kv_heads[0],
            "first_kv": kv_heads[0],
            "own_rows": int(own[:, 2].sum()),
        }

    def programs(self, given: Mapping[str, Any]) -> int:
        """Attending programs of a launch with some arguments: as many as are on the device together, less copiers."""
        if self._programs == 0:
            values = [given[name] for name in attend_arguments(self.spec)]
            fitting = resident_programs(self.kernel, values, self.options, self.device)
            self._programs = fitting - self.copiers
        return self._programs

    @property
    def copiers(self) -> int:
        """Programs that pass chunks on."""
        return self.spec.copy_programs if self.spec.forwards else 0

    @property
    def options(self) -> dict[str, Any]:
        """Triton's options of the launch; none in the interpreter."""
        if self.device.type == "cpu":
            return {}
        # Copy programs and attention must be on the device together: one waits for peers that wait for the other.
        found = {"num_warps": self.spec.warps, "num_stages": self.spec.stages, "launch_cooperative_grid": True}
        return found | link_options(self._library, self.spec.reach)

    def put(self, tensor: str, x: torch.Tensor, heap: HeapView) -> None:
        """Send what others need of "q", "k" or "v" [B, H, L, W], and keep what this rank needs.

        Heads of ``x`` are all heads, rows the rank's own. Waits for credits of ``heap.receivers`` first.
        """
        x = x if x.stride(-1) == 1 else x.contiguous()
        given = self._common(heap) | {"x_ptr": x, "puts_ptr": self.fixed[f"put_{tensor}"]}
        given |= dict(zip(("x_sb", "x_sh", "x_sr"), x.stride()[:3], strict=True))
        given |= {"num_puts": len(self.tables.puts[tensor])}
        self._move(tensor, "put", given)

    def put_fused(self, tensor: str, rows: RowProgram, sources: Sequence[torch.Tensor], heap: HeapView) -> None:
        """:meth:`put` of what a row program makes of its sources; the kernel is made at the first call."""
        if rows.key not in self._moves:
            move = MoveSpec(self.spec.dtype, rows.width, self.spec.reach, self.spec.bounded)
            made = load_source(put_source(move, rows), self.device.type == "cpu", self.calls)
            self._moves[rows.key] = getattr(made, entry_name("put", move.reach))
        given = self._common(heap) | rows.bind(sources) | {"puts_ptr": self.fixed[f"put_{tensor}"]}
        self._move(rows.key, "put", given | {"num_puts": len(self.tables.puts[tensor])}, rows)

    def collect(self, out: torch.Tensor, heap: HeapView) -> None:
        """Wait for the outputs that come home and copy them into ``out`` [B, H, Lq, E]."""
        given = self._common(heap) | {"out_ptr": out}
        given |= dict(zip(("out_sb", "out_sh", "out_sr"), out.stride()[:3], strict=True))
        given |= {"collects_ptr": self.fixed["collects"], "num_collects": len(self.tables.collects)}
        self._move("o", "collect", given)

    def _move(self, tensor: str, name: str, given: Mapping[str, Any], rows: RowProgram | None = None) -> None:
        # Few programs: they run beside the products that make the next tensor.
        programs = MOVE_PROGRAMS if self.device.type == "cuda" else 2
        wanted = move_arguments(name, MoveSpec(self.spec.dtype, 1, self.spec.reach, self.spec.bounded), rows)
        options = {} if self.device.type == "cpu" else link_options(self._library, self.spec.reach)
        if rows is not None and self.device.type != "cpu":
            options |= FUSED_OPTIONS
        self._moves[tensor][(programs,)](*(given[entry] for entry in wanted), **options)

    def _common(self, heap: HeapView) -> dict[str, Any]:
        given: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in self.fixed.items()}
        given |= {"heaps_ptr": heap.heaps, "place_ptr": heap.place, "receivers_ptr": heap.receivers}
        return given | {"num_receivers": len(heap.receivers), "rank": self.rank, "batch": self.site.batch}

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
        given = self.given(out, heap, mask, lse)
        grid = self.programs(given) + self.copiers
        self.kernel[(grid,)](*(given[name] for name in attend_arguments(self.spec)), **self.options)

    def given(
        self, out: torch.Tensor, heap: HeapView, mask: torch.Tensor | None, lse: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """Arguments of the attention kernel by name."""
        found = self._common(heap) | self.scalars | {"out_ptr": out, "lse_ptr": lse}
        found |= dict(zip(("out_sb", "out_sh", "out_sr"), out.stride()[:3], strict=True))
        return found | mask_arguments(mask)

    def check(self) -> None:
        """Raise what a debug build reported; synchronises with the device.

        Raises:
            RuntimeTimeoutError: a wait gave up.
        """
        failed, slot, epoch, seen = self.fixed["report"].tolist()
        if failed:
            self.fixed["report"].zero_()
            self.fixed["counters"].zero_()
            raise gave_up(self.schedule, self.rank, slot, epoch, seen)


def gave_up(schedule: Schedule, rank: int, slot: int, epoch: int, seen: int) -> RuntimeTimeoutError:
    """The error for a wait that a debug build gave up; slots below 0 are credits, of rank -1 - slot of the job."""
    if slot < 0:
        return RuntimeTimeoutError(
            f"rank {-1 - slot} has not read epoch {epoch}: a kernel of {schedule.site.name} gave up on its bank",
            "the receiver is late or dead",
            "look at the receiver's log",
            rank=rank, peer=-1 - slot, epoch=epoch, seen_epoch=seen,
        )  # fmt: skip
    arrival = next(entry for entry in schedule.program(rank).arrivals if entry.slot == slot)
    return RuntimeTimeoutError(
        f"{arrival} of {schedule.site.name} did not come: a kernel gave up waiting",
        "the sender is late, dead, or never sends it",
        "look at the sender's log",
        rank=rank, peer=arrival.src, slot=slot, epoch=epoch, seen_epoch=seen,
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


def architecture(device: torch.device) -> int:
    """80, 90, 100, ... of a GPU; 0 for CPUs, where kernels run in the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
