"""The transformers that benchmarks/cluster.py times: real diffusers classes, few blocks, random weights.

Models have 12 heads (they divide by 2, 3 and 4 ranks) of 48 (or of what they are asked for) and a batch of one, but for
"uneven" (10 heads, 517 text tokens) and "guided" (a batch of two: with and without the prompt).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

HEADS, HEAD_DIM = 12, 48
Built = tuple[nn.Module, dict[str, Any]]


def _randomise(model: nn.Module) -> nn.Module:
    """New values for every parameter: matrices keep the scale of their input, no vector stays at zero or one."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() > 1:
                parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5)
            else:
                parameter.copy_(parameter + 0.1 * noise)
    return model.eval().requires_grad_(False)


def _angles(tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(tokens, head_dim // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def flux(
    scale: float = 1.0,
    blocks: int = 1,
    head_dim: int = HEAD_DIM,
    heads: int = HEADS,
    more: tuple[int, int] = (0, 0),
    parallel: int | None = None,
) -> Built:
    """Joint attention of 4096 image and 512 text tokens: one block of two streams, one parallel block.

    Args:
        more: columns that the image has beside its square, and text tokens.
        parallel: how many parallel blocks; None: as many as of two streams.
    """
    from diffusers import FluxTransformer2DModel

    side = int(64 * scale**0.5)
    tokens, text = side * (side + more[0]), max(4, int(512 * scale)) + more[1]
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=blocks, num_single_layers=blocks if parallel is None else parallel,
        attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=512, pooled_projection_dim=256,
        axes_dims_rope=(head_dim // 3,) * 3,
    )  # fmt: skip
    rows, columns = torch.cartesian_prod(torch.arange(side), torch.arange(side + more[0])).unbind(1)
    inputs = dict(
        hidden_states=torch.randn(1, tokens, 64),
        encoder_hidden_states=torch.randn(1, text, 512),
        pooled_projections=torch.randn(1, 256),
        timestep=torch.tensor([0.7]),
        img_ids=torch.stack([torch.zeros_like(rows), rows, columns], dim=1).float(),
        txt_ids=torch.zeros(text, 3),
    )
    return _randomise(model), inputs


def uneven(scale: float = 1.0, blocks: int = 1, head_dim: int = HEAD_DIM) -> Built:
    """flux() with 10 heads, 64 x 65 image and 517 text tokens, an odd column and odd words at any scale."""
    return flux(scale, blocks, head_dim, heads=10, more=(1, 5))


def six_layers(scale: float = 1.0, blocks: int = 1, head_dim: int = HEAD_DIM) -> Built:
    """flux() with six layers: three blocks of two streams, three parallel ones."""
    return flux(scale, 3 * blocks, head_dim)


def wan(scale: float = 1.0, blocks: int = 1, head_dim: int = HEAD_DIM, batch: int = 1) -> Built:
    """Video of 9 x 30 x 30 = 8100 tokens: self-attention, cross-attention to 512 text tokens; one block."""
    from diffusers import WanTransformer3DModel

    frames = max(1, int(9 * scale))
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=head_dim, in_channels=16, out_channels=16,
        text_dim=512, freq_dim=256, ffn_dim=4 * HEADS * head_dim, num_layers=blocks, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(batch, 16, frames, 60, 60),
        encoder_hidden_states=torch.randn(batch, 512, 512),
        timestep=torch.tensor([500] * batch),
    )
    return _randomise(model), inputs


def guided(scale: float = 1.0, blocks: int = 1, head_dim: int = HEAD_DIM) -> Built:
    """wan() twice in one batch, over half the frames: guidance with and without the prompt."""
    return wan(scale / 2, blocks, head_dim, batch=2)


def cogvideox(scale: float = 1.0, blocks: int = 1, head_dim: int = HEAD_DIM) -> Built:
    """Joint attention of 5 x 30 x 30 = 4500 video and 228 text tokens, one projection for both; two blocks."""
    from diffusers import CogVideoXTransformer3DModel

    frames, text = max(1, int(5 * scale)), 228
    model = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=head_dim, in_channels=16, out_channels=16, time_embed_dim=512,
        text_embed_dim=512, num_layers=2 * blocks, sample_width=60, sample_height=60, sample_frames=17, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=text, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(1, frames, 16, 60, 60),
        encoder_hidden_states=torch.randn(1, text, 512),
        timestep=torch.tensor([500]),
        image_rotary_emb=_angles(frames * 900, head_dim),
    )
    return _randomise(model), inputs


def pixart(scale: float = 1.0, blocks: int = 1, head_dim: int = HEAD_DIM) -> Built:
    """Image of 64 x 64 tokens: self-attention, cross-attention to 300 text tokens under a mask; two blocks."""
    from diffusers import PixArtTransformer2DModel

    side = 2 * int(64 * scale**0.5)
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=head_dim, in_channels=4, out_channels=8, num_layers=2 * blocks,
        cross_attention_dim=HEADS * head_dim, caption_channels=512, sample_size=side, patch_size=2, norm_num_groups=4,
        attention_bias=True, use_additional_conditions=False,
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(1, 4, side, side),
        encoder_hidden_states=torch.randn(1, 300, 512),
        timestep=torch.tensor([500]),
        encoder_attention_mask=(torch.arange(300) < 120)[None],
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )
    return _randomise(model), inputs


MODELS: dict[str, Callable[[float, int, int], Built]] = {
    "flux": flux,
    "wan": wan,
    "cogvideox": cogvideox,
    "pixart": pixart,
    "flux6": six_layers,
    "guided": guided,
    "uneven": uneven,
}


def build(name: str, scale: float = 1.0, blocks: int = 1, head_dim: int = HEAD_DIM) -> Built:
    """A model and forward()'s keyword arguments; the same in every process.

    ``scale`` shrinks the token count, ``blocks`` multiplies the number of blocks; ``head_dim`` is a multiple of 6.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    model, inputs = MODELS[name](scale, blocks, head_dim)
    torch.random.set_rng_state(state)
    return model, inputs | {"return_dict": False}
