"""The cycle model, and the table's columns."""

from __future__ import annotations

import kernel_code
import pytest
from kernel_code import HEAD, cycles, row, specs

from sfcompile.codegen.kernels.spec import KernelSpec, tma_tiles
from sfcompile.codegen.toolchain.machine_code import Loop, Resources


def test_units_of_an_sm() -> None:
    """128 x 64 scores: 2 x 128 x 64 x 128 multiplications, 8192 exponentials, 8 warps on 4 schedulers."""
    together, turns = (cycles(128, 240.0, 32.0, way) for way in (True, False))
    assert together.tensor == 128 * 64 * 128 * 2 / 2048 == 1024
    assert together.exponentials == 128 * 64 / 16 == 512 and together.issue == 2 * 240
    assert (together.step, together.ceiling) == (1024, 1.0)
    assert turns.step == 1024 + 512 and turns.ceiling == pytest.approx(2 / 3)
    assert cycles(64, 240.0, 33.0, True).ceiling == pytest.approx(512 / 528)


def test_rows() -> None:
    used = Resources(168, 0, 0, 0, 172104)
    loop = Loop(480, 108, 16, 66, 2, 0, 2, 0, 66)
    spec = KernelSpec("bf16", 128, 128, 1.0, **tma_tiles(128, 128))
    line = row(90, spec, used, loop)
    assert len(line) == len(HEAD) and line.split()[-5:] == ["1024", "528", "480", "1024", "1.00"]
    assert line.split()[9] == "240" and row(80, spec, used, loop) == line.rstrip()[: HEAD.index(" tensor")].replace(
        "_90", "_80"
    )


def test_every_kernel_of_a_kind_once() -> None:
    kinds = [(spec.head_dim, spec.reach, spec.mask, spec.causal, spec.fetch) for spec in specs(90, False)]
    assert len(set(kinds)) == len(kinds) == 2 * (2 * 4 + 2 * 3)
    assert {spec.fetch for spec in specs(80, False)} == {"threads"} and len(list(specs(100, True))) == 2
    assert kernel_code.MASKS.keys() == {"none", "causal", "key", "full"}
