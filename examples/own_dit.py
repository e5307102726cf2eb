"""A DiT that no library knows: text and image tokens in one sequence, RoPE, a text mask, attention written by hand.

    sfcompile run --ranks 2 examples/own_dit.py

Two resolutions with ``dynamic=True``: the model is traced once, and sharded anew for each number of tokens, where
ranks, heads and tokens do not divide.
"""

from __future__ import annotations

import os

import torch
from torch import nn

WIDTH, HEADS, HEAD_DIM = 96, 6, 16


class Block(nn.Module):
    """Joint attention over text | image; only image tokens have an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.text_qkv, self.image_qkv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.text_out, self.image_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(
        self, text: torch.Tensor, image: torch.Tensor, keep: torch.Tensor, angles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        joint = torch.cat([self.text_qkv(self.norm(text)), self.image_qkv(self.norm(image))], dim=1)
        q, k, v = joint.unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        scores = (rotate(q, angles) @ rotate(k, angles).transpose(-1, -2)) * HEAD_DIM**-0.5
        hidden = torch.zeros_like(keep, dtype=scores.dtype).masked_fill(~keep, float("-inf"))
        out = ((scores + hidden[:, None, None]).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        text = text + self.text_out(out[:, : text.shape[1]])
        image = image + self.image_out(out[:, text.shape[1] :])
        return text, image + self.mlp(self.mlp_norm(image))


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding."""
    a, b = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-b, a], dim=-1) * angles.sin()


class JointDiT(nn.Module):
    """Latents [B, 4, H, W] and text [B, T, WIDTH] with its mask [B, T]; returns latents."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.patchify, self.unpatchify = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, latents: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = latents.shape
        patches = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
        image = self.patchify(patches.reshape(batch, height * width // 4, 16))
        keep = torch.cat([mask, mask.new_ones(batch, image.shape[1])], dim=1)
        positions = torch.arange(text.shape[1] + image.shape[1], dtype=torch.float32)
        angles = torch.outer(positions, torch.logspace(0, -3, HEAD_DIM // 2)).repeat(1, 2)
        for block in self.blocks:
            text, image = block(text, image, keep, angles)
        out = self.unpatchify(image).reshape(batch, height // 2, width // 2, 4, 2, 2)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(batch, 4, height, width)


@torch.no_grad()
def main() -> None:
    """Two sizes, compared with one process."""
    torch.manual_seed(0)
    model = JointDiT().eval()
    fast = torch.compile(model, backend="streamfusion", dynamic=True, options={"placement": "shard", "inner": "eager"})
    worst = 0.0
    for height, width in ((20, 12), (18, 22)):
        latents, text = torch.randn(1, 4, height, width), torch.randn(1, 7, WIDTH)
        mask = torch.arange(7)[None] < 5
        want, got = model(latents, text, mask), fast(latents, text, mask)
        worst = max(worst, float((got - want).abs().max() / want.abs().max()))
    if os.environ.get("RANK", "0") == "0":
        from sfcompile.backend import reports

        for plan in reports():
            print(plan.headline)
        print(f"{len(reports())} programs, largest difference from one process: {worst:.1e} of the output's scale")


if __name__ == "__main__":
    main()
