"""Real clients of the backend, tiny and with random weights: diffusers pipelines and a plain PyTorch DiT.

Pipelines take ``times``: their networks are so many times as wide, and their transformers so many times as deep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WORDS = "a cat in the rain photo of red dog on grass video".split()


def tokenizer(length: int) -> Any:
    """A word-level tokenizer made here: nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def redrawn(module: nn.Module) -> nn.Module:
    """No layer stays zero: every token matters for every pixel."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return module.eval()


def image_pipeline(times: int = 1) -> Any:
    """Flux: CLIP and T5 encoders, transformer, VAE, flow-matching scheduler."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=32, hidden_size=32 * times, intermediate_size=37 * times, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=1, bos_token_id=0, projection_dim=32 * times,
    )  # fmt: skip
    t5 = T5Config(vocab_size=32, d_model=32 * times, d_kv=8 * times, d_ff=37 * times, num_layers=2, num_heads=4)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8 * times, 16 * times), latent_channels=4, norm_num_groups=4,
        sample_size=32, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=times, num_single_layers=times, attention_head_dim=16 * times,
        num_attention_heads=4, joint_attention_dim=32 * times, pooled_projection_dim=32 * times,
        axes_dims_rope=(4 * times, 4 * times, 8 * times),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=redrawn(vae),
        text_encoder=redrawn(CLIPTextModel(clip)),
        tokenizer=tokenizer(16),
        text_encoder_2=redrawn(T5EncoderModel(t5)),
        tokenizer_2=tokenizer(24),
        transformer=redrawn(transformer),
    )


def two_experts(times: int = 1) -> Any:
    """A video pipeline whose early steps run one transformer and whose late steps run another."""
    from diffusers import WanPipeline

    pipe, other = video_pipeline(times), video_pipeline(times).transformer
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    return WanPipeline(**{**pipe.components, "transformer_2": other}, boundary_ratio=0.8)


def audio_pipeline(times: int = 1) -> Any:
    """Stable Audio: T5 encoder, a projection of the times, transformer, convolutional VAE of the waveform."""
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    text = T5Config(vocab_size=32, d_model=32 * times, d_kv=8 * times, d_ff=37 * times, num_layers=2, num_heads=4)
    vae = AutoencoderOobleck(
        encoder_hidden_size=8 * times, downsampling_ratios=[2, 2], channel_multiples=[1, 2], decoder_channels=8 * times,
        decoder_input_channels=4, audio_channels=2, sampling_rate=64,
    )  # fmt: skip
    transformer = StableAudioDiTModel(
        sample_size=63 if times == 1 else 1023, in_channels=4, out_channels=4, num_layers=2 * times,
        attention_head_dim=16 * times, num_attention_heads=4, num_key_value_attention_heads=2,
        cross_attention_dim=32 * times, time_proj_dim=8, global_states_input_dim=64 * times,
        cross_attention_input_dim=32 * times,
    )  # fmt: skip
    return StableAudioPipeline(
        vae=vae.eval(),  # its weights as they are drawn: periodic activations of larger ones magnify rounding
        text_encoder=redrawn(T5EncoderModel(text)),
        projection_model=redrawn(StableAudioProjectionModel(32 * times, 32 * times, 0, 512)),
        tokenizer=tokenizer(24),
        transformer=redrawn(transformer),
        # Few steps from little noise: from much, random weights make a thousand of a rounding error.
        scheduler=EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_min=0.3, sigma_max=1.0
        ),
    )


def video_pipeline(times: int = 1) -> Any:
    """Wan: UMT5 encoder, transformer, causal video VAE, flow-matching scheduler."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    text = UMT5Config(vocab_size=32, d_model=32 * times, d_kv=8 * times, d_ff=37 * times, num_layers=2, num_heads=4)
    vae = AutoencoderKLWan(
        base_dim=3 * times, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16 * times, in_channels=16, out_channels=16,
        text_dim=32 * times, freq_dim=64, ffn_dim=96 * times, num_layers=2 * times, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return WanPipeline(
        tokenizer=tokenizer(24),
        text_encoder=redrawn(UMT5EncoderModel(text)),
        vae=redrawn(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=redrawn(transformer),
    )


class Attention(nn.Module):
    """One product for q, k and v, per-head norms, attention by hand or fused."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """A transformer block whose norms and gates are set by the time."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = Attention(width, heads, fused)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainDiT(nn.Module):
    """Images in, images out: patch embedding, added positions, register tokens, blocks, unpatchify."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 3, patch: int = 2, registers: int = 4) -> None:
        super().__init__()
        self.patch, self.registers = patch, registers
        self.embed = nn.Conv2d(4, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.zeros(1, width, 16, 16))
        self.register = nn.Parameter(torch.zeros(1, registers, width))
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([Block(width, heads, fused=i % 2 == 0) for i in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, patch * patch * 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        freqs = torch.exp(-torch.arange(16, device=x.device) / 16 * 9.2)
        angles = t[:, None] * freqs
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        x = self.embed(x)
        height, width = x.shape[-2:]
        x = (x + F.interpolate(self.positions, (height, width), mode="bilinear")).flatten(2).transpose(1, 2)
        x = torch.cat([self.register.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, time)
        x = self.head(self.norm(x))[:, self.registers :]
        x = x.reshape(x.shape[0], height, width, self.patch, self.patch, 4)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], 4, height * self.patch, width * self.patch)


def plain_dit() -> nn.Module:
    """With weights of its own."""
    torch.manual_seed(0)
    return redrawn(PlainDiT())
