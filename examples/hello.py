"""Your own DiT on several ranks: one line, no change to the model.

    sfcompile run --ranks 4 examples/hello.py          (or: torchrun --nproc-per-node 4 examples/hello.py)

Prints the plan, the difference from one-process eager, and what each rank took for a step.
"""

from __future__ import annotations

import os
import time

import torch
from torch import nn
from torch.nn import functional as F

# B batch, S tokens, C width, H heads


class Block(nn.Module):
    """Pre-norm transformer block whose norms are modulated by the timestep (adaLN)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x_BSC: torch.Tensor, t_BC: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(t_BC))[:, None].chunk(6, dim=-1)
        h = self.norm1(x_BSC) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BSC = x_BSC + gate1 * self.proj(attended)
        return x_BSC + gate2 * self.mlp(self.norm2(x_BSC) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Patchify, blocks, unpatchify: [B, 4, height, width] latents to the same shape."""

    def __init__(self, width: int = 256, heads: int = 8, depth: int = 4, side: int = 32) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(4, width, kernel_size=2, stride=2)
        self.position = nn.Parameter(torch.randn(1, (side // 2) ** 2, width) * 0.02)
        self.time = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.out = nn.Linear(width, 16)

    def forward(self, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = latents.shape
        x = self.patchify(latents).flatten(2).transpose(1, 2) + self.position
        half = torch.arange(x.shape[-1] // 2, device=x.device) / x.shape[-1]
        angles = t[:, None] * torch.exp(-9.0 * half)
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        for block in self.blocks:
            x = block(x, time)
        patches = self.out(x).reshape(batch, height // 2, width // 2, 2, 2, 4)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, 4, height, width)


@torch.no_grad()
def main() -> None:
    """Compile, compare, time."""
    torch.manual_seed(0)
    model = DiT().eval()
    latents, t = torch.randn(1, 4, 32, 32), torch.tensor([500.0])
    want = model(latents, t)

    fast = torch.compile(model, backend="streamfusion", options={"placement": "shard"})
    got = fast(latents, t)
    start = time.perf_counter()
    fast(latents, t)
    step_s = time.perf_counter() - start

    if os.environ.get("RANK", "0") == "0":
        from sfcompile.backend import last_report

        print(last_report())
        error = float((got - want).abs().max() / want.abs().max())
        print(f"difference from one process: {error:.1e} of the output's scale; {step_s * 1e3:.1f} ms per step")


if __name__ == "__main__":
    main()
