from __future__ import annotations

import torch
from random_sites import gather_site

from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.toolchain.files import kernel_files
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology

MESH = Mesh.of(Topology.grid(2, 1), 2, 1)
TOKENS = (((0, 64),), ((64, 64),))
SITE = AttentionSite("site", 1, 2, 2, 64, 64, torch.bfloat16, TOKENS, TOKENS, 0.125)


def test_a_source_for_each_architecture() -> None:
    files = kernel_files(build("torus", SITE, MESH), (0, 0), compile=False)
    assert [name.rsplit("-", 1)[1] for name in files] == ["sm80.py", "sm90.py", "sm100.py"]
    assert all(b"def attend(" in text and b"nvshmem_signal_wait_until" not in text for text in files.values())


def test_machines_decide_what_it_reaches() -> None:
    one, two = (kernel_files(build("torus", SITE, MESH), homes, compile=False) for homes in ((0, 0), (0, 1)))
    assert not set(one) & set(two)


def test_only_attention_has_kernels() -> None:
    assert kernel_files(build("exchange", gather_site(2), MESH), (0, 0)) == {}
