"""What people put around and into a model beside this backend: ``run(rank, CASE)`` compares each with one process.

A case changes a model as a user would, before the compile or between calls, and compares every call with the same
model uncompiled. What the backend refuses must be refused in words.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from model_cases import Plain, close, rank, ranks, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from sfcompile.backend import last_report, reports
from sfcompile.errors import StreamFusionError


def run(rank: int, case: str) -> None:
    """One case on one rank."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        globals()[f"case_{case}"]()


def compiled(model: nn.Module, **options: Any) -> Any:
    mesh = {"ulysses": ranks(), "ring": 1}  # of a batch of two each rank would take one
    options = {"inner": "eager", "timeout_s": 30.0, "placement": "shard", "mesh": mesh} | options
    return torch.compile(model, backend="streamfusion", options=options)


def same(model: nn.Module, call: Callable[..., Any], times: int = 2, want: Callable[..., Any] | None = None) -> None:
    """Several calls of a compiled model against the model itself."""
    for step in range(times):
        x = tokens() * (1 + step)
        close(call(x), (want or model)(x))


def sharded() -> None:
    """The last graph shards its attentions, and no product is left behind."""
    plan = last_report()
    assert plan is not None and plan.sharded_sites and plan.share < 1.2, str(plan)


class Lora(nn.Module):
    """A linear layer beside which low ranks are added, with a Python number as their scale."""

    def __init__(self, base: nn.Linear, r: int = 4, scale: float = 1.0) -> None:
        super().__init__()
        self.base, self.scale, self.active = base, scale, True
        self.down, self.up = nn.Linear(base.in_features, r, bias=False), nn.Linear(r, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        return out + self.up(self.down(x)) * self.scale if self.active else out

    def fuse(self, sign: float = 1.0) -> None:
        self.base.weight += sign * self.scale * self.up.weight @ self.down.weight


def with_lora() -> Plain:
    model = Plain()
    torch.manual_seed(3)
    model.qkv = nn.ModuleList([Lora(layer) for layer in model.qkv])  # type: ignore[arg-type]
    return model


def case_lora_scale() -> None:
    """Loaded, at four strengths: two programs at most."""
    model = with_lora()
    call, before = compiled(model), len(reports())
    for scale in (0.0, 0.3, 0.7, 1.1):
        for layer in model.qkv:
            layer.scale = scale
        same(model, call)
    sharded()
    assert len(reports()) - before <= 2, f"{len(reports()) - before} programs for four strengths"


def case_lora_fused() -> None:
    """Fused into the weights, taken out again, switched for another, unloaded."""
    model = with_lora()
    call = compiled(model)
    same(model, call)
    for sign in (1.0, -1.0):
        for layer in model.qkv:
            layer.fuse(sign)
            layer.active = sign < 0
        same(model, call)
    for layer in model.qkv:
        layer.up.weight.normal_(generator=torch.Generator().manual_seed(5))
    same(model, call)
    model.qkv = nn.ModuleList([layer.base for layer in model.qkv])  # type: ignore[arg-type, misc]
    same(model, call)
    sharded()


def case_state_dict() -> None:
    """Other weights loaded between calls."""
    model, other = Plain(), Plain()
    call = compiled(model)
    same(model, call)
    for weight in other.parameters():
        weight.mul_(0.5)
    model.load_state_dict(other.state_dict())
    same(model, call, want=other)


class Int8Linear(nn.Module):
    """Dynamic int8: rows of x and of the weight have factors; the product is of integers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        weight = base.weight.detach()
        factor = weight.abs().amax(1) / 127
        self.register_buffer("weight", (weight / factor[:, None]).round().to(torch.int8))
        self.register_buffer("factor", factor)
        self.register_buffer("bias", base.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        product = torch._int_mm((rows / scale).round().to(torch.int8), self.weight.t())
        return (product * scale * self.factor + self.bias).unflatten(0, x.shape[:-1])


def case_dynamic_int8() -> None:
    """The integer product is computed on shards: rows are independent."""
    model = Plain()
    model.qkv = nn.ModuleList([Int8Linear(layer) for layer in model.qkv])  # type: ignore[arg-type]
    call = compiled(model)
    same(model, call)
    sharded()


class Packed(torch.Tensor):
    """A weight that is kept as bytes and unpacked where it is used, as GGUF's and torchao's are."""

    @staticmethod
    def __new__(cls: Any, data: torch.Tensor, factor: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, data: torch.Tensor, factor: torch.Tensor) -> None:
        self.data_, self.factor = data, factor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_", "factor"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *rest: Any) -> Packed:
        return Packed(inner["data_"], inner["factor"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].data_, args[0].factor)
        plain = torch.utils._pytree.tree_map_only(Packed, lambda x: x.data_.float() * x.factor, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def packed(weight: torch.Tensor) -> nn.Parameter:
    factor = weight.abs().amax(1, keepdim=True) / 127
    return nn.Parameter(Packed((weight / factor).round().to(torch.int8), factor), requires_grad=False)


def case_weights_of_a_subclass() -> None:
    model = Plain()
    for layer in model.qkv:
        layer.weight = packed(layer.weight.detach())
    call = compiled(model)
    same(model, call)
    sharded()


def case_blocks_only() -> None:
    """Blocks compiled in place, one after the other, as compile_repeated_blocks does."""
    model = nn.Sequential(*[Plain() for _ in range(3)])
    eager = copy.deepcopy(model)
    for block in model:
        block.compile(backend="streamfusion", options={"inner": "eager", "placement": "shard"})
    before = len(reports())
    same(model, model, want=eager)
    assert len(reports()) - before == 1, "three equal blocks are one program"


class Cached(nn.Module):
    """First-block cache: where the first block's residual has hardly changed, the rest is what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = Plain(), Plain()
        self.seen: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None
        self.hits = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        residual = h - x
        if self.seen is not None and bool((residual - self.seen).abs().mean() < 0.05 * self.seen.abs().mean()):
            self.hits += 1
            return h + self.kept  # type: ignore[operator]
        out = self.rest(h)
        self.seen, self.kept = residual, out - h
        return out


def case_step_cache() -> None:
    """Hits and misses that depend on data: every rank takes the same way."""
    model, eager = Cached(), Cached()
    call = compiled(model)
    for factor in (1.0, 1.001, 1.5, 1.5, 2.0):
        close(call(tokens() * factor), eager(tokens() * factor))
    assert model.hits == eager.hits == 2, (model.hits, eager.hits)


def case_controlnet() -> None:
    """Residuals of a second compiled model go into the first."""

    class Controlled(Plain):
        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return super().forward(x + residual) + residual

    model, control = Controlled(), Plain()
    first, second = compiled(model), compiled(control)
    for step in (1, 2):
        x = tokens() * step
        close(first(x, second(x)), model(x, control(x)))


def case_checkpointing() -> None:
    """Gradient checkpointing left on."""

    class Kept(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]

    model = Kept()
    call = compiled(model)
    same(model, call)
    sharded()


def case_channels_last() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.patch, self.body, self.back = nn.Conv2d(4, 32, 2, 2), Plain(), nn.ConvTranspose2d(32, 4, 2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.patch(x)
            return self.back(self.body(h.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, h.shape[2:]))

    model = Images().to(memory_format=torch.channels_last)
    call = compiled(model)
    for step in (1, 2):
        x = torch.randn(2, 4, 16, 12).to(memory_format=torch.channels_last) * step
        close(call(x), model(x))
    sharded()


def case_modes() -> None:
    """Modes of torch.compile reach Inductor, or are refused in words."""
    model = Plain()
    for mode in ("default", "reduce-overhead", "max-autotune-no-cudagraphs"):
        torch._dynamo.reset()
        same(model, torch.compile(model, backend="streamfusion", mode=mode))


def case_offloading() -> None:
    """Weights that hooks bring before a block and take away after it."""
    model, eager = nn.Sequential(*[Plain() for _ in range(2)]), nn.Sequential(*[Plain() for _ in range(2)])
    kept = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def bring(name: str, block: nn.Module) -> None:
        for key, weight in block.named_parameters():
            weight.data = kept[f"{name}.{key}"].clone()

    def take(block: nn.Module) -> None:
        for weight in block.parameters():
            weight.data = torch.empty(0)

    for name, block in model.named_children():
        block.register_forward_pre_hook(lambda block, args, name=name: bring(name, block))
        block.register_forward_hook(lambda block, args, out: take(block))
        take(block)
    call = compiled(model)
    same(model, call, want=eager)


def case_layerwise_casting() -> None:
    """Weights kept in fp8, cast before each layer: hooks of diffusers."""
    from diffusers.hooks import apply_layerwise_casting
    from diffusers_models import build

    model, inputs = build("flux")
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    want = model(**inputs)[0]
    call = compiled(model)
    for _ in range(2):
        close(call(**inputs)[0], want)


def case_first_block_cache() -> None:
    """diffusers' own first-block cache."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
    from diffusers_models import build

    outs = []
    for compile_it in (False, True):
        model, inputs = build("flux")
        apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.1))
        call = compiled(model) if compile_it else model
        with model.cache_context("cond"):
            outs.append([call(**inputs | {"hidden_states": inputs["hidden_states"] * f})[0] for f in (1.0, 1.001, 3.0)])
    for mine, theirs in zip(outs[1], outs[0], strict=True):
        close(mine, theirs)


def case_fsdp() -> None:
    """Weights that FSDP2 keeps in shards of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, want = Plain(), Plain()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks(),)))
    try:
        same(model, compiled(model), want=want)
    except Exception as error:
        inner = error
        while not isinstance(inner, StreamFusionError) and (inner.__cause__ or getattr(inner, "inner_exception", None)):
            inner = inner.__cause__ or inner.inner_exception  # type: ignore[attr-defined]
        print(f"rank {rank()}: fsdp: {type(inner).__name__}: {inner}")
        raise
