"""Convolutional networks: coders and decoders of images and video, and U-Nets, at small widths.

Rows do not divide by the number of ranks everywhere, and some batches hold two samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

from .registry import TEXT, Draw, Inputs, case

TEXT_DIM = 32
HERE = "diffusers_zoo.convolutional"


class Coder(nn.Module):
    """One direction of an autoencoder as a model of its own: ``encode`` (to the mode) or ``decode``."""

    def __init__(self, kind: str, method: str, **config: Any) -> None:
        super().__init__()
        self.coder = getattr(diffusers, kind)(**config)
        self.method = method

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The decoded samples, or the latents."""
        if self.method == "decode":
            return self.coder.decode(x, return_dict=False)[0]
        coded = self.coder.encode(x, return_dict=False)[0]
        return coded if isinstance(coded, torch.Tensor) else coded.parameters


KL = dict(
    kind="AutoencoderKL", block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
)  # fmt: skip
WAN = dict(
    kind="AutoencoderKLWan", base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
)
HUNYUAN = dict(
    kind="AutoencoderKLHunyuanVideo", latent_channels=4, block_out_channels=(8, 16, 16, 16), layers_per_block=1,
    norm_num_groups=4,
)  # fmt: skip
LTX = dict(
    kind="AutoencoderKLLTXVideo", latent_channels=16, block_out_channels=(16, 32, 32, 32),
    decoder_block_out_channels=(16, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
    decoder_layers_per_block=(1, 1, 1, 1, 1), patch_size=2,
)  # fmt: skip
COGVIDEO = dict(
    kind="AutoencoderKLCogVideoX", block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4,
    latent_channels=4, sample_height=64, sample_width=48,
)  # fmt: skip
DC = dict(
    kind="AutoencoderDC", latent_channels=8, attention_head_dim=8,
    encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
    decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
    encoder_block_out_channels=(16, 32, 32), decoder_block_out_channels=(16, 32, 32),
    encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
    encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)),
)  # fmt: skip


@case("kl_decoder", "Coder", HERE)
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return dict(KL, method="decode"), dict(x=r.normal(2, 4, 22, 14))


@case("kl_encoder", "Coder", HERE)
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return dict(KL, method="encode"), dict(x=r.normal(1, 3, 76, 60))


@case("wan_decoder", "Coder", HERE)
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return dict(WAN, method="decode"), dict(x=r.normal(1, 4, 3, 12, 8))


@case("wan_encoder", "Coder", HERE)
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return dict(WAN, method="encode"), dict(x=r.normal(1, 3, 9, 88, 64))


@case("hunyuan_decoder", "Coder", HERE)
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return dict(HUNYUAN, method="decode"), dict(x=r.normal(1, 4, 3, 11, 6))


@case("hunyuan_encoder", "Coder", HERE)
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return dict(HUNYUAN, method="encode"), dict(x=r.normal(1, 3, 5, 96, 48))


@case("ltx_decoder", "Coder", HERE)
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return dict(LTX, method="decode"), dict(x=r.normal(1, 16, 3, 12, 6))


@case("ltx_encoder", "Coder", HERE)
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return dict(LTX, method="encode"), dict(x=r.normal(1, 3, 9, 192, 96))


@case("cogvideo_decoder", "Coder", HERE)
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return dict(COGVIDEO, method="decode"), dict(x=r.normal(1, 4, 3, 12, 8))


@case("cogvideo_encoder", "Coder", HERE)
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return dict(COGVIDEO, method="encode"), dict(x=r.normal(1, 3, 9, 88, 48))


@case("dc_decoder", "Coder", HERE)
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return dict(DC, method="decode"), dict(x=r.normal(2, 8, 12, 8))


@case("dc_encoder", "Coder", HERE)
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return dict(DC, method="encode"), dict(x=r.normal(1, 3, 88, 64))


def _noise(r: Draw, *shape: int) -> Inputs:
    text = r.normal(shape[0], TEXT, TEXT_DIM)
    return dict(sample=r.normal(*shape), timestep=torch.tensor(321), encoder_hidden_states=text, return_dict=False)


@case("unet_sd", "UNet2DConditionModel", "diffusers")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=TEXT_DIM,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return config, _noise(r, 2, 4, 44, 28)


@case("unet_sdxl", "UNet2DConditionModel", "diffusers")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=TEXT_DIM,
        attention_head_dim=(2, 4, 8), transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8,
    )  # fmt: skip
    added = dict(text_embeds=r.normal(1, 24), time_ids=torch.tensor([[352.0, 320.0, 0.0, 0.0, 352.0, 320.0]]))
    return config, dict(_noise(r, 1, 4, 44, 40), added_cond_kwargs=added)


@case("unet_motion", "UNetMotionModel", "diffusers")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=TEXT_DIM,
        num_attention_heads=4, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), motion_num_attention_heads=4,
        motion_max_seq_length=16,
    )  # fmt: skip
    return config, dict(_noise(r, 1, 4, 6, 24, 20), encoder_hidden_states=r.normal(6, TEXT, TEXT_DIM))


SMALL = (
    "kl_decoder", "kl_encoder", "wan_decoder", "wan_encoder", "hunyuan_decoder", "hunyuan_encoder", "ltx_decoder",
    "ltx_encoder", "cogvideo_decoder", "cogvideo_encoder", "dc_decoder", "dc_encoder", "unet_sd", "unet_sdxl",
    "unet_motion",
)  # fmt: skip
"""The models of this file."""


def _on_meta(make: Callable[[], nn.Module], **shapes: tuple[int, ...]) -> Callable[[], tuple[nn.Module, Inputs]]:
    def build() -> tuple[nn.Module, Inputs]:
        with torch.device("meta"):
            return make().eval(), {name: torch.empty(shape) for name, shape in shapes.items()}

    return build


_FULL_KL = dict(
    kind="AutoencoderKL", block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
_FULL_DC = dict(
    kind="AutoencoderDC", encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
)  # fmt: skip
_FULL_SDXL = dict(
    block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
_TEXT = dict(timestep=(), encoder_hidden_states=(2, 77, 768))
FULL: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "kl_decoder": _on_meta(lambda: Coder(method="decode", **_FULL_KL), x=(1, 4, 128, 128)),
    "kl_encoder": _on_meta(lambda: Coder(method="encode", **_FULL_KL), x=(1, 3, 1024, 1024)),
    "wan_decoder": _on_meta(lambda: Coder("AutoencoderKLWan", "decode"), x=(1, 16, 3, 90, 160)),
    "wan_encoder": _on_meta(lambda: Coder("AutoencoderKLWan", "encode"), x=(1, 3, 9, 720, 1280)),
    "hunyuan_decoder": _on_meta(lambda: Coder("AutoencoderKLHunyuanVideo", "decode"), x=(1, 16, 5, 32, 32)),
    "ltx_decoder": _on_meta(lambda: Coder("AutoencoderKLLTXVideo", "decode"), x=(1, 128, 7, 16, 24)),
    "cogvideo_decoder": _on_meta(lambda: Coder("AutoencoderKLCogVideoX", "decode"), x=(1, 16, 2, 60, 90)),
    "dc_decoder": _on_meta(lambda: Coder(method="decode", **_FULL_DC), x=(1, 32, 32, 32)),
    "dc_encoder": _on_meta(lambda: Coder(method="encode", **_FULL_DC), x=(1, 3, 1024, 1024)),
    "unet_sd": _on_meta(
        lambda: diffusers.UNet2DConditionModel(cross_attention_dim=768), sample=(2, 4, 96, 96), **_TEXT
    ),
    "unet_sdxl": _on_meta(
        lambda: diffusers.UNet2DConditionModel(**_FULL_SDXL),
        sample=(2, 4, 128, 128), timestep=(), encoder_hidden_states=(2, 77, 2048),
    ),
    "unet_motion": _on_meta(
        lambda: diffusers.UNetMotionModel(cross_attention_dim=768),
        sample=(2, 4, 16, 64, 64), timestep=(), encoder_hidden_states=(32, 77, 768),
    ),
}  # fmt: skip
"""Some of them as they are used, on the meta device."""
