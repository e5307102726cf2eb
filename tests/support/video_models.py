"""Video transformers written as authors write them: sizes kept in tensors and read back, warnings, lists of samples."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

HEADS, WIDTH = 4, 64
PATCH = (1, 2, 2)
log = logging.getLogger(__name__)


def rotate_by_grid(x: torch.Tensor, grid_sizes: torch.Tensor) -> torch.Tensor:
    """Rotary positions along frames, rows and columns, a sample at a time. x is [B, S, H, D], padded to S."""
    pairs = x.size(3) // 2
    counts = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    rotated = []
    for i, (frames, rows, columns) in enumerate(grid_sizes.tolist()):
        length = frames * rows * columns
        numbers = torch.view_as_complex(x[i, :length].to(torch.float64).reshape(length, x.size(2), -1, 2))
        angles = []
        for axis, (size, count) in enumerate(zip((frames, rows, columns), counts, strict=True)):
            table = torch.outer(torch.arange(size), 1.0 / torch.pow(100.0, torch.arange(count).double() / count))
            shape = [1, 1, 1, -1]
            shape[axis] = size
            angles.append(torch.polar(torch.ones_like(table), table).view(*shape).expand(frames, rows, columns, -1))
        positions = torch.cat(angles, dim=-1).reshape(length, 1, -1)
        turned = torch.view_as_real(numbers * positions).flatten(2)
        rotated.append(torch.cat([turned, x[i, length:]]))
    return torch.stack(rotated).float()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None = None) -> torch.Tensor:
    """What runs where no attention library is installed. All are [B, S, H, D]."""
    if k_lens is not None:
        warnings.warn("Padding mask is disabled when using scaled_dot_product_attention.", stacklevel=2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads(self, x: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = *x.shape[:-1], HEADS, WIDTH // HEADS
        other = *context.shape[:-1], HEADS, WIDTH // HEADS
        return self.q(x).view(shape), self.k(context).view(other), self.v(context).view(other)


class GridBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.own, self.cross = Attention(), Attention()
        self.feed = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.modulation = nn.Parameter(torch.randn(1, 6, WIDTH) / WIDTH**0.5)

    def forward(
        self, x: torch.Tensor, e: torch.Tensor, seq_lens: torch.Tensor, grid_sizes: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        shift, scale, gate, shift2, scale2, gate2 = (self.modulation + e).chunk(6, dim=1)
        q, k, v = self.own.heads(*(self.norm1(x) * (1 + scale) + shift,) * 2)
        q, k = rotate_by_grid(q, grid_sizes), rotate_by_grid(k, grid_sizes)
        x = x + self.own.o(attend(q, k, v, seq_lens).flatten(2)) * gate
        x = x + self.cross.o(attend(*self.cross.heads(self.norm3(x), text)).flatten(2))
        return x + self.feed(self.norm2(x) * (1 + scale2) + shift2) * gate2


class GridVideo(nn.Module):
    """Videos in a list, padded to one length; their grids are a tensor that every block reads back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, WIDTH, PATCH, PATCH)
        self.text, self.time = nn.Linear(24, WIDTH), nn.Linear(32, 6 * WIDTH)
        self.blocks = nn.ModuleList(GridBlock() for _ in range(1))
        self.out = nn.Linear(WIDTH, 4 * math.prod(PATCH))

    def forward(self, videos: list[torch.Tensor], t: torch.Tensor, text: torch.Tensor, seq_len: int) -> Any:
        x = [self.embed(video.unsqueeze(0)) for video in videos]
        grid_sizes = torch.stack([torch.tensor(u.shape[2:], dtype=torch.long) for u in x])
        x = [u.flatten(2).transpose(1, 2) for u in x]
        seq_lens = torch.tensor([u.size(1) for u in x], dtype=torch.long)
        assert seq_lens.max() <= seq_len
        x = torch.cat([torch.cat([u, u.new_zeros(1, seq_len - u.size(1), u.size(2))], dim=1) for u in x])
        e = self.time(torch.cos(t[:, None] * torch.arange(32))).unflatten(1, (6, WIDTH))
        for block in self.blocks:
            x = block(x, e, seq_lens, grid_sizes, self.text(text))
        x = self.out(x)
        videos = []
        for u, v in zip(x, grid_sizes.tolist(), strict=True):
            u = u[: math.prod(v)].view(*v, *PATCH, 4)
            u = torch.einsum("fhwpqrc->cfphqwr", u)
            videos.append(u.reshape(4, *[i * j for i, j in zip(v, PATCH, strict=True)]))
        return videos


class StreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.own = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention()
        self.feed = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, cache: dict[str, torch.Tensor], start: int) -> torch.Tensor:
        q, k, v = self.own.heads(*(self.norm1(x),) * 2)
        end = start + q.shape[1]
        if end > cache["k"].shape[1]:
            log.warning("the cache of %d tokens is full", cache["k"].shape[1])
        cache["k"][:, start:end], cache["v"][:, start:end] = k, v
        x = x + self.own.o(attend(q, cache["k"][:, :end], cache["v"][:, :end]).flatten(2))
        log.debug("attended to %d tokens", end)
        return x + self.feed(self.norm2(x))


class StreamingVideo(nn.Module):
    """Frames a chunk at a time: keys and values are written to caches, at a position that is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(12, WIDTH), nn.Linear(WIDTH, 12)
        self.blocks = nn.ModuleList(StreamBlock() for _ in range(1))

    def forward(self, x: torch.Tensor, caches: list[dict[str, torch.Tensor]], position: torch.Tensor) -> Any:
        start = position.item()
        x = self.embed(x)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache, start)
        return [self.out(x), *(cache[name] for cache in caches for name in "kv")]


class PackedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.own = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention()
        self.feed = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        q, k, v = self.own.heads(*(self.norm1(x),) * 2)
        bounds = offsets.tolist()
        parts = []
        for i in range(len(bounds) - 1):
            rows = slice(offsets[i], offsets[i + 1])
            parts.append(attend(q[:, rows], k[:, rows], v[:, rows]))
        x = x + self.own.o(torch.cat(parts, dim=1).flatten(2))
        return x + self.feed(self.norm2(x))


class PackedVideo(nn.Module):
    """Videos of unequal size in one sequence; offsets are a running sum of lengths, kept in a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(12, WIDTH), nn.Linear(WIDTH, 12)
        self.blocks = nn.ModuleList(PackedBlock() for _ in range(1))

    def forward(self, videos: list[torch.Tensor]) -> Any:
        lengths = torch.tensor([0] + [int(np.prod(video.shape[:3])) for video in videos])
        offsets = lengths.cumsum(0, dtype=torch.int32)
        if (longest := int(lengths.max())) > 64:
            print(f"long videos: {longest} tokens")
        x = self.embed(torch.cat([video.flatten(0, 2) for video in videos])[None])
        for block in self.blocks:
            x = block(x, offsets)
        parts = self.out(x[0]).split((offsets[1:] - offsets[:-1]).tolist())
        return [part.view(video.shape) for part, video in zip(parts, videos, strict=True)]


def _grid(heights: list[int]) -> dict[str, Any]:
    videos = [torch.randn(4, 3, height, 8) for height in heights]
    count = len(heights)
    return {
        "videos": videos,
        "t": torch.linspace(0.1, 0.7, count),
        "text": torch.randn(count, 20, 24),
        "seq_len": 3 * max(heights) // 2 * 4,
    }


def _stream() -> dict[str, Any]:
    caches = [{name: torch.randn(1, 160, HEADS, WIDTH // HEADS) for name in "kv"} for _ in range(1)]
    return {"x": torch.randn(1, 48, 12), "caches": caches, "position": torch.tensor(48)}


def _packed() -> dict[str, Any]:
    return {"videos": [torch.randn(3, 4, 8, 12), torch.randn(2, 4, 6, 12)]}


VIDEO_MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], int]] = {
    "grid": (GridVideo, lambda: _grid([16]), 1),
    "streaming": (StreamingVideo, _stream, 1),
    "packed": (PackedVideo, _packed, 2),
}
"""Name -> the model, its inputs, and how many of its attentions are to its own tokens."""


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model and its inputs, the same wherever they are made."""
    torch.manual_seed(0)
    model, inputs, _ = VIDEO_MODELS[name]
    return model().eval(), inputs()
