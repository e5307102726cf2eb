"""Sections of benchmarks/gpu_check.py that are timed alone: attention beside torch's, cost of pushes, a whole model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from gpu_check_kernels import schedule_of
from gpu_check_report import Bench, distance, inputs_of, name_of, site_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from virtual_ranks import VirtualRanks

from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.kernels.tables import QUERY

LENGTHS = (4096, 16384, 36864)
HEADS = 24
GOAL = 0.9
"""Of the best of torch's kernels."""
PUT_GOAL = 0.03
"""What interleaved pushes may cost."""
TILES: dict[int, tuple[tuple[int, int, int, int], ...]] = {
    64: ((128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (256, 64, 8, 3)),
    128: ((128, 64, 8, 2), (128, 128, 8, 2), (128, 32, 8, 4), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3)),
}
"""Head size -> (block_m, block_n, warps, stages) to try beside the table of codegen/kernels/spec.py."""


def timed(bench: Bench, functions: Mapping[str, Callable[[], object]], rounds: int = 9) -> dict[str, float]:
    """Median seconds of each, measured in turns."""
    calls = {}
    for name, function in functions.items():
        function()
        bench.sync()
        start = time.perf_counter()
        function()
        bench.sync()
        # Long enough that the launches of one turn are enqueued while its first runs.
        calls[name] = 1 if bench.dry else max(1, min(20, int(3e-3 / (time.perf_counter() - start)) + 1))
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(1 if bench.dry else rounds):
        for name, function in functions.items():
            found[name].append(_turn(bench, function, calls[name]))
    return {name: statistics.median(values) for name, values in found.items()}


def _turn(bench: Bench, function: Callable[[], object], calls: int) -> float:
    if bench.dry:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(2_000_000)  # about 1 ms: the first launch is enqueued before the clock starts
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


@dataclass
class Call:
    """A launch of rank 0's attention, its q, k and v in place; it keeps the heaps that the launch reads."""

    ranks: VirtualRanks
    out: torch.Tensor

    def __call__(self) -> None:
        self.ranks.kernels[0].run(self.out, self.ranks.everyone)

    @property
    def tile(self) -> dict[str, object]:
        """Entries of KernelSpec that were tried."""
        spec = self.ranks.kernels[0].spec
        return {name: getattr(spec, name) for name in ("fetch", "block_m", "block_n", "warps", "stages")}

    def built(self) -> str:
        """Registers, spills and shared memory of the kernel as the driver loaded it."""
        kernel = self.ranks.kernels[0]
        values = kernel.values(self.out, self.ranks.everyone, None)
        compiled = kernel.kernel.warmup(*values, grid=(1,), **kernel.options)
        compiled._init_handles()
        return f"{compiled.n_regs} registers, {compiled.n_spills} spilled, {compiled.metadata.shared} bytes shared"


def kernel_of(bench: Bench, length: int, size: int, **tiles: Any) -> Call:
    """A call of the generated kernel on one rank."""
    ranks = VirtualRanks(schedule_of(_site(bench, length, size)), KernelTarget(bench.device), **tiles)
    ranks.put(*inputs_of(ranks.site, bench.device))
    return Call(ranks, ranks.outputs()[0])


def _site(bench: Bench, length: int, size: int) -> Any:
    return site_of([length], 2 if bench.dry else HEADS, size, torch.bfloat16)


def _flops(bench: Bench, length: int, size: int) -> float:
    return 4.0 * (2 if bench.dry else HEADS) * length * length * size


def tiles(bench: Bench) -> None:
    """Compiles what ``speed`` tries, several processes at a time: Triton keeps what it compiled."""
    wanted = [(size, entry) for size, entries in TILES.items() for entry in entries]
    for size, (m, n, warps, stages) in bench.mine(wanted if not bench.dry else wanted[:1]):
        with bench.case(f"D={size} tile {m} x {n}, {warps} warps, {stages} stages"):
            length = 128 if bench.dry else 4096
            kernel_of(bench, length, size, block_m=m, block_n=n, warps=warps, stages=stages)()
            bench.sync()


def speed(bench: Bench) -> None:
    """The kernel beside cuDNN and flash attention, at the tile of the table; then other tiles."""
    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    if bench.dry:
        backends = {"math": SDPBackend.MATH}
    for size in (32,) if bench.dry else (64, 128):
        for length in (64,) if bench.dry else LENGTHS:
            with bench.case(f"D={size} L={length}"):
                _beside(bench, size, length, backends)
        with bench.case(f"tiles and last blocks of D={size}"):
            bench.figure("tiles", size, _tiles(bench, size) | {"tails": _tails(bench, size)})


def _beside(bench: Bench, size: int, length: int, backends: Mapping[str, SDPBackend]) -> None:
    q, k, v = inputs_of(_site(bench, length, size), bench.device)

    def theirs(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    functions: dict[str, Callable[[], object]] = {"ours": kernel_of(bench, length, size)}
    for name, backend in backends.items():
        try:
            theirs(backend)
        except RuntimeError as error:
            bench.tell("skip", f"{name} at D={size} L={length}: {str(error).splitlines()[0][:120]}")
        else:
            functions[name] = partial(theirs, backend)
    seconds = timed(bench, functions)
    rates = {name: _flops(bench, length, size) / value / 1e12 for name, value in seconds.items()}
    listed = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    best = max((rate for name, rate in rates.items() if name != "ours"), default=float("nan"))
    ratio = rates["ours"] / best
    kind = "note" if bench.dry else "ok" if ratio >= GOAL else "MISS"
    bench.tell(kind, f"D={size} L={length} bf16, TFLOP/s: {listed}; ours is {ratio:.2f} of the best (goal {GOAL})")


def _tiles(bench: Bench, size: int) -> dict[str, object]:
    """The fastest, as entries of KernelSpec."""
    length = 128 if bench.dry else 16384
    functions = {"of the defaults": kernel_of(bench, length, size)}
    tried = {"of the defaults": functions["of the defaults"].tile}
    for m, n, warps, stages in TILES.get(size, ()):
        name = f"{m} x {n}, {warps} warps, {stages} stages"
        with bench.case(f"D={size} tile {name}"):
            call = kernel_of(bench, length, size, block_m=m, block_n=n, warps=warps, stages=stages)
            call()
            functions[name], tried[name] = call, call.tile
    seconds = timed(bench, functions, 5)
    for name, value in sorted(seconds.items(), key=lambda entry: entry[1]):
        rate = _flops(bench, length, size) / value / 1e12
        built = "" if bench.dry else f"; {functions[name].built()}"
        bench.note(f"D={size} L={length} tile {name}: {rate:.1f} TFLOP/s{built}")
    return dict(tried[min(seconds, key=lambda name: seconds[name])])


def _tails(bench: Bench, size: int) -> str:
    """A length that blocks do not fill: two ways to do the last one; the faster."""
    length = 100 if bench.dry else 16384 - 40
    ways = {tails: kernel_of(bench, length, size, tails=tails) for tails in ("apart", "inside")}
    seconds = timed(bench, ways, 5)
    for tails, value in seconds.items():
        bench.note(f"D={size} L={length} last block {tails}: {_flops(bench, length, size) / value / 1e12:.1f} TFLOP/s")
    return min(seconds, key=lambda tails: seconds[tails])


def puts(bench: Bench) -> None:
    """What it costs to send half of the outputs to another rank's heap while the rest is computed."""
    for size in (32,) if bench.dry else (64, 128):
        for length in (64,) if bench.dry else (8192, 32768):
            with bench.case(f"pushes at D={size} L={length}"):
                _pushes(bench, size, length)


def _pushes(bench: Bench, size: int, length: int) -> None:
    site = site_of([length // 2] * 2, 2 if bench.dry else HEADS, size, torch.bfloat16)
    functions: dict[str, Callable[[], object]] = {}
    for name, changes in (("on", {}), ("off", {}), ("left out of the text", {"pushes": False})):
        ranks = VirtualRanks(schedule_of(site), KernelTarget(bench.device), **changes)
        ranks.put(*inputs_of(site, bench.device))
        first = ranks.kernels[0]
        if name != "on":  # the same work, every output stored to this rank's own tensor
            queries = first.fixed["queries"]
            queries[:, QUERY.index("out_at")] *= queries[:, QUERY.index("dst")] < 0
            queries[:, QUERY.index("dst")] = -1
        functions[name] = Call(ranks, ranks.outputs()[0])
    seconds = timed(bench, functions)
    cost = seconds["on"] / seconds["off"] - 1
    kind = "note" if bench.dry else "ok" if cost <= PUT_GOAL else "MISS"
    listed = ", ".join(f"{name} {1e3 * value:.3f} ms" for name, value in seconds.items())
    bench.tell(
        kind, f"D={size} L={length}, 1 of 2 ranks, pushes {listed}: they cost {cost:+.1%} (goal {PUT_GOAL:.0%}; one "
        "GPU's own memory, no link)"
    )  # fmt: skip


class Block(nn.Module):
    """A block of a diffusion transformer: modulated attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(t)).unsqueeze(1).chunk(6, -1)
        h = self.norms[0](x) * (1 + scale) + shift
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        x = x + gate * self.out(h.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norms[1](x) * (1 + scale2) + shift2)


class Model(nn.Module):
    """A diffusion transformer in plain PyTorch."""

    def __init__(self, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(64, width), nn.Linear(width, 64)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, t)
        return self.leave(x)


def model(bench: Bench) -> None:
    """Whole models through the backend on one rank, against eager."""
    with bench.case("a diffusion transformer in plain PyTorch"):
        width, heads, blocks, tokens = (64, 2, 1, 32) if bench.dry else (3072, 24, 10, 4608)
        inputs = {"x": torch.randn(1, tokens, 64, device=bench.device), "t": torch.randn(1, width, device=bench.device)}
        torch.manual_seed(3)
        with torch.device(bench.device):
            made = Model(width, heads, blocks)
        _compiled(bench, f"plain PyTorch, {blocks} blocks of width {width}, {tokens} tokens", made, inputs)
    if bench.dry:
        return
    if find_spec("diffusers") is None:
        bench.tell("skip", "the Flux transformer of diffusers: diffusers is not installed")
        return
    with bench.case("the Flux transformer of diffusers"):
        from diffusers import FluxTransformer2DModel

        torch.cuda.empty_cache()
        with torch.device(bench.device):
            flux = FluxTransformer2DModel(num_layers=4, num_single_layers=8, guidance_embeds=True)
            given: dict[str, Any] = {
                "hidden_states": torch.randn(1, 4096, 64), "encoder_hidden_states": torch.randn(1, 512, 4096),
                "pooled_projections": torch.randn(1, 768), "timestep": torch.rand(1), "guidance": torch.rand(1),
                "img_ids": torch.zeros(4096, 3), "txt_ids": torch.zeros(512, 3),
            }  # fmt: skip
        _compiled(bench, "diffusers Flux, 4 + 8 blocks, 4608 tokens", flux, given | {"return_dict": False})


def _compiled(bench: Bench, name: str, made: nn.Module, inputs: dict[str, Any]) -> None:
    """The bf16 model compiled may be 1.2 times as far from fp32 as it is eagerly."""
    from sfcompile.backend import streamfusion_backend

    def first(out: Any) -> torch.Tensor:
        return out if isinstance(out, torch.Tensor) else out[0]

    made = made.eval().requires_grad_(False)
    with torch.no_grad():
        want = first(made(**inputs)).double()
        made = made.to(torch.bfloat16)
        narrow = {
            key: x.to(torch.bfloat16) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for key, x in inputs.items()
        }
        compiled = torch.compile(made, backend=streamfusion_backend, options={"inner": "eager"} if bench.dry else None)
        start = time.perf_counter()
        out = first(compiled(**narrow))
        bench.sync()
        took = time.perf_counter() - start
        ours, theirs = distance(out, want), distance(first(made(**narrow)), want)
        bench.check(
            ours <= 1.2 * theirs, f"{name}, bf16: error against fp32 {ours:.2e} compiled, {theirs:.2e} eager"
        )  # fmt: skip
        seconds = timed(bench, {"eager": lambda: made(**narrow), "compiled": lambda: compiled(**narrow)}, 5)
    bench.note(
        f"{name}, {name_of(torch.bfloat16)}: eager {1e3 * seconds['eager']:.1f} ms, compiled "
        f"{1e3 * seconds['compiled']:.1f} ms ({seconds['eager'] / seconds['compiled']:.2f}x), first call {took:.1f} s"
    )
