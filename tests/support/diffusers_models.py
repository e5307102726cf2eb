"""Tiny random-weight DiTs of diffusers: ``build(name)`` gives a model in eval mode and the arguments of its call.

Weights and inputs depend on the name only, so every process builds the same. Zero-initialised layers are redrawn: a
wrong shard shows in the output.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import autoencoders, transformers
from torch import nn

HEADS, HEAD_DIM = 4, 16
HIDDEN = HEADS * HEAD_DIM
TEXT = 24
Inputs = dict[str, Any]


def _flux() -> tuple[nn.Module, Inputs]:
    model = transformers.FluxTransformer2DModel(
        patch_size=1, in_channels=12, num_layers=2, num_single_layers=2, attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS, joint_attention_dim=32, pooled_projection_dim=40, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    ids = torch.stack([torch.zeros(80), torch.arange(80) // 10, torch.arange(80) % 10], dim=1).float()
    return model, {
        "hidden_states": torch.randn(2, 80, 12), "encoder_hidden_states": torch.randn(2, TEXT, 32), "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3), "pooled_projections": torch.randn(2, 40), "timestep": torch.tensor([0.3, 0.9]),
    }  # fmt: skip


def _sd3() -> tuple[nn.Module, Inputs]:
    model = transformers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS, caption_projection_dim=HIDDEN, joint_attention_dim=32, pooled_projection_dim=40,
        pos_embed_max_size=24,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 20), "encoder_hidden_states": torch.randn(2, TEXT, 32),
        "pooled_projections": torch.randn(2, 40), "timestep": torch.tensor([17, 801]),
    }  # fmt: skip


def _pixart_sigma() -> tuple[nn.Module, Inputs]:
    model = transformers.PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=HIDDEN, caption_channels=32, sample_size=24, patch_size=2, use_additional_conditions=False,
    )  # fmt: skip
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, 17:] = False
    return model, {
        "hidden_states": torch.randn(2, 4, 24, 24), "encoder_hidden_states": torch.randn(2, TEXT, 32),
        "encoder_attention_mask": mask, "timestep": torch.tensor([17, 801]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def _wan_t2v() -> tuple[nn.Module, Inputs]:
    model = transformers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4,
        text_dim=32, freq_dim=40, ffn_dim=96, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 4, 8, 20), "encoder_hidden_states": torch.randn(2, TEXT, 32),
        "timestep": torch.tensor([17, 801]),
    }  # fmt: skip


def _cogvideox_rope() -> tuple[nn.Module, Inputs]:
    model = transformers.CogVideoXTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4, time_embed_dim=40,
        text_embed_dim=32, num_layers=2, sample_width=20, sample_height=8, sample_frames=13, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=TEXT, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    angles = torch.outer(torch.arange(160).float(), 100.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    rope = tuple(table.repeat_interleave(2, dim=1) for table in (angles.cos(), angles.sin()))
    return model, {
        "hidden_states": torch.randn(2, 4, 4, 8, 20), "encoder_hidden_states": torch.randn(2, TEXT, 32),
        "timestep": torch.tensor([17, 801]), "image_rotary_emb": rope,
    }  # fmt: skip


class _Decoder(nn.Module):
    """The decoding half of an autoencoder."""

    def __init__(self, coder: nn.Module) -> None:
        super().__init__()
        self.coder = coder

    def forward(self, x: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return self.coder.decode(x, return_dict=return_dict)  # type: ignore[operator, no-any-return]


def _image_decoder() -> tuple[nn.Module, Inputs]:
    coder = autoencoders.AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return _Decoder(coder), {"x": torch.randn(2, 4, 22, 14)}


def _video_decoder() -> tuple[nn.Module, Inputs]:
    coder = autoencoders.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    return _Decoder(coder), {"x": torch.randn(1, 4, 3, 12, 6)}


MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "flux": _flux,
    "sd3": _sd3,
    "pixart_sigma": _pixart_sigma,
    "wan_t2v": _wan_t2v,
    "cogvideox_rope": _cogvideox_rope,
    "image_decoder": _image_decoder,
    "video_decoder": _video_decoder,
}


@torch.no_grad()
def build(name: str) -> tuple[nn.Module, Inputs]:
    """The model ``name`` and the arguments of its call."""
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(zlib.crc32(name.encode()))
        model, inputs = MODELS[name]()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape) / fan_in**0.5)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    finally:
        torch.random.set_rng_state(state)
    return model.eval(), inputs | {"return_dict": False}
