"""A rank's generated attention kernel, ready to launch: its text, its tables on the device, its workspace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sfcompile.codegen.kernel_attend import VIRTUAL_ROW, arguments, attend_source
from sfcompile.codegen.kernel_loader import load_source
from sfcompile.codegen.kernel_moves import COLLECT_ARGUMENTS, PUT_ARGUMENTS, MoveSpec, collect_source, put_source
from sfcompile.codegen.kernel_spec import KernelSpec, block_of, spec_of
from sfcompile.codegen.kernel_tables import KernelTables, make_tables
from sfcompile.codegen.schedule import Schedule
from sfcompile.codegen.sites import AttentionSite
from sfcompile.errors import RuntimeTimeoutError

MASK_KINDS = {False: "key", True: "full"}


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
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        device: torch.device,
        machine_of: tuple[int, ...] | None = None,
        mask: tuple[str, bool] = ("none", True),
        programs: int | None = None,
        calls: Mapping[str, Callable[..., object]] | None = None,
        merge: bool = True,
        **changes: Any,
    ) -> None:
        assert isinstance(schedule.site, AttentionSite)
        self.schedule, self.rank, self.site = schedule, rank, schedule.site
        arch = 0
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            arch = 10 * major + minor
        spec = spec_of(schedule, arch, machine_of, mask, **changes)
        self.tables: KernelTables = make_tables(schedule, rank, spec.block_m, machine_of, merge)
        self.spec: KernelSpec = spec.with_(carry=self.tables.carry)
        self.source = attend_source(self.spec)
        self._kernel = load_source(self.source, arch == 0, calls).attend
        self._moves: dict[str, Any] = {}
        for name, width in (("q", self.site.head_dim), ("k", self.site.head_dim), ("v", self.site.v_head_dim)):
            move = MoveSpec(self.spec.dtype, width, self.spec.reach)
            self._moves[name] = load_source(put_source(move), arch == 0, calls).put
        home = MoveSpec(self.spec.dtype, self.site.v_head_dim, self.spec.reach)
        self._moves["o"] = load_source(collect_source(home), arch == 0, calls).collect
        self._device = device
        self._programs = programs or (_fitting(device) if arch else 2)
        self._fixed = self._tensors()

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Tables and workspace on the device."""
        tables, device = self.tables, self._device
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

    @property
    def grid(self) -> int:
        """Programs of a launch."""
        return self._programs + (self.spec.copy_programs if self.spec.forwards else 0)

    def put(
        self, tensor: str, x: torch.Tensor, heaps: torch.Tensor, bank_at: int, signals_at: int, epoch: int
    ) -> None:
        """Send what others need of "q", "k" or "v" [B, H, L, W], and keep what this rank needs.

        Heads of ``x`` are all heads, rows the rank's own. The caller has made sure that every destination's bank is
        free (runtime/transport.py).
        """
        x = x if x.stride(-1) == 1 else x.contiguous()
        given = self._places(heaps, bank_at, signals_at, epoch) | {"x_ptr": x, "puts_ptr": self._fixed[f"put_{tensor}"]}
        given |= dict(zip(("x_sb", "x_sh", "x_sr"), x.stride()[:3], strict=True))
        given |= {"counters_ptr": self._fixed["counters"], "num_puts": len(self.tables.puts[tensor])}
        self._moves[tensor][(self._programs,)](*(given[name] for name in PUT_ARGUMENTS))

    def collect(
        self, out: torch.Tensor, heaps: torch.Tensor, bank_at: int, signals_at: int, epoch: int
    ) -> None:
        """Wait for the outputs that come home and copy them into ``out`` [B, H, Lq, E]."""
        given = self._places(heaps, bank_at, signals_at, epoch) | {"out_ptr": out}
        given |= dict(zip(("out_sb", "out_sh", "out_sr"), out.stride()[:3], strict=True))
        given |= {"collects_ptr": self._fixed["collects"], "num_collects": len(self.tables.collects)}
        self._moves["o"][(self._programs,)](*(given[name] for name in COLLECT_ARGUMENTS))

    def _places(self, heaps: torch.Tensor, bank_at: int, signals_at: int, epoch: int) -> dict[str, Any]:
        return {
            "heaps_ptr": heaps, "rank": self.rank, "bank_at": bank_at, "signals_at": signals_at, "epoch": epoch,
            "batch": self.site.batch,
        }  # fmt: skip

    def run(
        self,
        out: torch.Tensor,
        heaps: torch.Tensor,
        bank_at: int,
        signals_at: int,
        epoch: int,
        mask: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Attend and push; own queries' outputs for this rank's heads go to ``out`` [B, H, Lq, E].

        Args:
            heaps: int64, the address of each rank's segment in this process by rank of the mesh (0: not reachable).
            bank_at, signals_at: bytes from a segment's start to the bank, and to the bank's signals.
            mask: as given to the site, broadcastable to [B, H, Lq, Lk].
            lse: fp32 [B, heads of this rank, Lq], natural log-sum-exp of the own queries (spec.lse).
        """
        given: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in self._fixed.items()}
        given |= self.scalars | {"rank": self.rank, "bank_at": bank_at, "signals_at": signals_at, "epoch": epoch}
        given |= {"out_ptr": out, "heaps_ptr": heaps, "lse_ptr": lse}
        given |= dict(zip(("out_sb", "out_sh", "out_sr"), out.stride()[:3], strict=True))
        given |= mask_arguments(mask)
        self._launch(given, self.grid)

    def _launch(self, given: Mapping[str, Any], grid: int) -> None:
        options: dict[str, Any] = {}
        if self._device.type == "cuda":
            # Copy programs and attention must be on the device together: one waits for peers that wait for the other.
            options = {
                "num_warps": self.spec.warps, "num_stages": self.spec.stages, "launch_cooperative_grid": True,
            }  # fmt: skip
        self._kernel[(grid,)](*(given[name] for name in arguments(self.spec)), **options)

    def check(self) -> None:
        """Raise what a debug build reported; synchronises with the device.

        Raises:
            RuntimeTimeoutError: a wait gave up.
        """
        failed, slot, epoch, seen = self._fixed["report"].tolist()
        if failed:
            self._fixed["report"].zero_()
            self._fixed["counters"].zero_()
            arrival = next(entry for entry in self.schedule.program(self.rank).arrivals if entry.slot == slot)
            raise RuntimeTimeoutError(
                f"{arrival} of attention {self.site.name} did not come: a kernel gave up waiting",
                "the sender is late, dead, or never sends it",
                "look at the sender's log",
                rank=self.rank, peer=arrival.src, slot=slot, epoch=epoch, seen_epoch=seen,
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


class VirtualAttend:
    """All ranks of a schedule in one launch on one device: the same text, tables and waits, without several GPUs.

    The first programs of the grid are all ranks' copy programs hop by hop, so nothing waits for a later program.
    """

    def __init__(self, kernels: Sequence[AttendKernel]) -> None:
        first = kernels[0]
        spec = first.spec.with_(
            virtual=len(kernels),
            carry=any(kernel.spec.carry for kernel in kernels),
            copy_programs=max(len(kernel.tables.forwards) for kernel in kernels) or 1,
        )
        self.kernels, self.spec = kernels, spec
        interpret = first._device.type == "cpu"
        calls = {
            name: value for name, value in first._kernel.__globals__.items() if name in CALLS
        } if interpret and spec.reach != "peer" else None  # fmt: skip
        self._kernel = load_source(attend_source(spec), interpret, calls).attend


CALLS = ("putmem_signal_nbi_block", "signal_wait_until")
__all__ = ["CALLS", "VIRTUAL_ROW", "AttendKernel", "VirtualAttend", "mask_arguments", "mask_kind"]


def _fitting(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
