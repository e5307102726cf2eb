"""Kernels of a schedule as files and a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kernel_ranks import Job, make_site
from random_sites import gather_site

from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.toolchain.listing import HEAD, compiled_kernels, line, reach_waits, write_kernels
from sfcompile.errors import CodegenError, UnsupportedError
from sfcompile.runtime.program.topology import Topology

SITE = make_site(128, 2, 2, torch.bfloat16, 64)


@pytest.mark.thorough  # the kernels of such schedules are compiled in test_compiler.py
def test_files_and_table_of_a_schedule_between_machines(tmp_path: Path) -> None:
    schedule = Job("torus", 2, 1, 2, 1, SITE).schedule()
    rows = write_kernels(schedule, (0, 1), [90], tmp_path)
    names = {row.kernel for row in rows}
    assert {"put-qk", "put-v", "collect", "release"} < names and any(name.startswith("attend") for name in names)
    for row in rows:
        assert row.linked and row.resources.spill_stores == 0 and row.resources.registers > 0
        for file in row.files:
            assert (tmp_path / file).stat().st_size > 0
    table = (tmp_path / "table.txt").read_text().splitlines()
    assert table[0] == HEAD and table[1:] == [line(row) for row in rows]
    assert len(json.loads((tmp_path / "table.json").read_text())) == len(rows)
    assert "torus ulysses 2 x ring 1" in (tmp_path / "schedule.txt").read_text()
    attend = next(row for row in rows if row.kernel.startswith("attend"))
    assert [name for name, _ in attend.order].count("mma") >= 1 and "wait" in dict(attend.order)
    assert (tmp_path / f"{attend.kernel}.py").read_text().startswith('"""Attention of bf16 queries')


def test_gathers_are_listed_too_and_calls_can_stay_open() -> None:
    gather = build_exchange(gather_site(2), Mesh.of(Topology.grid(2, 1), 2, 1))
    kernels = dict(compiled_kernels(gather, 90, (0, 1), link=False))
    assert set(kernels) == {"send", "receive", "release"}
    assert not kernels["send"].linked and "nvshmemx_putmem_signal_nbi_block" in kernels["send"].ptx
    assert not reach_waits(gather) and reach_waits(Job("torus", 2, 1, 2, 1, SITE).schedule())


def test_what_cannot_be_written_or_generated(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CodegenError, match="cannot be written"):
        write_kernels(Job("torus", 2, 1, 2, 1, SITE).schedule(), (0, 0), [90], tmp_path / "file")
    wide = Job("torus", 2, 1, 2, 1, make_site(8, 2, dtype=torch.float64)).schedule()
    with pytest.raises(UnsupportedError, match="float64"):
        list(compiled_kernels(wide, 90, (0, 0)))
