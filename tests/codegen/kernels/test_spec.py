"""What kernels are specialised to."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from kernel_ranks import Job, make_site

from sfcompile.codegen.kernels import spec as spec_module
from sfcompile.codegen.kernels.spec import (
    KernelSpec,
    cannot_generate,
    has_tensor_copies,
    schedule_reach,
    spec_of,
    tiles_for,
)
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.errors import UnsupportedError
from sfcompile.options import AS_IT_IS, Wire


def job(**changes: object) -> Job:
    return replace(Job("torus", 2, 2, 2, 2, make_site(64, 4, dtype=torch.bfloat16, head_dim=64)), **changes)  # type: ignore[arg-type]


def test_reach_follows_the_machines() -> None:
    schedule = job().schedule()
    assert spec_of(schedule, 90).reach == "peer"
    assert spec_of(schedule, 90, (0, 0, 1, 1)).reach == "mixed"
    assert spec_of(schedule, 90, (0, 1, 2, 3)).reach == "nvshmem"
    ring = job(kind="ring", ulysses=1, ring=4).schedule()
    assert spec_of(ring, 90, (0, 0, 1, 1)).reach == "mixed" and spec_of(ring, 90).forwards


def test_tails_only_where_chunks_leave_some() -> None:
    assert spec_of(job().schedule(), 90).tails == "none"
    uneven = job(site=make_site([64, 60, 64, 64], 4, dtype=torch.bfloat16, head_dim=64)).schedule()
    assert spec_of(uneven, 90).tails == "apart"


def test_key_is_a_digest_of_everything() -> None:
    spec = KernelSpec("bf16", 64, 64, 0.125)
    assert spec.key == replace(spec).key and spec.key != spec.with_(warps=8).key
    assert spec.element_bytes == 2 and spec.with_(dtype="fp32").element_bytes == 4


@pytest.mark.parametrize("arch", [0, 80, 90, 100, 120])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", [16, 64, 72, 128, 256])
def test_there_are_tiles_for_everything(arch: int, dtype: str, head_dim: int) -> None:
    tiles = tiles_for(arch, dtype, head_dim, head_dim)
    assert tiles["block_m"] >= 16 and tiles["block_n"] >= 16
    KernelSpec(dtype, head_dim, head_dim, 1.0, **tiles)


def test_only_what_travels_is_encoded() -> None:
    """An all-gather leaves queries and outputs at home."""
    site = replace(job().site, wire=Wire(*["fp8"] * 4))
    assert spec_of(job(site=site).schedule(), 90).wire == site.wire
    assert spec_of(job(site=site, kind="allgather").schedule(), 90).wire == Wire(k="fp8", v="fp8")
    assert spec_of(job().schedule(), 90).wire == AS_IT_IS


def test_what_cannot_be_generated_is_refused() -> None:
    odd = make_site(8, 2, dtype=torch.float64)
    assert "float64" in cannot_generate(odd)
    with pytest.raises(UnsupportedError, match="Use attention='aten'"):
        spec_of(job(machines=2, inside=1, ring=1, site=odd).schedule(), 90)


def attention(tokens: int = 128, **changes: object) -> AttentionSchedule:
    site = replace(make_site(tokens, 4, dtype=torch.bfloat16, head_dim=64), **changes)  # type: ignore[arg-type]
    return job(site=site).schedule()  # type: ignore[return-value]


@pytest.fixture
def tensor_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Specs are chosen as with a Triton that has them."""
    monkeypatch.setattr(spec_module, "has_tensor_copies", lambda: True)


@pytest.mark.usefixtures("tensor_copies")
def test_hopper_fetches_by_tensor_copies_where_it_can() -> None:
    spec = spec_of(attention(), 90)
    assert (spec.fetch, spec.block_m, spec.block_n, spec.warps, spec.tails) == ("tma", 128, 128, 4, "none")
    assert spec_of(attention(100), 90).with_(tails="none") == spec.with_(block_n=64)
    assert spec_of(attention(60), 90).fetch == "threads"  # a block would begin before its chunk
    assert spec_of(attention(head_dim=128, v_head_dim=128), 90).fetch == "tma"
    assert spec_of(attention(kv_heads=2), 90).group == 2 and spec_of(attention(kv_heads=2), 90).fetch == "tma"
    assert spec_of(attention(causal=True), 90, mask=("key", False)).fetch == "tma"
    assert {spec_of(attention(causal=True), 90).fetch, spec_of(attention(), 90, mask=("key", True)).fetch} == {"tma"}
    for machines, reach in (((0, 0, 1, 1), "mixed"), ((0, 1, 2, 3), "nvshmem")):
        assert spec_of(attention(), 90, machines) == spec.with_(reach=reach)
    wide = attention(causal=True, head_dim=128, v_head_dim=128)
    assert spec_of(wide, 90).fetch == "tma" and spec_of(wide, 90, (0, 1, 2, 3)).fetch == "threads"  # it would spill
    others = {
        "other GPUs": [spec_of(attention(), arch) for arch in (0, 80, 89, 100, 120)],
        "masks": [spec_of(attention(), 90, mask=("full", True)), spec_of(wide, 90, mask=("key", True))],
        "sizes": [spec_of(attention(v_head_dim=128), 90), spec_of(attention(head_dim=72, v_head_dim=72), 90)],
        "dtypes": [spec_of(attention(dtype=torch.float32), 90), spec_of(attention(wire=Wire(k="fp8")), 90)],
        "tiles by hand": [spec_of(attention(), 90, block_n=64), spec_of(attention(), 90, fetch="threads")],
    }
    assert {name: {spec.fetch for spec in specs} for name, specs in others.items()} == dict.fromkeys(
        others, {"threads"}
    )


def triton_release() -> tuple[int, ...]:
    return tuple(int(number) for number in version("triton").split(".")[:2])


def test_an_older_triton_keeps_the_kernel_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_module, "has_tensor_copies", lambda: False)
    assert spec_of(attention(), 90) == spec_of(attention(), 90, **tiles_for(90, "bf16", 64, 64)).with_(tails="none")
    monkeypatch.undo()
    assert has_tensor_copies() == (triton_release() >= (3, 9))


def test_a_state_has_room_for_what_each_way_keeps() -> None:
    assert KernelSpec("bf16", 64, 40, 1.0).state_words == 64 + 2
    assert KernelSpec("bf16", 128, 128, 1.0, fetch="tma").state_words * 64 == 128 * (64 + 2 + 2)


@pytest.mark.usefixtures("tensor_copies")
def test_the_reach_of_an_attention_is_that_of_what_it_sends() -> None:
    """Keys and values that come from another machine lie in the rank's own heap: to read them takes no NVSHMEM."""
    two = (0, 0, 1, 1)
    gathered = Job("allgather", 2, 2, 2, 2, attention().site, True)
    assert schedule_reach(gathered.schedule(), two) == "mixed"
    spec = spec_of(gathered.schedule(), 90, two)  # type: ignore[arg-type]
    assert (spec.reach, spec.forwards, spec.fetch) == ("peer", True, "tma")
    around = Job("allgather", 2, 2, 2, 2, attention().site, True, "ring")
    assert spec_of(around.schedule(), 90, two).reach == "nvshmem"  # type: ignore[arg-type]
    assert spec_of(attention(), 90, two).reach == schedule_reach(attention(), two)
