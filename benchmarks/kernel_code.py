"""What attention kernels are made of, read from their machine code: counts, not times. No GPU needed.

    PYTHONPATH=. python benchmarks/kernel_code.py                       # every architecture, head size, reach, mask
    PYTHONPATH=. python benchmarks/kernel_code.py --arch 90 --plain     # Hopper, both ways to fetch tiles

A row is the loop over blocks of keys: instructions that a warp issues for 64 keys, and for a step (a block of keys) its
matrix products, barriers, fences and exponentials with those that stand under a product in flight. The last columns are
the cycle model of docs/kernels.md, for one SM and 128 queries against 64 keys.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from sfcompile.codegen.kernels.spec import KernelSpec, tiles_for, tma_tiles
from sfcompile.codegen.toolchain.compiler import ARCHITECTURES, compile_attend
from sfcompile.codegen.toolchain.machine_code import Loop, Resources, inner_loop, resources
from sfcompile.codegen.toolchain.nvshmem_bitcode import slim_library

MASKS = {"none": {}, "causal": {"causal": True}, "key": {"mask": "key"}, "full": {"mask": "full"}}
FMA_PER_CYCLE = 2048
"""Of an SM of Hopper, on fp16 and bf16: a wgmma of m64 nN k16 takes N / 2 cycles."""
EX2_PER_CYCLE = 16
"""Of an SM: a warp's exponentials hold a scheduler's unit for 8 cycles."""
SCHEDULERS = 4
"""Of an SM; each issues an instruction of some warp in a cycle."""
HEAD = (
    f"{'arch':<7}{'D':>4} {'reach':<8}{'mask':<7}{'fetch':<8}{'tile':<9}{'regs':>5}{'spill':>6}{'shared':>8}"
    f"{'instr/64':>9}{'seldom':>7}{'mma':>5}{'bar':>4}{'fence':>6}{'ex2':>5}{'under':>6}{'tensor':>7}{'ex2':>6}"
    f"{'issue':>6}{'step':>6}{'ceiling':>8}"
)


@dataclass(frozen=True)
class Cycles:
    """Of an SM, for 128 queries against 64 keys.

    Attributes:
        tensor: of the products; ``exponentials``, ``issue``: of the units that make and issue the softmax.
        together: whether the softmax of one block stands under a product of another, all of it; else it waits its turn.
    """

    tensor: float
    exponentials: float
    issue: float
    together: bool

    @property
    def step(self) -> float:
        """The busiest unit's, or products and softmax one after the other."""
        softmax = max(self.exponentials, self.issue)
        return max(self.tensor, softmax) if self.together else self.tensor + softmax

    @property
    def ceiling(self) -> float:
        """The most of the tensor cores' rate that the loop can reach."""
        return self.tensor / self.step


def cycles(head_dim: int, instructions: float, exponentials: float, together: bool) -> Cycles:
    """The model.

    Args:
        instructions, exponentials: of a warp, for 16 queries against 64 keys.
    """
    tensor = 2 * 128 * 64 * head_dim / FMA_PER_CYCLE
    warps = 128 // 16 / SCHEDULERS
    return Cycles(tensor, warps * exponentials * 32 * SCHEDULERS / EX2_PER_CYCLE, warps * instructions, together)


def row(arch: int, spec: KernelSpec, used: Resources, loop: Loop) -> str:
    """A line of the table."""
    rows_of_a_warp = spec.block_m / spec.warps if spec.fetch == "threads" else 16
    share = 64 / spec.block_n * 16 / rows_of_a_warp
    model = cycles(spec.head_dim, loop.instructions * share, loop.exponentials * share, loop.under == loop.exponentials)
    kind = "causal" if spec.causal else spec.mask
    shown = (
        f"sm_{arch:<4}{spec.head_dim:>4} {spec.reach:<8}{kind:<7}{spec.fetch:<8}{f'{spec.block_m}x{spec.block_n}':<9}"
        f"{used.registers:>5}{used.spill_stores:>6}{used.shared:>8}{loop.instructions * 64 / spec.block_n:>9.0f}"
        f"{loop.seldom:>7}{loop.products:>5}{loop.barriers:>4}{loop.fences:>6}{loop.exponentials:>5}{loop.under:>6}"
    )
    if arch != 90:  # the rates are Hopper's
        return shown
    figures = "".join(f"{value:>6.0f}" for value in (model.exponentials, model.issue, model.step))
    return f"{shown}{model.tensor:>7.0f}{figures}{model.ceiling:>8.2f}"


def specs(arch: int, plain: bool) -> Iterator[KernelSpec]:
    """Kernels of a ring that pushes outputs home, in bf16."""
    for size in (64, 128):
        for reach in ("peer",) if plain else ("peer", "nvshmem"):
            for name, changes in MASKS.items():
                if plain and name != "none":
                    continue
                hard = reach != "peer" or name in ("causal", "key")
                tiles = tiles_for(arch, "bf16", size, size, name == "full", hard)
                base = KernelSpec("bf16", size, size, size**-0.5, reach=reach, forwards=True, pushes=True, **tiles)
                yield base.with_(**changes)
                if arch == 90 and name != "full":
                    yield base.with_(**tma_tiles(size, 128), **changes)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Counts of attention kernels' machine code.")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument(
        "--plain", action="store_true", help="no masks, ranks that reach each other by loads and stores"
    )
    asked = parser.parse_args()
    print(HEAD)
    for arch in asked.arch or ARCHITECTURES:
        for spec in specs(arch, asked.plain):
            kernel = compile_attend(spec, arch, slim_library(arch) if spec.reach != "peer" else None)
            print(row(arch, spec, resources(kernel), inner_loop(kernel)), flush=True)


if __name__ == "__main__":
    main()
