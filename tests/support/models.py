"""Small DiTs in plain PyTorch with random weights: what the compiler must handle without knowing any of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS = 16, 4


def rope(x_BHSD: torch.Tensor, angles_SD: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves rotated."""
    a, b = x_BHSD.chunk(2, dim=-1)
    return x_BHSD * angles_SD.cos() + torch.cat([-b, a], dim=-1) * angles_SD.sin()


def split_heads(x: torch.Tensor) -> torch.Tensor:
    """[B, S, C] -> [B, H, S, D]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class SelfDiT(nn.Module):
    """Patchify, two adaLN blocks, unpatchify: [B, 3, 8, 8] -> [B, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, 2)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.time = nn.Linear(1, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, 12)

    def forward(self, image: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        scale, shift = self.time(t[:, None])[:, None].chunk(2, dim=-1)
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            h = F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
            q, k, v = (split_heads(part) for part in qkv(h).chunk(3, dim=-1))
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + F.gelu(mlp(x))
        y = self.out(x).reshape(-1, 4, 4, 2, 2, 3).permute(0, 5, 1, 3, 2, 4)
        return y.reshape(-1, 3, 8, 8)


class JointDiT(nn.Module):
    """Text | image joint attention with RoPE and a key-padding mask; tokens in, image tokens out."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(WIDTH, 3 * WIDTH)
        self.text = nn.Linear(WIDTH, 3 * WIDTH)
        self.image_out = nn.Linear(WIDTH, WIDTH)
        self.text_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, image: torch.Tensor, text: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        count = text.shape[1]
        positions = torch.arange(count + image.shape[1], dtype=torch.float32)
        angles = torch.outer(positions, torch.tensor([1.0, 0.1]).repeat(2))
        mask = torch.cat([keep, keep.new_ones(image.shape[0], image.shape[1])], dim=1)[:, None, None]
        for _ in range(2):
            parts = [torch.cat(p, dim=1) for p in zip(self.text(text).chunk(3, -1), self.image(image).chunk(3, -1),
                                                      strict=True)]  # fmt: skip
            q, k, v = (split_heads(part) for part in parts)
            out = F.scaled_dot_product_attention(rope(q, angles), rope(k, angles), v, attn_mask=mask)
            out = out.transpose(1, 2).flatten(2)
            text = text + self.text_out(out[:, :count])
            image = image + self.image_out(out[:, count:])
        return image


class CrossDiT(nn.Module):
    """Self-attention over video tokens, cross-attention to a short text."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        q, k, v = (split_heads(part) for part in self.qkv(F.rms_norm(video, (WIDTH,))).chunk(3, dim=-1))
        video = video + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        k, v = (split_heads(part) for part in self.kv(text).chunk(2, dim=-1))
        return video + F.scaled_dot_product_attention(split_heads(self.q(video)), k, v).transpose(1, 2).flatten(2)


def build(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Model and inputs by name: "self", "joint", "cross"."""
    torch.manual_seed(0)
    if name == "self":
        return SelfDiT().eval(), (torch.randn(2, 3, 8, 8), torch.rand(2))
    if name == "joint":
        keep = torch.ones(2, 5, dtype=torch.bool)
        keep[1, 3:] = False
        return JointDiT().eval(), (torch.randn(2, 22, WIDTH), torch.randn(2, 5, WIDTH), keep)
    return CrossDiT().eval(), (torch.randn(2, 19, WIDTH), torch.randn(2, 6, WIDTH))
