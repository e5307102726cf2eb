"""Every kernel that the generator writes, run from its PTX by all ranks of a job in one world, against fp64.

Tolerances are those of the dtype: products in fp16 or bf16 with sums in fp32; fp32 as three products of TF32.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hopper_text import needs_tensor_copies
from kernel_ranks import Job, make_site
from random_sites import even, rows
from row_forms import forms, traced
from watched import Watch

from ptx.mutants import job_of
from ptx.ranks import AttentionRanks, ExchangeRanks
from sfcompile.codegen.engines.choice import reorders_waits
from sfcompile.codegen.rows.row_ops import compile_rows
from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.runtime.program.sites import ExchangeSite
from sfcompile.runtime.program.topology import Topology

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
SMALL: dict[str, Any] = {"block_m": 32, "block_n": 32, "warps": 4, "stages": 2}
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def check(job: Job, arch: int, seed: int = 0, together: float = 0.9) -> AttentionRanks:
    """Run; no race, no deadlock, right in every epoch."""
    ranks = AttentionRanks(job, arch, seed, together)
    error = ranks.run()
    assert ranks.world.races() == []
    assert error < TOLERANCE[job.site.dtype], error
    return ranks


def small(kind: str, shape: tuple[int, int, int, int], tokens: list[int], net: bool = False, **changes: Any) -> Job:
    """A job on few tokens."""
    site_changes = {name: changes.pop(name) for name in ("causal", "kv_heads", "dtype", "heads") if name in changes}
    site = make_site(tokens, len(tokens), **{"heads": 2, "head_dim": 64, "dtype": FP16} | site_changes)
    options = SMALL | changes.pop("options", {})
    return Job(kind, *shape, site, net=net, epochs=changes.pop("epochs", 2), options=options, **changes)


def test_launches_are_the_real_ones() -> None:
    ranks = check(job_of(80), 80)
    launched = {entry.name: entry for entry in ranks.driver.launched}
    assert set(launched) == {"put", "attend", "collect", "release"}
    assert [launched[name].cooperative for name in ("attend", "put", "collect")] == [True, False, False]
    assert launched["attend"].grid == (2, 1, 1) and launched["attend"].shared_bytes > 0
    assert len(ranks.driver.launched) == ranks.world.launches == 2 * 3 * 6


@pytest.mark.skipif(bool(reorders_waits(90)), reason="ranks on Hopper get no generated kernel with this Triton")
@pytest.mark.parametrize("dtype", [FP16, pytest.param(BF16, marks=pytest.mark.thorough)])
def test_hopper(dtype: torch.dtype) -> None:
    check(job_of(90, dtype=dtype), 90)


@needs_tensor_copies
def test_hopper_by_tensor_copies() -> None:
    """Chunks that a block does not fill and one of two tiles; both warpgroups, and the ring around several times."""
    ranks = check(job_of(90, fetch="tma"), 90)
    assert ranks.kernels[0].spec.fetch == "tma" and ranks.kernels[0].spec.pushes
    ptx = next(text for name, text in ranks.driver.texts if name == "attend")
    assert "cp.async.bulk.tensor" in ptx and "setmaxnreg" in ptx


@needs_tensor_copies
def test_hopper_sends_outputs_home_by_nvshmem() -> None:
    """One warp puts what the last warpgroup of all programs has found complete."""
    ranks = check(job_of(90, net=True, fetch="tma", epochs=2), 90)
    spec = ranks.kernels[0].spec
    assert (spec.fetch, spec.reach, spec.pushes) == ("tma", "nvshmem", True)
    ptx = next(text for name, text in ranks.driver.texts if name == "attend_nvshmem")
    assert "putmem_signal_nbi_warp" in ptx and "putmem_signal_nbi_block" not in ptx


@needs_tensor_copies
@pytest.mark.thorough
@pytest.mark.parametrize(("net", "late"), [(False, False), (True, False), (True, True)])
def test_a_chunk_that_never_comes_ends_every_warp_and_nothing_leaves(net: bool, late: bool) -> None:
    """The warp that fetches gives up, those that attend get what is there: no output goes home, no signal is raised.
    ``late``: a program begins after that and does nothing; the one that puts outputs does not wait for it."""
    job = replace(job_of(90, net=net, fetch="tma"), epochs=1)

    def dropped(name: str, text: str) -> str:
        changed, times = re.subn(r"^.*atom\.global\.sys\.release\.exch.*$", "", text, flags=re.MULTILINE)
        assert times or net or name != "put"
        return changed if name == "put" else text

    def impatient(name: str, source: str) -> str:
        source = source.replace("LOOK_EVERY = tl.constexpr(256)", "LOOK_EVERY = tl.constexpr(1)")
        if late and name == "attend":
            source = source.replace("num_units *= going", "num_units *= going * (program < 2).to(tl.int32)")
        return source.replace("signal, SIGNAL_SET", "0, SIGNAL_SET") if name == "put" else source

    ranks = AttentionRanks(job, 90, change=dropped, edit=impatient)
    watches = [Watch(1e-3) for _ in range(job.ranks)]
    for watch in watches:
        for words in (watch.words, watch.abort):
            ranks.world.memory.add(words.data_ptr(), words.nbytes, "a status", words)
    ranks.heaps.watches = watches
    ranks.run()
    assert ranks.world.launches == len(ranks.driver.launched)
    assert all(watch.status["gave_up"] for watch in watches)
    schedule, size = ranks.kernels[0].schedule, ranks.heaps.size
    for rank in range(job.ranks):
        homes = [entry.slot for entry in schedule.program(rank).arrivals if entry.tensor == "o"]
        assert homes and not any(ranks.heaps.word(rank, size.signal_at(1, slot)) for slot in homes)


CASES = {
    "ring that passes chunks on": (small("usp", (1, 3, 1, 3), [40, 24, 33]), 80),
    "two machines": (small("torus", (2, 2, 2, 2), [24, 17, 33, 8], True), 80),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", list(CASES))
def test_links(name: str) -> None:
    check(*CASES[name])


MORE = {
    "nvshmem only": (job_of(80, True), 80),
    "fp32": (job_of(80, dtype=FP32), 80),
    "fp32 on hopper": (job_of(90, dtype=FP32), 90),
    "bf16": (job_of(80, dtype=BF16), 80),
    "causal, grouped heads": (small("usp", (1, 2, 1, 2), [40, 24], causal=True, kv_heads=1), 80),
    "causal on hopper": (small("usp", (1, 2, 1, 2), [40, 24], causal=True, options={"block_m": 64}), 90),
    "mask of keys": (small("usp", (1, 2, 2, 1), [40, 24], mask="key"), 80),
    "whole mask, added": (small("usp", (1, 2, 2, 1), [40, 24], mask="full", mask_is_bool=False), 80),
    "whole mask, added, on hopper": (
        small("usp", (1, 2, 2, 1), [40, 24], mask="full", mask_is_bool=False, options={"block_m": 64}),
        90,
    ),
    "torus in one machine": (small("torus", (2, 2, 2, 2), [24, 17, 33, 8]), 80),
    "torus in parts": (small("torus", (2, 2, 2, 2), [24, 17, 33, 8], parts=(2, 3)), 80),
    "softmax state kept": (small("torus", (2, 2, 2, 2), [24, 17, 33, 8], merge=False), 80),
    "all gathered": (small("allgather", (1, 3, 1, 3), [40, 0, 33]), 80),
    "torus of two machines on hopper": (
        small("torus", (2, 2, 2, 2), [24, 17, 33, 8], True, options={"block_m": 64}),
        90,
    ),
}


def copied(kind: str, shape: tuple[int, int, int, int], tokens: list[int], **changes: Any) -> Job:
    """A job of the kernel that fetches by tensor copies."""
    tile = {"fetch": "tma", "block_m": 128, "block_n": 32, "warps": 4, "stages": 2} | changes.pop("tile", {})
    sizes = {name: changes.pop(name) for name in ("batch", "head_dim") if name in changes}
    job = small(kind, shape, tokens, options=tile, **changes)
    return replace(
        job, site=replace(job.site, **sizes, **({"v_head_dim": sizes["head_dim"]} if "head_dim" in sizes else {}))
    )


def striped(job: Job) -> Job:
    """Ranks hold tokens by turns of 24, the later ones first: blocks that end between runs, positions that go down."""
    counts = [sum(n for _, n in places) for places in job.site.q_positions]
    runs: list[list[tuple[int, int]]] = [[] for _ in counts]
    at, rank = 0, 0
    while any(counts):
        rank = (rank + 1) % len(counts)
        length = min(24, counts[rank])
        runs[rank] = [*([(at, length)] if length else []), *runs[rank]]
        counts[rank] -= length
        at += length
    places = tuple(tuple(entry) for entry in runs)
    return replace(job, site=replace(job.site, q_positions=places, kv_positions=places))


COPIED = {
    "ring that passes chunks on": copied("usp", (1, 3, 1, 3), [40, 32, 75]),
    "a rank without tokens": copied("ring", (1, 3, 1, 3), [40, 0, 75]),
    "torus": copied("torus", (2, 2, 2, 2), [33, 64, 33, 40]),
    "softmax state kept": copied("torus", (2, 2, 2, 2), [33, 64, 33, 40], merge=False),
    "torus in parts": copied("torus", (2, 1, 2, 1), [66, 72], parts=(2, 2)),
    "all gathered": copied("allgather", (1, 3, 1, 3), [40, 0, 133]),
    "grouped heads": copied("usp", (1, 2, 1, 2), [40, 150], kv_heads=1),
    "full blocks only": copied("usp", (1, 2, 2, 1), [64, 128]),
    "head size 128, bf16, batch 2": copied(
        "usp", (1, 2, 2, 1), [150, 64], dtype=BF16, head_dim=128, batch=2, tile={"block_n": 64}
    ),
    "three stages": copied("ring", (1, 2, 1, 2), [40, 150], tile={"stages": 3}),
    "all gathered, from two machines": copied("allgather", (2, 2, 2, 2), [40, 64, 33, 75], net=True),
    "outputs home by NVSHMEM, head size 128, bf16": copied(
        "torus", (2, 1, 2, 1), [150, 64], net=True, dtype=BF16, head_dim=128, batch=2, tile={"block_n": 64}
    ),
    "outputs home to two machines": copied("torus", (2, 2, 2, 2), [33, 64, 33, 40], net=True),
    "outputs home to two machines, state kept, causal": copied(
        "torus", (2, 2, 2, 2), [33, 64, 133, 40], net=True, causal=True, merge=False
    ),
    "outputs home, to a rank without tokens too": copied("torus", (2, 1, 2, 1), [150, 0], net=True, epochs=4),
    "outputs home in parts by NVSHMEM": copied("torus", (2, 1, 2, 1), [66, 72], net=True, parts=(2, 2)),
    "outputs home by NVSHMEM, mask of keys": copied("torus", (2, 1, 2, 1), [40, 150], net=True, mask="key"),
    "passed on between machines": copied("ring", (3, 1, 1, 3), [40, 32, 75], net=True, across="ring", epochs=4),
    "passed on between machines of two": copied("usp", (2, 2, 2, 2), [40, 32, 75, 64], net=True, across="ring"),
    "causal": copied("usp", (1, 2, 2, 1), [150, 203], causal=True),
    "causal, state kept, grouped heads": copied(
        "torus", (2, 2, 2, 2), [33, 64, 133, 40], causal=True, merge=False, kv_heads=1, heads=4
    ),
    "causal, positions in stripes": striped(copied("ring", (1, 2, 1, 2), [140, 150], causal=True)),
    "mask of keys": copied("usp", (1, 2, 1, 2), [40, 150], mask="key", batch=2),
    "mask of keys, added, head size 128": copied(
        "usp", (1, 2, 2, 1), [150, 64], mask="key", mask_is_bool=False, head_dim=128, dtype=BF16, tile={"block_n": 64}
    ),
    "mask of keys, least numbers": copied(
        "usp", (1, 2, 2, 1), [40, 150], mask="key", mask_is_bool=False, least=True, batch=2
    ),
    "causal mask of keys": copied("usp", (1, 2, 2, 1), [96, 203], causal=True, mask="key"),
}


@needs_tensor_copies
@pytest.mark.thorough
@pytest.mark.parametrize("name", list(COPIED))
def test_by_tensor_copies(name: str) -> None:
    check(COPIED[name], 90, len(name), 0.2 if name == "a rank without tokens" else 0.9)


@pytest.mark.thorough
@pytest.mark.parametrize("name", list(MORE))
def test_more(name: str) -> None:
    check(*MORE[name])


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(1, 9))
def test_other_orders(seed: int) -> None:
    """The same on other roads; warps for themselves at every other seed."""
    check(job_of(80), 80, seed, (0.1, 0.9)[seed % 2])
    check(replace(job_of(90), epochs=2), 90, seed, (0.1, 0.9)[seed % 2])
    check(CASES["two machines"][0], 80, seed)


@pytest.mark.thorough
@pytest.mark.parametrize("machine_of", [(0, 0, 0), (0, 1, 2), (0, 0, 1)], ids=["peer", "nvshmem", "mixed"])
def test_exchanges(machine_of: tuple[int, ...]) -> None:
    """Gathers are bitwise."""
    whole = torch.randn(2, 6, 5)
    mesh = Mesh.of(Topology.grid(3, 1), 3, 1)
    gather = build_exchange(ExchangeSite.gather("g", (2, 6, 5), torch.float32, 1, even(6, 3)), mesh)
    ranks = ExchangeRanks(gather, machine_of)
    outs = ranks.run([whole[:, rows(owned)] for owned in even(6, 3)], [whole] * 3, 4)
    assert ranks.world.races() == []
    assert all(torch.equal(out, whole) for epoch in outs for out in epoch)


@pytest.mark.thorough
@pytest.mark.parametrize("waits", [True, False])
def test_a_wait_of_the_stream_orders_the_kernels_behind_it(waits: bool) -> None:
    """The kernel that receives does not wait itself here: the stream does, or chunks are read too early."""

    def without_wait(name: str, source: str) -> str:
        return re.sub(r"^ +wait_word\(signals.*\n", "", source, flags=re.MULTILINE) if name == "receive" else source

    whole, owned = torch.randn(2, 6, 5), even(6, 2)
    mesh = Mesh.of(Topology.grid(2, 1), 2, 1)
    gather = build_exchange(ExchangeSite.gather("g", (2, 6, 5), torch.float32, 1, owned), mesh)
    ranks = ExchangeRanks(gather, (0, 0), edit=without_wait, stream_waits=waits)
    outs = ranks.run([whole[:, rows(mine)] for mine in owned], [whole] * 2, 4)
    right = all(torch.equal(out, whole) for epoch in outs for out in epoch)
    assert (right and ranks.world.races() == []) == waits


@pytest.mark.parametrize("mutant", ["", "relaxed"])
def test_a_word_told_on_a_stream_is_behind_what_the_stream_held(mutant: str) -> None:
    """The kernel that sends raises no signal here: kernels behind it do (runtime/gpu/stores.py)."""

    def without_signal(name: str, source: str) -> str:
        return re.sub(r"^( +)raise_signal\(.*\n", r"\1pass\n", source, flags=re.MULTILINE) if name == "send" else source

    def relaxed(name: str, ptx: str) -> str:
        return ptx.replace("atom.global.sys.release.exch", "atom.global.sys.relaxed.exch") if name == "tell" else ptx

    whole, owned = torch.randn(2, 6, 5), even(6, 2)
    mesh = Mesh.of(Topology.grid(2, 1), 2, 1)
    gather = build_exchange(ExchangeSite.gather("g", (2, 6, 5), torch.float32, 1, owned), mesh)
    change = relaxed if mutant else None
    ranks = ExchangeRanks(gather, (0, 0), change=change, edit=without_signal, stream_waits=True, stream_tells=True)
    outs = ranks.run([whole[:, rows(mine)] for mine in owned], [whole] * 2, 4)
    right = all(torch.equal(out, whole) for epoch in outs for out in epoch)
    assert (right and ranks.world.races() == []) == (mutant == "")


@pytest.mark.thorough
@pytest.mark.parametrize("name", list(forms()))
def test_puts_that_compute(name: str) -> None:
    """What a fused put leaves on every rank is what a plain put of the same rows leaves, but for rounding."""
    fn, sources = forms(BF16, 64)[name]
    gm, root = traced(fn, sources)
    inline = frozenset(node for node in gm.graph.nodes if node.op == "call_function")
    program, read = compile_rows(root, inline)  # in the order in which the program meets its sources
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    length = fn(*sources).shape[2]
    site = make_site(length, 2, heads=2, head_dim=64, dtype=BF16, batch=2)
    given = [[x * (1 if rank else 0.5) for x in sources] for rank in range(2)]
    banks = []
    for fused in (True, False):
        ranks = AttentionRanks(Job("usp", 1, 2, 2, 1, site, options=SMALL), 80)
        views = [ranks.heaps.view(rank, 1, ranks.kernels[rank].schedule) for rank in range(2)]
        for rank, (main, _) in enumerate(ranks.streams):
            with ranks.driver.on(main):
                if fused:
                    by_node = dict(zip(placeholders, given[rank], strict=True))
                    ranks.kernels[rank].put_fused("q", program, [by_node[node] for node in read], views[rank])
                else:
                    ranks.kernels[rank].put("q", fn(*given[rank]), views[rank])
        ranks.world.run()
        assert ranks.world.races() == []
        banks.append([ranks.heaps.bank(rank, 1, BF16).clone() for rank in range(2)])
    for got, want in zip(*banks, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)
        assert want.float().abs().sum() > 1
