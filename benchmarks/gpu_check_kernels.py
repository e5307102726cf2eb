"""Sections of benchmarks/gpu_check.py: numerics of every variant, virtual ranks in one launch or in several, the same
under Triton's sanitizer, bounded waits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from gpu_check_report import Bench, compare, distance, exact, inputs_of, name_of, sdpa, site_of
from virtual_ranks import VirtualRanks

from sfcompile.codegen.engines.launch import mask_kind
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.kernels.spec import has_tensor_copies
from sfcompile.codegen.schedule.builders import BUILDERS, build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.errors import RuntimeTimeoutError
from sfcompile.options import Wire
from sfcompile.runtime.program.instructions import RankProgram
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.wires.symmetric_heap import STATUS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (32, 64, 72, 96, 128, 256)
VARIANTS = (
    "plain", "lse", "key mask", "added key mask", "full mask", "bias", "causal", "grouped heads",
)  # fmt: skip
MESHES = {"ulysses": {2: (2, 1), 4: (4, 1)}, "ring": {2: (1, 2), 4: (1, 4)}, "usp": {2: (1, 2), 4: (2, 2)}}
TORUS_MESHES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}
WIRE_LIMITS = {"fp8": 6e-2, "bf16": 6e-3}
"""||out - want|| / ||want||, at most, of an attention of random values whose chunks all travel so."""
TOKENS: dict[int, Sequence[int]] = {2: (700, 900), 4: (512, 333, 0, 700)}
"""Of each of so many ranks."""
SPINS = 1 << 26
"""Polls of a debug build (codegen/kernels/device.py)."""


def schedule_of(site: AttentionSite, kind: str = "torus") -> Schedule:
    """A schedule on one machine per rank; two of two for four ranks."""
    ranks = len(site.q_positions)
    machines = min(ranks, 2)
    across = "ring" if kind == "usp" else "ulysses"
    mesh = Mesh.of(Topology.grid(machines, ranks // machines), *MESHES.get(kind, TORUS_MESHES)[ranks], across)
    return build(kind, site, mesh)


def numerics(bench: Bench) -> None:
    """Every variant of the attention kernel on one rank, against fp64."""
    every = [(dtype, size, variant) for size in HEAD_DIMS for dtype in DTYPES for variant in VARIANTS]
    if bench.dry:
        every = [case for case in every if case[:2] == (torch.float16, 32)]
        every += [(torch.bfloat16, 72, "plain"), (torch.float32, 32, "lse")]
    for dtype, size, variant in bench.mine(every):
        name = f"{name_of(dtype)} D={size} {variant}"
        with bench.case(name):
            _variant(bench, name, dtype, size, variant)


def _variant(bench: Bench, name: str, dtype: torch.dtype, size: int, variant: str) -> None:
    # Whole blocks of keys in one of them, a block that keys do not fill in all others.
    tokens = (64 if bench.dry else 1024) if variant == "lse" else (50 if bench.dry else 1000)
    heads = 2 if bench.dry else 4
    masked = "mask" in variant or variant == "bias"
    site = site_of(
        [tokens], heads, size, dtype, heads // 2 if variant == "grouped heads" else None, variant == "causal", masked,
        batch=2 if variant == "full mask" else 1,
    )  # fmt: skip
    q, k, v = inputs_of(site, bench.device)
    mask, kind = None, ("none", True)
    if masked:
        whole = variant in ("full mask", "bias")
        shape = (site.batch, heads if whole else 1, tokens if whole else 1, tokens)
        kind = ("full" if whole else "key", variant in ("key mask", "full mask"))
        mask = torch.randn(shape, device=bench.device)
        mask = mask < 0.5 if kind[1] else mask.to(dtype)
    if variant == "full mask" and mask is not None:
        mask[0, 0, 3] = False  # a query that sees nothing
    ranks = VirtualRanks(schedule_of(site), KernelTarget(bench.device), mask=kind, lse=variant == "lse")
    ranks.put(q, k, v)
    outs = ranks.outputs()
    lse = torch.empty(site.batch, heads, tokens, device=bench.device) if variant == "lse" else None
    ranks.kernels[0].run(outs[0], ranks.everyone, mask, lse)
    out = ranks.finish(outs)
    want, sums = exact(site, q, k, v, mask)
    compare(bench, name, site, out, want, sdpa(site, q, k, v, mask))
    if lse is not None:
        worst = float((lse.double() - sums).abs().max())
        bench.check(worst < (1e-4 if dtype == torch.float32 else 2e-3), f"{name}: log-sum-exp off by {worst:.1e}")


def virtual(bench: Bench) -> None:
    """Every schedule on 2 and 4 ranks in one launch, three epochs."""
    types = ((torch.bfloat16, 64), (torch.float16, 128), (torch.float32, 64))
    every = [(kind, ranks, *entry, "same") for kind in BUILDERS for ranks in (2, 4) for entry in types]
    every += [("torus", 4, *types[0], "fp8"), ("ring", 2, *types[1], "fp8"), ("torus", 2, *types[2], "bf16")]
    if bench.dry:
        every = [("torus", 4, torch.float16, 32, "fp8"), ("ring", 4, torch.float32, 32, "same")]
    for kind, ranks, dtype, size, wire in bench.mine(every):
        name = f"{kind} on {ranks} ranks, {name_of(dtype)} D={size}" + (f", wire {wire}" if wire != "same" else "")
        with bench.case(name):
            run_virtual(bench, name, kind, ranks, dtype, size, wire=wire)


def run_virtual(
    bench: Bench, name: str, kind: str, ranks: int, dtype: torch.dtype, size: int,
    target: KernelTarget | None = None, wire: str = "same", **where: Any,
) -> VirtualRanks:  # fmt: skip
    """Three epochs of a schedule on virtual ranks (one in a dry run), each with values of its own.

    Args:
        wire: how q, k, v and outputs travel.
        where: of VirtualRanks.
    """
    tokens: Sequence[int] = TOKENS[ranks]
    if bench.dry:
        tokens = [n // 20 for n in tokens]
    site = replace(site_of(tokens, 4 if bench.dry else 8, size, dtype), wire=Wire(*[wire] * 4))
    made = VirtualRanks(schedule_of(site, kind), target or KernelTarget(bench.device), **where)
    q, k, v = inputs_of(site, bench.device)
    for epoch in range(1, 2 if bench.dry else 4):
        again = v * (-1) ** epoch
        out = made.run(q, k, again)
        bench.sync()
        want = exact(site, q, k, again, None)[0]
        if wire == "same":
            compare(bench, f"{name}, epoch {epoch}", site, out, want, sdpa(site, q, k, again, None))
        else:
            error, limit = distance(out, want), WIRE_LIMITS[wire]
            bench.check(1e-5 < error <= limit, f"{name}, epoch {epoch}: error {error:.2e}, limit {limit:.2e}")
    return made


def apart(bench: Bench) -> None:
    """Ranks as launches of their own, side by side and each on a few programs: on Hopper by the kernel whose tiles a
    warp of its own fetches, which is written for one rank a launch."""
    half, brain = torch.float16, torch.bfloat16
    every = [
        ("ulysses", 2, brain, 64, ""), ("ring", 2, half, 128, ""), ("usp", 4, brain, 128, ""),
        ("torus", 4, half, 64, ""), ("ulysses", 2, brain, 128, "causal"), ("ring", 2, half, 64, "causal"),
        ("ulysses", 2, half, 128, "key"), ("usp", 4, brain, 64, "key"), ("torus", 4, brain, 64, "causal key"),
    ]  # fmt: skip
    for kind, ranks, dtype, size, hides in bench.mine([("ulysses", 2, half, 32, "causal key")] if bench.dry else every):
        name = f"{kind} on {ranks} ranks, {name_of(dtype)} D={size}{f', {hides}' if hides else ''}, a launch each"
        with bench.case(name):
            run_apart(bench, name, kind, TOKENS[ranks], dtype, size, hides)


def run_apart(
    bench: Bench, name: str, kind: str, tokens: Sequence[int], dtype: torch.dtype, size: int, hides: str,
    fetch: str = "", epochs: int = 3, limit_s: float = 20.0, target: KernelTarget | None = None, **where: Any,
) -> VirtualRanks:  # fmt: skip
    """Epochs of a schedule on virtual ranks that are launches of their own.

    Args:
        hides: "causal", "key" (a mask of padding), both or neither.
        fetch: see KernelSpec; "": the best here.
        target: None: a few programs of this GPU for each rank.
        where: of VirtualRanks.
    """
    tokens = [n // 20 for n in tokens] if bench.dry else tokens
    site = site_of(tokens, 4 if bench.dry else 8, size, dtype, causal="causal" in hides)
    mask = None
    if "key" in hides:  # some keys here and there, and those of the last quarter
        mask = torch.rand(1, 1, 1, sum(tokens), generator=torch.Generator().manual_seed(5)) < 0.99
        mask[..., sum(tokens) * 3 // 4 :] = False
        mask = mask.to(bench.device)
    target = target or KernelTarget(bench.device, programs=2 if bench.dry else 8)
    copied = 90 <= target.architecture < 100 and has_tensor_copies()
    fetch = fetch or ("tma" if copied else "threads")
    made = VirtualRanks(schedule_of(site, kind), target, mask=mask_kind(mask), limit_s=limit_s, fetch=fetch, **where)
    streams = [None if bench.dry else torch.cuda.Stream(bench.device) for _ in made.kernels]
    q, k, v = inputs_of(site, bench.device)
    for epoch in range(1, 2 if bench.dry else 1 + epochs):
        again = v * (-1) ** epoch
        made.put(q, k, again)
        outs = made.outputs()
        bench.sync()
        for rank, kernel in enumerate(made.kernels):
            with torch.cuda.stream(streams[rank]):
                kernel.run(outs[rank], made.heaps[rank], mask=mask)
        bench.sync()
        made.check()
        out, want = made.finish(outs), exact(site, q, k, again, mask)[0]
        compare(bench, f"{name}, epoch {epoch}", site, out, want, sdpa(site, q, k, again, mask))
    return made


def sanitizer(bench: Bench) -> None:
    """Puts, attention and collects of two ranks, small, in kernels that Triton's concurrency sanitizer (ConSan) has
    instrumented: an access of shared memory that nothing orders stops the kernel with an assertion of the device.

    It looks at shared memory alone, not at what ranks store into each other's.
    """
    architecture = KernelTarget(bench.device).architecture
    lacking = no_sanitizer(architecture)
    if lacking:
        bench.tell("skip", f"Triton's concurrency sanitizer: {lacking}")
        return
    import triton

    def scratch(size: int, align: int, stream: int | None) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int8, device=bench.device)

    triton.knobs.compilation.instrumentation_mode = "consan"  # this process runs nothing else
    triton.set_allocator(scratch)
    if hasattr(
        triton.runtime._allocation, "set_profile_allocator"
    ):  # where 3.9's instrumented kernels keep their state
        triton.runtime._allocation.set_profile_allocator(scratch)
    for fetch in ("threads", "tma") if 90 <= architecture < 100 and has_tensor_copies() else ("threads",):
        name = f"ulysses on 2 ranks, fp16 D=64, tiles copied by {fetch}, instrumented"
        with bench.case(name):
            start = time.perf_counter()
            made = run_apart(bench, name, "ulysses", (400, 240), torch.float16, 64, "", fetch, 2, 60.0)
            kernel = made.kernels[0]
            values = kernel.values(made.outputs()[0], made.heaps[0], None)
            built = kernel.kernel.warmup(*values, grid=(1,), **kernel.options)
            bench.check("__assertfail" in built.asm["ptx"], f"{name}: the kernel has the sanitizer's assertions in it")
            bench.note(f"{name}: none failed; {time.perf_counter() - start:.0f} s with compiling")


def no_sanitizer(architecture: int) -> str:
    """Why Triton's concurrency sanitizer cannot run here; "" if it can."""
    if not architecture:
        return "Triton's interpreter compiles nothing that could be instrumented"
    if architecture < 90:
        return f"on sm_{architecture} it ends the compiler (Triton 3.9: no instruction for elect.sync); it takes sm_90"
    try:
        from triton import knobs
        from triton._C.libtriton import passes
        from triton.backends.nvidia.compiler import CUDAOptions
    except ImportError as error:
        return f"this Triton has another layout ({error})"
    lacks = [] if hasattr(knobs.compilation, "instrumentation_mode") else ["knobs.compilation.instrumentation_mode"]
    lacks += [] if "instrumentation_mode" in CUDAOptions.__dataclass_fields__ else ["the option instrumentation_mode"]
    lacks += [] if hasattr(passes.ttgpuir, "add_concurrency_sanitizer") else ["the pass of the sanitizer"]
    return f"this Triton has none: it lacks {', '.join(lacks)}" if lacks else ""


def bounded(bench: Bench) -> None:
    """The last V never comes: the kernel ends when its time is up, at once when it is told to, and says who waited."""
    site = site_of([40, 24] if bench.dry else [512, 512], 4, 32 if bench.dry else 64, torch.float16)
    q, k, v = inputs_of(site, bench.device)
    for limit_s in (0.5,) if bench.dry else (0.5, 3.0):
        with bench.case(f"waits give up after {limit_s} s"):
            ranks = VirtualRanks(without_last_put(schedule_of(site)), KernelTarget(bench.device), limit_s=limit_s)
            ranks.put(q, k, v)
            outs = ranks.outputs()
            ranks.attend(outs)  # compiled here
            bench.sync()
            for abort in (0, 1):
                ranks.status.zero_()
                ranks.status[len(STATUS)] = abort
                start = time.perf_counter()
                ranks.attend(outs)
                bench.sync()
                took = time.perf_counter() - start
                try:
                    ranks.check()
                except RuntimeTimeoutError as error:
                    named = (error.rank is not None, error.slot is not None, error.epoch, error.seen_epoch)
                    bench.check(named == (True, True, 1, 0), " ".join(str(error).split()))
                else:
                    bench.check(False, f"nothing was reported after {took:.2f} s")
                late = bench.dry or (took < limit_s / 2 if abort else limit_s <= took < limit_s + 1.0)
                bench.check(late, f"{'told to stop' if abort else 'left alone'}: ended after {took:.3f} s")


def without_last_put(schedule: Schedule) -> Schedule:
    """The same, but nobody sends its last part of V."""
    phases = dict(schedule.origin.phases)
    phases["put_v"] = phases["put_v"][:-1]
    return replace(schedule, origin=RankProgram(0, phases, schedule.origin.arrivals))
