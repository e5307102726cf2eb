"""A diffusers pipeline on several ranks: its networks are compiled in place, the pipeline is not touched.

    sfcompile run --ranks 2 examples/diffusers_pipeline.py

The pipeline is a tiny Flux with random weights, so nothing is downloaded. A real one is five lines:

    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
    sfcompile.compile_pipeline(pipe)
    image = pipe("a cat in the rain", generator=torch.Generator().manual_seed(0)).images[0]
    if os.environ["RANK"] == "0":
        image.save("cat.png")

Every rank runs the whole pipeline with the same seed; the work of its networks on tokens and pixels is divided.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn

import sfcompile


def load() -> FluxPipeline:
    """A pipeline whose prompts are embedded already: no text encoders, no tokenizers."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=redrawn(vae),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=redrawn(transformer),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def redrawn(module: nn.Module) -> nn.Module:
    """Random weights that leave no layer at zero: every token matters for every pixel."""
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else parameter + 0.05 * noise)
    return module.eval()


def draw(pipe: FluxPipeline) -> torch.Tensor:
    """Three steps at 32 x 40 pixels; the seed is the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    prompt: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, 24, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=generator),
    }
    images = pipe(**prompt, height=32, width=40, num_inference_steps=3, output_type="pt", generator=generator).images
    return torch.as_tensor(images)


@torch.no_grad()
def main() -> None:
    """Draw with one process and with all ranks, and compare the pictures."""
    pipe = load()
    want = draw(pipe)
    sfcompile.compile_pipeline(pipe, options={"placement": "shard", "inner": "eager"})
    got = draw(pipe)
    if os.environ.get("RANK", "0") == "0":
        error = float((got - want).abs().max() / want.abs().max())
        print(f"picture {tuple(got.shape)}, difference from one process: {error:.1e} of the output's scale")


if __name__ == "__main__":
    main()
