"""Video models: 160 tokens of 4 frames of 4 x 10, patched from latents [4, 8, 20] unless the class takes tokens."""

from __future__ import annotations

from typing import Any

import torch

from .registry import HEAD_DIM, HEADS, HIDDEN, TEXT, Draw, Inputs, case, key_mask

BATCH = 2
FRAMES, HEIGHT, WIDTH = 4, 8, 20
GRID = (FRAMES, HEIGHT // 2, WIDTH // 2)
TOKENS = GRID[0] * GRID[1] * GRID[2]
AUDIO = 72
TEXT_DIM, POOLED_DIM, IMAGE_DIM = 32, 40, 40
WAN_TEXT = 512  # the image context of the Wan family is all but the last 512 tokens


def _latents(r: Draw, channels: int = 4, frames: int = FRAMES, batch: int = BATCH) -> torch.Tensor:
    return r.normal(batch, channels, frames, HEIGHT, WIDTH)


def _text(r: Draw, tokens: int = TEXT, batch: int = BATCH) -> torch.Tensor:
    return r.normal(batch, tokens, TEXT_DIM)


def _wan(**more: Any) -> dict[str, Any]:
    common = dict(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4,
        text_dim=TEXT_DIM, freq_dim=40, ffn_dim=96, num_layers=2,
    )  # fmt: skip
    return common | more


def _inputs(r: Draw, **more: Any) -> Inputs:
    common = dict(
        hidden_states=_latents(r), encoder_hidden_states=_text(r), timestep=torch.tensor([17, 801]), return_dict=False
    )
    return common | more


@case("allegro", "AllegroTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    # Three axes share the head evenly, in pairs: 16 does not do.
    head_dim = 24
    config = dict(
        num_attention_heads=HEADS, attention_head_dim=head_dim, cross_attention_dim=HEADS * head_dim, num_layers=2,
        in_channels=4, out_channels=4, sample_height=HEIGHT, sample_width=WIDTH, sample_frames=FRAMES,
        caption_channels=TEXT_DIM,
    )  # fmt: skip
    tables = get_3d_rotary_pos_embed_allegro(head_dim, ((0, 0), GRID[1:]), GRID[1:], FRAMES)[:3]
    positions = torch.cartesian_prod(*(torch.arange(size) for size in GRID)).T.reshape(3, 1, -1)
    valid = torch.ones(BATCH, FRAMES, HEIGHT, WIDTH)
    valid[1, :, :, -4:] = 0
    return config, _inputs(
        r, attention_mask=valid, encoder_attention_mask=key_mask(TEXT, 17), image_rotary_emb=(tables, tuple(positions))
    )


@case("anyflow", "AnyFlowTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _wan(rope_max_seq_len=32), _inputs(
        r,
        hidden_states=_latents(r).transpose(1, 2).contiguous(),
        timestep=r.integers(1000, BATCH, FRAMES),
        r_timestep=r.integers(1000, BATCH, FRAMES),
    )


@case("chronoedit", "ChronoEditTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _wan(cross_attn_norm=True, rope_max_seq_len=32), _inputs(r)


@case("easyanimate", "EasyAnimateTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    # Two blocks with weights of their own for the text, two that share them.
    config = dict(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4, patch_size=2,
        sample_width=WIDTH, sample_height=HEIGHT, num_layers=4, mmdit_layers=2, time_embed_dim=40,
        text_embed_dim=TEXT_DIM, add_norm_text_encoder=True,
    )  # fmt: skip
    return config, _inputs(r)


@case("helios", "HeliosTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    frames = torch.arange(12).expand(BATCH, -1)
    return _wan(rope_dim=(4, 6, 6)), _inputs(
        r,
        indices_latents_history_long=frames[:, :4],
        indices_latents_history_mid=frames[:, 4:6],
        indices_latents_history_short=frames[:, 6:8],
        indices_hidden_states=frames[:, 8:],
        latents_history_long=_latents(r),
        latents_history_mid=_latents(r, frames=2),
        latents_history_short=_latents(r, frames=2),
    )


@case("hunyuan_video15", "HunyuanVideo15Transformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        in_channels=9, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=2,
        num_refiner_layers=2, mlp_ratio=2.0, text_embed_dim=TEXT_DIM, text_embed_2_dim=20, image_embed_dim=IMAGE_DIM,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return config, _inputs(
        r,
        hidden_states=r.normal(BATCH, 9, *GRID),
        timestep=torch.tensor([17.0, 801.0]),
        encoder_attention_mask=key_mask(TEXT, 17),
        encoder_hidden_states_2=r.normal(BATCH, 12, 20),
        encoder_attention_mask_2=key_mask(5, 12, total=12),
        image_embeds=r.normal(BATCH, 9, IMAGE_DIM),
    )


def _framepack(r: Draw, *text_lengths: int) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=2,
        num_single_layers=2, num_refiner_layers=2, mlp_ratio=2.0, text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM, rope_axes_dim=(4, 6, 6), has_image_proj=True, image_proj_dim=IMAGE_DIM,
        has_clean_x_embedder=True,
    )  # fmt: skip
    batch = len(text_lengths)
    frames = torch.arange(12)
    return config, dict(
        hidden_states=_latents(r, batch=batch),
        timestep=torch.tensor([17, 801])[:batch],
        encoder_hidden_states=_text(r, batch=batch),
        encoder_attention_mask=key_mask(*text_lengths).long(),
        pooled_projections=r.normal(batch, POOLED_DIM),
        image_embeds=r.normal(batch, 9, IMAGE_DIM),
        guidance=torch.full((batch,), 6000.0),
        indices_latents_history_4x=frames[:4],
        indices_latents_history_2x=frames[4:6],
        indices_latents_clean=frames[6:8],
        indices_latents=frames[8:],
        latents_history_4x=_latents(r, batch=batch),
        latents_history_2x=_latents(r, frames=2, batch=batch),
        latents_clean=_latents(r, frames=2, batch=batch),
        return_dict=False,
    )


@case("framepack", "HunyuanVideoFramepackTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _framepack(r, 17)


@case("framepack_b2", "HunyuanVideoFramepackTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _framepack(r, TEXT, 17)


def _kandinsky(**more: Any) -> dict[str, Any]:
    common = dict(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=TEXT_DIM, in_text_dim2=POOLED_DIM, time_dim=40,
        model_dim=HIDDEN, ff_dim=96, num_text_blocks=2, num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=True,
    )  # fmt: skip
    return common | more


def _channels_last(r: Draw) -> torch.Tensor:
    """The latent, the latent it is conditioned on and their mask."""
    return r.normal(BATCH, FRAMES, HEIGHT, WIDTH, 9)


@case("kandinsky5", "Kandinsky5Transformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _kandinsky(), _inputs(
        r,
        hidden_states=_channels_last(r),
        pooled_projections=r.normal(BATCH, POOLED_DIM),
        visual_rope_pos=tuple(torch.arange(size) for size in GRID),
        text_rope_pos=torch.arange(TEXT),
    )


@case("kandinsky6", "Kandinsky6Transformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = _kandinsky(in_audio_dim=6, out_audio_dim=6, model_dim_a=32, ff_dim_a=48, axes_dims_a=(2, 2, 4))
    return config, _inputs(
        r,
        hidden_states=_channels_last(r),
        pooled_projections=r.normal(BATCH, POOLED_DIM),
        audio_hidden_states=r.normal(BATCH, AUDIO, 6),
        encoder_attention_mask=key_mask(TEXT, 17),
    )


def _ltx2(r: Draw, **more: Any) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        in_channels=12, out_channels=12, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM,
        cross_attention_dim=HIDDEN, audio_in_channels=6, audio_out_channels=6, audio_num_attention_heads=HEADS,
        audio_attention_head_dim=8, audio_cross_attention_dim=32, num_layers=2, caption_channels=TEXT_DIM,
    )  # fmt: skip
    return config | more, _inputs(
        r,
        hidden_states=r.normal(BATCH, TOKENS, 12),
        audio_hidden_states=r.normal(BATCH, AUDIO, 6),
        audio_encoder_hidden_states=_text(r),
        encoder_attention_mask=key_mask(TEXT, 17),
        audio_encoder_attention_mask=key_mask(TEXT, 17),
        num_frames=GRID[0],
        height=GRID[1],
        width=GRID[2],
        audio_num_frames=AUDIO,
    )


@case("ltx2", "LTX2VideoTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _ltx2(r)


@case("ltx2_split", "LTX2VideoTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _ltx2(r, rope_type="split")


@case("motif_video", "MotifVideoTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    # Of the four single-stream blocks the last two are the decoder, which attends to the encoded video.
    config = dict(
        in_channels=9, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=2,
        num_single_layers=4, num_decoder_layers=2, mlp_ratio=2.0, text_embed_dim=TEXT_DIM, rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
    )  # fmt: skip
    return config, _inputs(r, hidden_states=_latents(r, channels=9), encoder_attention_mask=key_mask(TEXT, 17))


@case("wan_vace", "WanVACETransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = _wan(rope_max_seq_len=32, vace_layers=[0, 1], vace_in_channels=6)
    return config, _inputs(r, control_hidden_states=_latents(r, channels=6))


@case("wan_animate", "WanAnimateTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    # Nine face frames become three motion vectors, one for each frame after the reference.
    config = _wan(
        in_channels=12, latent_channels=4, rope_max_seq_len=32, image_dim=IMAGE_DIM, added_kv_proj_dim=HIDDEN,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=16,
        motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=4,
        inject_face_latents_blocks=1,
    )  # fmt: skip
    return config, _inputs(
        r,
        hidden_states=_latents(r, channels=12),
        encoder_hidden_states=_text(r, tokens=WAN_TEXT),
        encoder_hidden_states_image=r.normal(BATCH, 20, IMAGE_DIM),
        pose_hidden_states=_latents(r, frames=FRAMES - 1),
        face_pixel_values=r.normal(BATCH, 3, 9, 16, 16),
    )
