"""Structures that DiTs are made of, each as small as it can be: ``STRUCTURES[name]()`` gives a function and its inputs.

No model that exists is among them. Tokens are [2, 64, 32] unless a structure asks for more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

C, HEADS, DIM, N, TEXT, SIDE = 32, 4, 8, 64, 11, 8
FRAMES, SPACE = 6, 16
Fn = Callable[..., Any]
Structure = Callable[[], tuple[nn.Module, list[torch.Tensor]]]
STRUCTURES: dict[str, Structure] = {}
sdpa = F.scaled_dot_product_attention


class Layers(nn.ModuleDict):
    """Layers made when first asked for: ``layers["a", 32, 64]`` is linear, ``layers["b", lambda: nn.ReLU()]`` any."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        name, made = key[0], key[1]
        if name not in self:
            self[name] = nn.Linear(made, key[2]) if isinstance(made, int) else made().eval()
        return super().__getitem__(name)


class Model(nn.Module):
    """A function of its layers and inputs."""

    def __init__(self, fn: Fn) -> None:
        super().__init__()
        self.layers, self.fn = Layers(), fn

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.fn(self.layers, *inputs)


def tokens(count: int = N, width: int = C, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, count, width)


def structure(*inputs: Callable[[], torch.Tensor]) -> Callable[[Fn], Fn]:
    """Register ``fn(layers, *inputs)``; its layers are made by a first call."""

    def register(fn: Fn) -> Fn:
        def build() -> tuple[nn.Module, list[torch.Tensor]]:
            torch.manual_seed(0)
            model, given = Model(fn).eval(), [make() for make in inputs or (tokens,)]
            with torch.no_grad():
                model(*given)
            return model, given

        STRUCTURES[fn.__name__] = build
        return fn

    return register


def heads(x: torch.Tensor, count: int = HEADS) -> torch.Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merged(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def attend(m: Layers, x: torch.Tensor, how: Fn = sdpa, name: str = "", **given: Any) -> torch.Tensor:
    q, k, v = (heads(t) for t in m[name + "qkv", x.shape[-1], 3 * C](x).chunk(3, -1))
    return m[name + "o", C, C](merged(how(q, k, v, **given)))


def feed(m: Layers, x: torch.Tensor) -> torch.Tensor:
    return m["f2", 2 * C, C](F.gelu(m["f1", C, 2 * C](x)))


def block(m: Layers, x: torch.Tensor, how: Fn = sdpa, **given: Any) -> torch.Tensor:
    x = x + attend(m, F.layer_norm(x, (C,)), how, **given)
    return x + feed(m, F.layer_norm(x, (C,)))


def grid(x: torch.Tensor) -> torch.Tensor:
    """Tokens to [B, C, side, side]."""
    return x.transpose(1, 2).unflatten(2, (SIDE, SIDE))


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


# ---------------------------------------------------------------------- streams, masks, rotations


@structure(tokens, lambda: tokens(TEXT), lambda: tokens(29))
def three_streams(m: Layers, image: torch.Tensor, text: torch.Tensor, reference: torch.Tensor) -> Any:
    streams = [image, text, reference]
    for _ in range(2):
        parts = [m[f"in{i}", C, 3 * C](x).chunk(3, -1) for i, x in enumerate(streams)]
        q, k, v = (heads(torch.cat(part, 1)) for part in zip(*parts, strict=True))
        out = merged(sdpa(q, k, v)).split([x.shape[1] for x in streams], 1)
        streams = [x + m[f"out{i}", C, C](y) for i, (x, y) in enumerate(zip(streams, out, strict=True))]
    return {"image": streams[0], "others": (streams[1].mean(1), streams[2])}


@structure(tokens, lambda: tokens(TEXT), lambda: torch.tensor([11, 6]))
def mask_from_lengths(m: Layers, x: torch.Tensor, text: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    y = torch.cat([text, x], 1)
    bias = torch.zeros(2, 1, 1, y.shape[1])
    bias[:, 0, 0, :TEXT] = torch.where(torch.arange(TEXT)[None] >= lengths[:, None], -1e4, 0.0)
    y = block(m, y, attn_mask=bias)
    seen = torch.arange(y.shape[1])[None] < (lengths + N)[:, None]
    return block(m, y, attn_mask=seen[:, None, :, None] & seen[:, None, None] | torch.eye(N + TEXT).bool())[:, TEXT:]


def _angles(count: int, width: int) -> torch.Tensor:
    return torch.outer(torch.arange(count).float(), 100.0 ** -(torch.arange(0, width, 2) / width))


@structure()
def rotations(m: Layers, x: torch.Tensor) -> torch.Tensor:
    """Complex, written into slices, and tables per axis of a grid."""
    turn = torch.polar(torch.ones(N, DIM // 2), _angles(N, DIM))

    def by_complex(t: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(3)

    def by_slices(t: torch.Tensor) -> torch.Tensor:
        out, cos, sin = torch.empty_like(t), _angles(N, DIM).cos(), _angles(N, DIM).sin()
        out[..., 0::2] = t[..., 0::2] * cos - t[..., 1::2] * sin
        out[..., 1::2] = t[..., 0::2] * sin + t[..., 1::2] * cos
        return out

    def by_axes(t: torch.Tensor) -> torch.Tensor:
        rows = _angles(SIDE, 4)[:, None].expand(SIDE, SIDE, 2)
        table = torch.cat([rows, rows.transpose(0, 1)], -1).reshape(N, 4).repeat_interleave(2, -1)
        a, b = t.unflatten(-1, (-1, 2)).unbind(-1)
        return t * table.cos() + torch.stack([-b, a], -1).flatten(3) * table.sin()

    for way in (by_complex, by_slices, by_axes):
        x = block(m, x, lambda q, k, v, way=way: sdpa(way(q), way(k), v))
    return x


# ---------------------------------------------------------------------- attention in other words


@structure()
def grouped_heads(m: Layers, x: torch.Tensor) -> torch.Tensor:
    k, v = (heads(t, 2) for t in m["kv", C, C](x).chunk(2, -1))
    q = heads(m["q", C, C](x))
    wide = [t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, HEADS, N, DIM) for t in (k, v)]
    out = sdpa(q, k, v, enable_gqa=True) + sdpa(q, *(t.repeat_interleave(2, 1) for t in (k, v))) + sdpa(q, *wide)
    one = (q @ k[:, :1].mT * DIM**-0.5).softmax(-1) @ v[:, :1]
    return x + m["o", C, C](merged(out + one))


@structure()
def by_einsum(m: Layers, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, DIM)) for t in m["qkv", C, 3 * C](x).chunk(3, -1))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * DIM**-0.5
    scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf"))
    return x + m["o", C, C](torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2))


@structure()
def by_exponentials(m: Layers, x: torch.Tensor) -> torch.Tensor:
    def how(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = (q @ k.mT * DIM**-0.5).tanh().exp()
        return weights @ v / weights.sum(-1, keepdim=True)

    return block(m, x, how)


@structure()
def in_chunks(m: Layers, x: torch.Tensor) -> torch.Tensor:
    def how(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(q)
        for i in range(0, N, 16):
            out[:, :, i : i + 16] = ((q[:, :, i : i + 16] @ k.mT) * DIM**-0.5).softmax(-1) @ v
        return out

    x = x + attend(m, x, how)
    return x + torch.cat([feed(m, part) for part in x.chunk(4, 1)], 1)


@structure()
def linear_attention(m: Layers, x: torch.Tensor) -> torch.Tensor:
    def how(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        scale = 1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
        return torch.einsum("bhnd,bhde,bhn->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v), scale)

    return block(m, x, how)


@structure(tokens, lambda: tokens(TEXT))
def modules_of_torch(m: Layers, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    x = m["encoder", lambda: nn.TransformerEncoderLayer(C, HEADS, 2 * C, batch_first=True)](x)
    x = x + m["cross", lambda: nn.MultiheadAttention(C, HEADS, batch_first=True)](x, text, text, need_weights=False)[0]
    keep = torch.arange(N)[None] < torch.tensor([[N], [40]])
    layer = m[
        "second", lambda: nn.TransformerEncoderLayer(C, HEADS, C, batch_first=True, norm_first=True, activation="gelu")
    ]
    return layer(x, src_key_padding_mask=~keep) * keep[..., None]


@structure()
def checkpoints(m: Layers, x: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        x = torch.utils.checkpoint.checkpoint(lambda y: block(m, y), x, use_reentrant=False)
    return x


# ---------------------------------------------------------------------- the grid


@structure(lambda: torch.randn(2, 3, 16, 16))
def patches(m: Layers, image: torch.Tensor) -> torch.Tensor:
    x = m["embed", lambda: nn.Conv2d(3, C, 2, 2)](image)
    x = flat(
        x + F.interpolate(m["table", lambda: nn.Conv2d(C, C, 1)](torch.ones(1, C, 5, 5)), (SIDE, SIDE), mode="bilinear")
    )
    x = m["unembed", C, 12](block(m, x)).reshape(2, SIDE, SIDE, 2, 2, 3)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(2, 3, 16, 16)


@structure()
def depthwise_in_the_mlp(m: Layers, x: torch.Tensor) -> torch.Tensor:
    x = x + attend(m, x)
    h = m["dw", lambda: nn.Conv2d(2 * C, 2 * C, 3, padding=1, groups=2 * C)](grid(m["f1", C, 2 * C](x)))
    return x + m["f2", 2 * C, C](F.silu(flat(h)))


@structure()
def causal_conv_and_group_norm(m: Layers, x: torch.Tensor) -> torch.Tensor:
    x = x + m["c", lambda: nn.Conv1d(C, C, 5)](F.pad(x.transpose(1, 2), (4, 0))).transpose(1, 2)
    return block(m, flat(m["norm", lambda: nn.GroupNorm(4, C)](grid(block(m, x)))))


@structure()
def shifted_windows(m: Layers, x: torch.Tensor) -> torch.Tensor:
    for shift in (0, 2):
        g = torch.roll(x.unflatten(1, (SIDE, SIDE)), (-shift, -shift), (1, 2))
        windows = g.view(2, 2, 4, 2, 4, C).transpose(2, 3).reshape(-1, 16, C)
        g = attend(m, windows).view(2, 2, 2, 4, 4, C).transpose(2, 3).reshape(2, SIDE, SIDE, C)
        x = x + torch.roll(g, (shift, shift), (1, 2)).flatten(1, 2)
    return x + feed(m, x)


@structure(lambda: tokens(FRAMES * SPACE), lambda: torch.rand(2, FRAMES))
def space_and_time(m: Layers, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    scale = m["time", 1, C](time[..., None]).repeat_interleave(SPACE, 1)
    y = block(m, (x * (1 + scale)).reshape(2 * FRAMES, SPACE, C))
    y = block(m, y.view(2, FRAMES, SPACE, C).transpose(1, 2).reshape(2 * SPACE, FRAMES, C))
    return block(m, y.view(2, SPACE, FRAMES, C).transpose(1, 2).reshape(2, FRAMES * SPACE, C))


@structure()
def merged_and_split_tokens(m: Layers, x: torch.Tensor) -> torch.Tensor:
    first = block(m, x)
    g = first.view(2, 4, 2, 4, 2, C).transpose(2, 3).reshape(2, N // 4, 4 * C)
    y = m["up", C, 4 * C](block(m, m["down", 4 * C, C](g)))
    y = y.view(2, 4, 4, 2, 2, C).transpose(2, 3).reshape(2, N, C)
    return block(m, torch.lerp(first, y, 0.3))


@structure()
def pairs_of_tokens(m: Layers, x: torch.Tensor) -> torch.Tensor:
    a, b = x[:, ::2], x[:, 1::2]
    y = block(m, (a + b) / 2)
    return block(m, torch.stack([a + y, b + y], 2).flatten(1, 2))


@structure()
def neighbours_differ(m: Layers, x: torch.Tensor) -> torch.Tensor:
    return block(m, torch.cat([x[:, :1], x[:, 1:] - x[:, :-1]], 1)) + x.roll(1, 1)


# ---------------------------------------------------------------------- over tokens, experts, skips


@structure(tokens, lambda: torch.rand(2, N) > 0.4)
def sums_over_tokens(m: Layers, x: torch.Tensor, keep: torch.Tensor) -> Any:
    x = block(m, x)
    count = keep.sum(1, dtype=torch.int32)
    mean = (x * keep[..., None]).sum(1) / count[:, None]
    x = x * torch.sigmoid(m["gate", C, C](mean + x.amax(1)))[:, None] / x.std(1, keepdim=True)
    return block(m, x), count


@structure()
def experts(m: Layers, x: torch.Tensor) -> torch.Tensor:
    x = x + attend(m, x)
    weight, index = m["route", C, 4](x).softmax(-1).topk(2, -1)
    out = sum((weight * (index == e)).sum(-1, keepdim=True) * m[f"expert{e}", C, C](x) for e in range(4))
    best, chosen = m["route"](x).transpose(1, 2).topk(16, -1)
    picked = torch.gather(x[:, None].expand(-1, 4, -1, -1), 2, chosen[..., None].expand(-1, -1, -1, C))
    made = (m["shared", C, C](picked) * best[..., None]).flatten(1, 2)
    return x + out + torch.zeros_like(x).scatter_add(1, chosen.flatten(1)[..., None].expand(-1, -1, C), made)


@structure(tokens, lambda: torch.randn(2, C))
def registers_and_skips(m: Layers, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    register = m["register", lambda: nn.Embedding(3, C)](torch.arange(3)).expand(2, -1, -1)
    y = torch.cat([register, m["time", C, C](time)[:, None], x], 1)
    skips = [y := block(m, y) for _ in range(2)]
    for skip in reversed(skips):
        y = block(m, m["skip", 2 * C, C](torch.cat([y, skip], -1)))
    return y[:, 4:]


@structure(lambda: tokens(batch=1))
def guidance_inside(m: Layers, x: torch.Tensor) -> torch.Tensor:
    with_it, without = block(m, torch.cat([x, x])).chunk(2)
    return without + 4 * (with_it - without)


@structure()
def unknown_ops_between(m: Layers, x: torch.Tensor) -> torch.Tensor:
    x = block(m, block(m, x).sort(dim=1).values)
    x = block(m, torch.fft.fft(x.cumsum(1) / math.sqrt(N), dim=1).real)
    order = m["score", C, 1](x).squeeze(-1).argsort(1)
    return block(m, torch.gather(x, 1, order[..., None].expand(-1, -1, C)))
